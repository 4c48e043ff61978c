"""The recorder on loaders of every habit that SGLang's models have: record, plan, copy, compare with a real load."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import library

from spmd_engine.errors import PlanError
from spmd_engine.planning import coverage
from spmd_engine.planning.layout import SourceLayout, Weight
from spmd_engine.planning.plan import build_plan
from spmd_engine.scheduler.recording.checkpoint_format import CheckpointFormat
from spmd_engine.scheduler.recording.loading import record as record_layout
from spmd_engine.scheduler.recording.plain_recorder import NotPlainError, PlainRecorder
from spmd_engine.scheduler.recording.recorder import Recorder
from spmd_engine.scheduler.recording.recording import DTYPE_NAMES
from spmd_engine.transfer import _native


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
            loads = record_layout(Toy((4, 4), load), layout, CheckpointFormat(None))
        assert [*loads.fallback] == fallback
        assert [copy.weight for copy in loads.copies] == ["a"][len(fallback) :]
        assert "recorded by every operation of their loader" in caplog.text


def test_weights_that_are_permuted_after_loading_are_refused():
    model = Toy((4, 4), lambda p, n, w: p.data.copy_(w))
    layout = SourceLayout((Weight("a", (4, 4), "float32"),), ())
    model.quant_method = SimpleNamespace(w13_swiglu_interleaved=False)
    assert len(record_layout(model, layout, CheckpointFormat(None)).copies) == 1
    model.quant_method.w13_swiglu_interleaved = True  # as SGLang 0.5.23 does on a GPU
    with pytest.raises(PlanError, match=r"another order.*without SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"):
        record_layout(model, layout, CheckpointFormat(None))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_parameter_is_refused_by_name(dtype):
    layout = SourceLayout((Weight("a", (4, 4), "bfloat16"),), ())
    with pytest.raises(PlanError, match=r"p of the engine is (float8_e4m3fn|int8): weights would have to be quantised"):
        record_layout(Toy((4, 4), lambda p, n, w: p.data.copy_(w), dtype), layout, CheckpointFormat(None))


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


with_misleading_words = library.Library("spmd_engine_tests", "DEF")
with_misleading_words.define("knows_values(Tensor x) -> Tensor")
with_misleading_words.define("knows_shapes(Tensor x) -> Tensor")


def _refuse_without_values(x):
    raise RuntimeError("the size of this tensor cannot be looked at")


def _refuse_odd(x):
    if x.shape[0] % 2:
        raise RuntimeError("meta: no")
    return x.clone()


with_misleading_words.impl("knows_values", torch.clone, "CPU")
with_misleading_words.impl("knows_values", _refuse_without_values, "Meta")
with_misleading_words.impl("knows_shapes", _refuse_odd, "CompositeExplicitAutograd")


def test_whether_a_shape_is_wrong_is_told_by_trying_and_not_by_the_words_of_a_message():
    def values(p, name, w):
        p.data.copy_(torch.ops.spmd_engine_tests.knows_values(w))

    def shapes(p, name, w):
        p.data.copy_(torch.ops.spmd_engine_tests.knows_shapes(w))

    _, recording = record(Toy((3, 2), values), {"a": randn(3, 2)})
    assert list(recording.fallback) == ["a"]  # the model's own loader can
    with pytest.raises(PlanError, match="refuses the source: RuntimeError: meta: no"):  # nothing can
        record(Toy((3, 2), shapes), {"a": randn(3, 2)})
