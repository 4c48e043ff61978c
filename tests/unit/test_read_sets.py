"""Sets of elements, and whether what all ranks read is every element of every weight."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharding import CASES

from spmd_engine.control import codec
from spmd_engine.errors import PlanError
from spmd_engine.planning.layout import SourceLayout, Weight, contiguous_strides
from spmd_engine.planning.plan import RecordedCopy
from spmd_engine.planning.read_sets import (
    PackedReadSets,
    elements,
    pack,
    read_sets_of,
    subtract,
    unpack,
    unpack_distinct,
)
from spmd_engine.scheduler.recording.loading import check_all_used
from spmd_engine.scheduler.recording.recorder import Recorder

LAYOUT = SourceLayout((Weight("w", (6, 4), "float32"),), ())


def view(rows, name="w", shape=(6, 4)):
    first, stop, step = rows.indices(shape[0])
    count, strides = len(range(first, stop, step)), contiguous_strides(shape)
    src = (strides[0] * step, *strides[1:])
    return RecordedCopy(name, (count, *shape[1:]), first * strides[0], src, 64, strides, "float32", "p")


def read(*rows):
    return read_sets_of([view(each) for each in rows], {"w": (6, 4)})


class Holed(torch.nn.Module):
    """Its loader leaves out a row in the middle of the weight, and fills the whole parameter nevertheless."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(5, 4), requires_grad=False)

    def load_weights(self, weights):
        for _, weight in weights:
            self.p.data[:2].copy_(weight[:2])
            self.p.data[2:].copy_(weight[3:])


def test_a_loader_that_leaves_a_hole_is_refused():
    recorder = Recorder(Holed())
    recording = recorder.run([("w", recorder.stand_in(LAYOUT.weights[0]))])
    used = read_sets_of(recording.copies, {"w": (6, 4)})
    with pytest.raises(PlanError, match=r"'w' has another shape.* 20 elements of 24, and none of \[2:3, 0:4\]"):
        check_all_used(LAYOUT, frozenset(), [used])
    with pytest.raises(PlanError, match="'w'"):  # an optional weight may be left out whole, not in part
        check_all_used(LAYOUT, frozenset({"w"}), [used])


def test_all_ranks_together_must_read_everything():
    check_all_used(LAYOUT, frozenset(), [read(slice(0, 3)), read(slice(2, 6))])
    check_all_used(LAYOUT, frozenset(), [read(slice(0, 6, 2)), {}, read(slice(1, 6, 2))])
    check_all_used(LAYOUT, frozenset(), [read(slice(0, 6))] * 2)  # replicated heads
    with pytest.raises(PlanError, match="'w'"):
        check_all_used(LAYOUT, frozenset(), [read(slice(0, 6, 2)), read(slice(3, 6, 2))])
    with pytest.raises(PlanError, match="does not know weight 'w'"):
        check_all_used(LAYOUT, frozenset(), [{}, {}])
    check_all_used(LAYOUT, frozenset({"w"}), [{}])
    empty = SourceLayout((Weight("w", (0, 4), "float32"),), ())
    check_all_used(empty, frozenset(), [read_sets_of([view(slice(0, 0), shape=(0, 4))], {"w": (0, 4)})])


@CASES
@given(st.data())
def test_what_is_left_is_what_no_view_reads(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    expected, copies = set(numbers.flatten().tolist()), []
    for _ in range(data.draw(st.integers(0, 4))):
        some = numbers
        for dim, extent in enumerate(shape):
            start = data.draw(st.integers(0, extent - 1))
            some = some.narrow(dim, start, data.draw(st.integers(1, extent - start)))
        some = some[:: data.draw(st.integers(1, 3))]
        expected -= set(some.flatten().tolist())
        copies.append(
            RecordedCopy("w", some.shape, some.storage_offset(), some.stride(), 64, some.stride(), "float32", "p")
        )
    sets = read_sets_of(copies, {"w": shape})
    left = subtract(sets["w"].parts if copies else (), shape)
    assert sum(map(elements, left)) == len(expected)
    names = ["other", "w"]
    assert unpack(codec.decode(codec.encode(pack(sets, names)), PackedReadSets), names) == sets


def test_many_experts_take_little_time_and_few_bytes():
    """As many as Qwen3-30B-A3B has: three weights for each of 128 experts in 48 layers."""
    names = [f"model.layers.{n}.mlp.experts.{e}.{kind}" for n in range(48) for e in range(128) for kind in "gud"]
    shapes = dict.fromkeys(names, (768, 2048))
    layout = SourceLayout(tuple(Weight(name, (768, 2048), "bfloat16") for name in names), ())
    ranks = [[view(rows, name, (768, 2048)) for name in names] for rows in (slice(0, 384), slice(384, 768))]
    taken = []
    for _ in range(3):
        began = time.process_time()
        wire = [codec.encode(pack(read_sets_of(copies, shapes), names)) for copies in ranks]
        made = time.process_time()
        told = [codec.decode(data, PackedReadSets) for data in wire]
        check_all_used(layout, frozenset(), unpack_distinct(told, names))
        taken.append((made - began) / len(ranks) + time.process_time() - made)
    assert max(map(len, wire)) < 100_000
    assert min(taken) < 0.5, taken  # 0.1 s on an idle machine
