"""The recorder on loaders of every habit that SGLang's models have: record, plan, copy, compare with a real load."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spmd_engine import _native, coverage
from spmd_engine.errors import PlanError
from spmd_engine.layout import SourceLayout, Weight
from spmd_engine.plan import build_plan
from spmd_engine.scheduler import adapter
from spmd_engine.scheduler.conversion import Conversion
from spmd_engine.scheduler.loading import recorded
from spmd_engine.scheduler.plain_recorder import NotPlainError, PlainRecorder
from spmd_engine.scheduler.recorder import DTYPE_NAMES, Recorder


class Toy(torch.nn.Module):
    """A model whose one parameter is loaded by the function it is given."""

    def __init__(self, shape, load, dtype=torch.bfloat16):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        self.load = load

    def load_weights(self, weights):
        for name, weight in weights:
            self.load(self.p, name, weight)


def record(model: torch.nn.Module, weights: dict[str, torch.Tensor], kind=Recorder):
    layout = SourceLayout(tuple(Weight(n, tuple(t.shape), DTYPE_NAMES[t.dtype]) for n, t in weights.items()), ())
    recorder = kind(model)
    return layout, recorder.run([(w.name, recorder.stand_in(w)) for w in layout.weights])


def check(load, shape, dtype=torch.bfloat16, *, is_plain=True, **weights):
    """Recorded copies do what the loader does, and those of the quick recorder are the same; returns the recording."""
    recorded, real = Toy(shape, load, dtype), Toy(shape, load, dtype)
    layout, recording = record(recorded, weights)
    real.load_weights(weights.items())
    assert not recording.fallback
    if is_plain:
        _, quick = record(recorded, weights, PlainRecorder)
        quick.copies.sort(key=lambda copy: recording.copies.index(copy))  # threads have no order
        assert quick == recording
    else:
        with pytest.raises(NotPlainError):
            record(recorded, weights, PlainRecorder)
    table = build_plan(layout, coverage.last_of_duplicates(recording.copies), rank=0).bind(
        {0: np.array([t.data_ptr() for t in weights.values()], dtype=np.uint64)}
    )
    _native.copy_cpu(table, pids=[0])
    assert torch.equal(recorded.p.view(torch.uint8), real.p.view(torch.uint8))
    return recording


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_a_plain_copy():
    check(lambda p, n, w: p.data.copy_(w), (4, 6), a=randn(4, 6))


def test_narrowed_source_and_destination():
    def load(p, name, w):
        start = {"q": 0, "k": 4, "v": 6}[name]
        shard = w.narrow(0, w.shape[0] // 2, w.shape[0] // 2)
        p.data.narrow(0, start, shard.shape[0]).copy_(shard)

    check(load, (8, 5), q=randn(8, 5), k=randn(4, 5), v=randn(4, 5))


def test_stacked_experts_chunked_and_transposed():
    def load(p, name, w):
        gate, up = w.chunk(2, dim=0)
        p.data[int(name)][:, :3].copy_(gate.t())
        p.data[int(name)][:, 3:].copy_(up.transpose(0, 1))

    check(load, (2, 5, 6), **{"0": randn(6, 5), "1": randn(6, 5)})


def test_reshaped_unbound_and_squeezed():
    def load(p, _, w):
        for i, row in enumerate(w.view(2, 3, 4).unbind(0)):
            p.data[i].copy_(row.unsqueeze(0).squeeze(0).reshape(-1))

    check(load, (2, 12), a=randn(6, 4))


def test_interleaved_rows_and_contiguous_copies():
    def load(p, _, w):
        p.data[:2].copy_(w[::2].contiguous())
        p.data[2:].copy_(w[1::2].clone())

    check(load, (4, 3), is_plain=False, a=randn(4, 3))


def test_a_rank_that_gets_no_rows_of_a_padded_vocabulary():
    recording = check(lambda p, n, w: p.data[: len(w[8:])].copy_(w[8:]), (4, 3), a=randn(6, 3))
    assert recording.copies == []


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_casts(source, target):
    weight, is_same = randn(4, 4, dtype=source), source == target
    check(lambda p, n, w: p.data.copy_(w.to(p.dtype)), (4, 4), target, is_plain=is_same, a=weight)
    check(lambda p, n, w: p.data.copy_(w.float()), (4, 4), target, is_plain=source == torch.float32, a=weight)
    check(lambda p, n, w: p.data.copy_(w), (4, 4), target, a=randn(4, 4, dtype=source))


def test_threads_of_a_loader_are_recorded_too():
    def load(p, _, w):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: p.data[i].copy_(w[i]), range(4)))

    assert len(check(load, (4, 4), a=randn(4, 4)).copies) == 4


def test_padding_is_a_constant():
    def load(p, _, w):
        p.data[: w.shape[0]].copy_(w)
        p.data[w.shape[0] :].fill_(0)

    recording = check(load, (8, 4), a=randn(5, 4))
    assert [(sizes, strides) for _, sizes, strides in recording.constants] == [((3, 4), (4, 1))]


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (lambda p, n, w: p.data.copy_(w + 1), "its loader computes with it (add)"),
        (lambda p, n, w: p.data.copy_(w.mul_(2)), "its loader applies mul_ in place"),
        (lambda p, n, w: p.data.copy_(torch.cat([w[:2], w[2:]])), "its loader computes with it (cat)"),
        (lambda p, n, w: p.data.add_(w), "its loader applies add_ in place"),
        (lambda p, n, w: p.data.copy_(w.half().to(p.dtype)), "its loader converts it to torch.float16"),
        (lambda p, n, w: p.data.copy_(w[:1]), "its loader repeats it"),
    ],
)
def test_arithmetic_goes_through_the_fallback_and_leaves_parameters_alone(load, why):
    model = Toy((4, 4), load)
    with pytest.raises(NotPlainError):
        record(model, {"a": randn(4, 4)}, PlainRecorder)
    _, recording = record(model, {"a": randn(4, 4)})
    assert recording.fallback == {"a": why} and recording.fallback_parameters == {"p"}
    assert not model.p.any()


def test_a_temporary_that_was_never_filled_is_not_written_into_a_parameter():
    def load(p, _, w):
        staging = torch.ones(4, 4, dtype=w.dtype)
        staging.copy_(w)
        p.data.copy_(staging)

    model = Toy((4, 4), load)
    with pytest.raises(NotPlainError):
        record(model, {"a": randn(4, 4)}, PlainRecorder)
    _, recording = record(model, {"a": randn(4, 4)})
    assert recording.fallback == {"a": "its loader copies it to somewhere else than a parameter"}
    assert recording.fallback_parameters == {"p"}
    assert not model.p.any()


def test_a_parameter_written_only_in_part_by_the_fallback_is_known():
    _, recording = record(Toy((4, 4), lambda p, n, w: p.data[:2].copy_(w + 1)), {"a": randn(2, 4)})
    assert [sizes for _, sizes, _ in recording.constants] == [(2, 4)]


def test_a_loader_that_needs_values_takes_only_that_weight_out():
    def load(p, name, w):
        if name == "scale":
            p.data[0] = w.item()
        else:
            p.data[1:].copy_(w)

    _, recording = record(Toy((4, 4), load), {"scale": randn(1), "a": randn(3, 4)})
    assert recording.fallback == {"scale": "its loader looks at values (_local_scalar_dense)"}
    assert [sizes for _, sizes, _ in recording.constants] == [(4,)]
    assert [copy.weight for copy in recording.copies] == ["a"]


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
    loads = recorded(model, layout, Conversion(None))
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
        (by_sglangs_composed_loader, {}),
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


@pytest.mark.parametrize(
    "change",
    [
        lambda p: torch.neg(p, out=p),
        lambda p: torch._foreach_mul_([p[:2], p[2:]], 2.0),
        lambda p: torch.addmm(p, p, p, out=p),
    ],
)
def test_the_full_recorder_sees_functions_that_change_parameters(change):
    def load(p, _, w):
        p.data.copy_(w)
        change(p.data)

    model = Toy((4, 4), load, torch.float32)
    _, recording = record(model, {"a": randn(4, 4, dtype=torch.float32)})
    assert "after having filled it" in recording.fallback["a"] and not recording.copies
    assert recording.fallback_parameters == {"p"} and not model.p.any()


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
    assert not recorded(model, layout, Conversion(None)).fallback
    assert model.c.tolist() == [6] * 4


def looked_at(model, weights):  # if it is one element
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    for name, w in weights.items():
        default_weight_loader(getattr(model, name), w)


def test_a_weight_whose_value_is_needed_excuses_no_other_one():
    model = Several(looked_at, scale=(1,), a=(4,))
    assert [*loaded_as_recorded(model, scale=torch.tensor([5.0]), a=torch.arange(4.0)).fallback] == ["scale"]
    assert model.scale.item() == 5 and model.a.tolist() == [0, 1, 2, 3]
    layout = SourceLayout((Weight("scale", (1,), "float32"), Weight("a", (4,), "float32")), ())
    with pytest.raises(PlanError, match=r"the source has no weight for q \[4, 4\]"):
        recorded(Several(looked_at, scale=(1,), a=(4,), q=(4, 4)), layout, Conversion(None))


def test_a_loader_that_fails_on_other_values_is_refused():
    def load(model, weights):
        for name, w in weights.items():
            getattr(model, name).data.fill_(1 / w.item())

    layout = SourceLayout((Weight("scale", (1,), "float32"),), ())
    with pytest.raises(
        PlanError, match=r"would have to load scale by itself, and fails on zeros .*: ZeroDivisionError"
    ):
        recorded(Several(load, scale=(1,)), layout, Conversion(None))


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
        derivations = adapter.derivations(model)
        part.p.fill_(3)
        for derive in derivations:
            derive()
        assert part.derived.tolist() == [6] * 4
    assert adapter.derivations(wrapper.tower) == []


def test_a_loader_that_wants_all_weights_at_once_is_refused_before_anything_is_written():
    def load(model, weights):
        for name, w in weights.items():
            getattr(model, name).data.copy_(w + 1 if name == "a" else w)
        assert weights.keys() == {"a", "b"}, "some weights are not loaded"  # as SGLang's Step-3.5 does

    model = Several(load, a=(4,), b=(4,))
    layout = SourceLayout((Weight("a", (4,), "float32"), Weight("b", (4,), "float32")), ())
    with pytest.raises(PlanError, match=r"would have to load a by itself.*some weights are not loaded"):
        recorded(model, layout, Conversion(None))
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
        model.derived = torch.full((2,), 5.0)

    model = Several(load, a=(4,))
    model.derived = derived = torch.zeros(2)  # a CUDA graph may have its address
    recorded(model, SourceLayout((Weight("a", (4,), "float32"),), ()), Conversion(None))
    assert model.derived is derived and derived.tolist() == [5, 5]


def test_a_weight_that_the_loader_skips_is_not_used():
    _, recording = record(
        Toy((4,), lambda p, n, w: p.data.copy_(w) if n == "a" else None), {"a": randn(4), "b": randn(4)}
    )
    assert recording.used() == {"a"}


@pytest.mark.parametrize(
    "load",
    [
        lambda p, n, w: (p.data.copy_(w), p.data.copy_(torch.ones(4, 4))),
        lambda p, n, w: (p.data.copy_(w), p.data.__setitem__(0, 0)),
        lambda p, n, w: (p.data.copy_(w), p.data[:2].__setitem__(0, w[0])),
        lambda p, n, w: p.data.copy_(w.view(torch.float16)),
        lambda p, n, w: p.data.copy_(w[torch.tensor([3, 2, 1, 0])]),
        lambda p, n, w: p.data.copy_(w.narrow(0, 3, 9)),
        lambda p, n, w: torch.empty(4, 4).copy_(w),
        lambda p, n, w: p.data.copy_(w) if w.is_cuda else None,
        lambda p, n, w: w.copy_(p.data),
        lambda p, n, w: torch._foreach_copy_([p.data], [w]),
    ],
)
def test_what_the_quick_recorder_leaves_to_the_other_one(load):
    model = Toy((4, 4), load)
    with pytest.raises(NotPlainError):
        record(model, {"a": randn(4, 4)}, PlainRecorder)
    for name in ("copy_", "fill_", "zero_", "__setitem__"):  # torch's own again
        assert name not in vars(torch.Tensor)


def test_a_loader_that_is_not_plain_is_recorded_all_the_same(caplog):
    layout = SourceLayout((Weight("a", (4, 4), "float32"),), ())
    for load, fallback in ((lambda p, n, w: p.data.copy_(w.bfloat16()), []), (lambda p, n, w: p.data.copy_(-w), ["a"])):
        with caplog.at_level("INFO", "spmd_engine"):
            loads = recorded(Toy((4, 4), load), layout, Conversion(None))
        assert [*loads.fallback] == fallback
        assert [copy.weight for copy in loads.copies] == ["a"][len(fallback) :]
        assert "recorded by every operation of their loader" in caplog.text


def test_weights_that_are_permuted_after_loading_are_refused():
    model = Toy((4, 4), lambda p, n, w: p.data.copy_(w))
    layout = SourceLayout((Weight("a", (4, 4), "float32"),), ())
    model.quant_method = SimpleNamespace(w13_swiglu_interleaved=False)
    assert len(recorded(model, layout, Conversion(None)).copies) == 1
    model.quant_method.w13_swiglu_interleaved = True  # as SGLang 0.5.23 does on a GPU
    with pytest.raises(PlanError, match=r"another order.*without SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"):
        recorded(model, layout, Conversion(None))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_parameter_is_refused_by_name(dtype):
    layout = SourceLayout((Weight("a", (4, 4), "bfloat16"),), ())
    with pytest.raises(PlanError, match=r"p of the engine is (float8_e4m3fn|int8): weights would have to be quantised"):
        recorded(Toy((4, 4), lambda p, n, w: p.data.copy_(w), dtype), layout, Conversion(None))


@pytest.mark.parametrize(
    "load",
    [
        lambda p, n, w: p.data.narrow(0, 0, 2).copy_(w.narrow(0, 3, 9)),
        lambda p, n, w: p.data.copy_(w.view(3, 5)),
        lambda p, n, w: p.data.copy_(w.view(2, 8)),  # as many elements, in another shape
        lambda p, n, w: p.data[:2].copy_(w[:, :2]),
    ],
)
def test_a_wrong_shape_is_a_plan_error(load):
    with pytest.raises(RuntimeError, match="size"):
        Toy((4, 4), load).load_weights([("a", randn(4, 4))])
    with pytest.raises(NotPlainError):
        record(Toy((4, 4), load), {"a": randn(4, 4)}, PlainRecorder)
    with pytest.raises(PlanError, match="the engine's loader refuses"):
        record(Toy((4, 4), load), {"a": randn(4, 4)})


def region(tensor):
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def test_coverage_counts_exactly():
    p = torch.zeros(6, 4, 8)
    args = (p.data_ptr(), 4, tuple(p.shape))
    assert coverage.uncovered([region(p)], *args) == 0
    assert coverage.uncovered([region(p[:3]), region(p[3:])], *args) == 0
    assert coverage.uncovered([region(p[:, :2]), region(p[:, 2:, :3])], *args) == 6 * 2 * 5
    assert coverage.uncovered([], *args) == 6 * 4 * 8
    assert coverage.uncovered([region(p[0]), region(p[0])], *args) == 5 * 4 * 8  # the same again is no overlap
    assert coverage.uncovered([region(p[:4]), region(p[3:])], *args) is None  # an overlap
    assert coverage.uncovered([region(p.flatten()[3:20])], *args) is None  # not a box
    assert coverage.uncovered([region(p.transpose(0, 2)[:4])], *args) == 6 * 4 * 4
    assert coverage.uncovered([region(p[i, :, ::1]) for i in range(6)], *args) == 0
