"""Models whose loaders do more than to copy: record, copy, let the fallback load, compare with a real load."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from spmd_engine.errors import PlanError
from spmd_engine.planning.layout import SourceLayout, Weight
from spmd_engine.planning.plan import build_plan
from spmd_engine.scheduler.adapter import model as sglang_model
from spmd_engine.scheduler.recording.checkpoint_format import CheckpointFormat
from spmd_engine.scheduler.recording.loading import record
from spmd_engine.transfer import _native


class Several(torch.nn.Module):
    """Parameters of the given shapes, filled with ones, loaded by the function it is given."""

    def __init__(self, load, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.ones(shape), requires_grad=False))
        self.register_buffer("rest", torch.full((4,), 3.0))
        self.load = load

    def load_weights(self, weights):
        self.load(self, dict(weights))


def loaded_as_recorded(model: Several, **weights: torch.Tensor):
    """Do with the weights what was recorded, the fallback included; returns what was recorded."""
    layout = SourceLayout(tuple(Weight(n, tuple(w.shape), "float32") for n, w in weights.items()), ())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loads = record(model, layout, CheckpointFormat(None))
    for name, tensor in model.state_dict().items():  # recording leaves alone what may be in use
        assert torch.equal(tensor, before[name]), name
    table = build_plan(layout, loads.copies, rank=0).bind(
        {0: np.array([w.data_ptr() for w in weights.values()], dtype=np.uint64)}
    )
    _native.copy_cpu(table, pids=[0])
    if loads.fallback:
        model.load_weights({name: weights[name] for name in loads.fallback}.items())
    return loads


def by_sglangs_composed_loader(model, weights):  # as its Mamba layers load A
    from sglang.srt.model_loader.weight_utils import composed_weight_loader, default_weight_loader

    negated = composed_weight_loader(default_weight_loader, lambda x: -torch.exp(x.float()))
    for name, w in weights.items():
        (negated if name == "a" else default_weight_loader)(getattr(model, name), w)


def negated_in_place(model, weights):
    for name, w in weights.items():
        getattr(model, name).data.copy_(w)
        if name == "a":
            model.a.data.neg_()


def multiplied_by_an_operator(model, weights):
    for name, w in weights.items():
        getattr(model, name).data.copy_(w)
        if name == "a":
            model.a.data *= 2


def tied_by_a_copy(model, weights):
    for name, w in weights.items():
        getattr(model, name).data.copy_(w)
    model.c.data.copy_(model.a.data)


def computed_in_steps(model, weights):
    for name, w in weights.items():
        getattr(model, name).data.copy_(w)
    if "a" in weights:
        between = model.a.float() * 2
        model.c.data.copy_(torch.exp(between + 1))


def overwritten_by_a_constant(model, weights):
    for name, w in weights.items():
        getattr(model, name).data.copy_(w)
        if name == "a":
            model.a.data.fill_(7)


@pytest.mark.parametrize(
    ("load", "shapes"),
    [
        pytest.param(by_sglangs_composed_loader, {}, marks=pytest.mark.needs_sglang),
        (negated_in_place, {}),
        (multiplied_by_an_operator, {}),
        (tied_by_a_copy, {"c": (4,)}),
        (computed_in_steps, {"c": (4,)}),
        (overwritten_by_a_constant, {}),
    ],
)
def test_what_a_loader_does_to_parameters_after_it_has_filled_them(load, shapes):
    shapes = {"a": (4,), "b": (2, 4), **shapes}
    model, real = Several(load, **shapes), Several(load, **shapes)
    weights = {"a": torch.arange(4.0), "b": torch.randn(2, 4)}
    loads = loaded_as_recorded(model, **weights)
    assert [*loads.fallback] == ["a"] and [copy.weight for copy in loads.copies] == ["b"]
    assert "after having filled it" in loads.fallback["a"]
    real.load_weights(weights.items())
    for (name, tensor), expected in zip(model.state_dict().items(), real.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_a_parameter_that_is_cleared_before_it_is_filled_keeps_its_values_until_then():
    def load(model, weights):
        for name, w in weights.items():
            getattr(model, name).data.zero_()
            getattr(model, name).data.copy_(w)

    model = Several(load, a=(4,))
    assert not loaded_as_recorded(model, a=torch.arange(4.0)).fallback
    assert model.a.tolist() == [0, 1, 2, 3]


def test_what_depends_on_no_weight_is_written_at_once():
    def load(model, weights):
        model.a.data.copy_(weights["a"])
        model.c.data.copy_(model.rest * 2)

    model = Several(load, a=(4,), c=(4,))
    layout = SourceLayout((Weight("a", (4,), "float32"),), ())
    assert not record(model, layout, CheckpointFormat(None)).fallback
    assert model.c.tolist() == [6] * 4


def looked_at(model, weights):  # if it is one element
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    for name, w in weights.items():
        default_weight_loader(getattr(model, name), w)


@pytest.mark.needs_sglang
def test_a_weight_whose_value_is_needed_excuses_no_other_one():
    model = Several(looked_at, scale=(1,), a=(4,))
    assert [*loaded_as_recorded(model, scale=torch.tensor([5.0]), a=torch.arange(4.0)).fallback] == ["scale"]
    assert model.scale.item() == 5 and model.a.tolist() == [0, 1, 2, 3]
    layout = SourceLayout((Weight("scale", (1,), "float32"), Weight("a", (4,), "float32")), ())
    with pytest.raises(PlanError, match=r"the source has no weight for q \[4, 4\]"):
        record(Several(looked_at, scale=(1,), a=(4,), q=(4, 4)), layout, CheckpointFormat(None))


def test_a_loader_that_fails_on_other_values_is_refused():
    def load(model, weights):
        for name, w in weights.items():
            getattr(model, name).data.fill_(1 / w.item())

    layout = SourceLayout((Weight("scale", (1,), "float32"),), ())
    with pytest.raises(
        PlanError, match=r"would have to load scale by itself, and fails on zeros .*: ZeroDivisionError"
    ):
        record(Several(load, scale=(1,)), layout, CheckpointFormat(None))


class Deriving(torch.nn.Module):
    """With a tensor that is no parameter, as MLA's layers have it."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.derived = None

    def post_load_weights(self):
        self.derived = self.p * 2


def test_what_parts_of_a_model_derive_is_derived_again():
    wrapper = torch.nn.Module()  # as SGLang's Kimi-VL, which has no such method itself
    wrapper.language_model, wrapper.tower = Deriving(), torch.nn.Linear(2, 2)
    alone = Deriving()
    for model, part in ((wrapper, wrapper.language_model), (alone, alone)):
        derivations = sglang_model.derivations(model)
        part.p.fill_(3)
        for derive in derivations:
            derive()
        assert part.derived.tolist() == [6] * 4
    assert sglang_model.derivations(wrapper.tower) == []


def test_a_loader_that_wants_all_weights_at_once_is_refused_before_anything_is_written():
    def load(model, weights):
        for name, w in weights.items():
            getattr(model, name).data.copy_(w + 1 if name == "a" else w)
        assert weights.keys() == {"a", "b"}, "some weights are not loaded"  # as SGLang's Step-3.5 does

    model = Several(load, a=(4,), b=(4,))
    layout = SourceLayout((Weight("a", (4,), "float32"), Weight("b", (4,), "float32")), ())
    with pytest.raises(PlanError, match=r"would have to load a by itself.*some weights are not loaded"):
        record(model, layout, CheckpointFormat(None))
    assert model.a.tolist() == [1] * 4


def test_a_loader_that_goes_on_after_errors():
    def load(model, weights):  # as SGLang's MiniMax-M3 does
        for name, w in weights.items():
            try:
                getattr(model, name).data.copy_(w)
                getattr(model, name).data.mul_(2)
            except Exception:
                continue

    model = Several(load, a=(4,))
    assert [*loaded_as_recorded(model, a=torch.arange(4.0)).fallback] == ["a"]
    assert model.a.tolist() == [0, 2, 4, 6]


@pytest.mark.needs_sglang
def test_norms_of_gemma_with_what_sglang_computes_from_them():
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    def load(model, weights):
        model.norm.weight.weight_loader(model.norm.weight, weights["weight"])

    model = Several(load)
    model.norm = GemmaRMSNorm(4)
    model.norm.weight.requires_grad_(False)
    loads = loaded_as_recorded(model, weight=torch.arange(4.0))
    assert [*loads.fallback] == ["weight"]
    assert model.norm.weight.tolist() == [0, 1, 2, 3] and model.norm.gemma_weight.tolist() == [1, 2, 3, 4]


def test_a_temporary_of_a_weight_and_a_buffer():
    def load(model, weights):
        between = torch.full((4,), 9.0)
        between.copy_(weights["a"])
        model.a.data.copy_(between * model.rest)

    model = Several(load, a=(4,))
    assert [*loaded_as_recorded(model, a=torch.arange(4.0)).fallback] == ["a"]
    assert model.a.tolist() == [0, 3, 6, 9]


def test_threads_that_do_more_than_to_copy():
    def load(model, weights):
        def one(name):
            getattr(model, name).data.copy_(weights[name])
            getattr(model, name).data.copy_(-model.a.data)

        with ThreadPoolExecutor(1) as pool:
            list(pool.map(one, weights))

    model = Several(load, a=(4,))
    assert [*loaded_as_recorded(model, a=torch.arange(4.0)).fallback] == ["a"]
    assert model.a.tolist() == [0, -1, -2, -3]


def test_a_buffer_that_is_filled_twice():
    def load(model, weights):
        model.a.data.copy_(weights["a"])
        model.rest.copy_(weights["a"])
        model.rest[:2].fill_(7)

    model = Several(load, a=(4,))
    assert [*loaded_as_recorded(model, a=torch.arange(4.0)).fallback] == ["a"]
    assert model.rest.tolist() == [7, 7, 2, 3]


def test_what_a_loader_derives_anew_stays_where_it_was():
    def load(model, weights):
        model.a.data.copy_(weights["a"])
        model.derived = model.a + 1

    model = Several(load, a=(4,))
    model.derived = derived = torch.zeros(4)  # a CUDA graph may have its address
    record(model, SourceLayout((Weight("a", (4,), "float32"),), ()), CheckpointFormat(None))
    assert model.derived is derived and not derived.any()
    with sglang_model.keep_addresses(model):
        model.load_weights({"a": torch.arange(4.0)}.items())
    assert model.derived is derived and derived.tolist() == [1, 2, 3, 4]
