"""The planner against brute force: scatter a weight over ranks, plan, copy, compare every element."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharding import CASES, DTYPES, layouts, random_weight, recorded, scatter, view_of
from torch.distributed.tensor.placement_types import _StridedShard

from spmd_engine.errors import PlanError
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import (
    Mesh,
    Replicate,
    Shard,
    SourceLayout,
    StridedShard,
    Weight,
    boxed_shape,
    contiguous_strides,
    first_difference,
    local_box,
    pieces,
    replica_of,
    spread,
)
from spmd_engine.planning.plan import RecordedCopy, build_plan
from spmd_engine.transfer import _native


def run(layout, copies, shards, rank) -> int:
    """Plan and copy for `rank`; the number of bytes read."""
    plan = build_plan(layout, copies, rank=rank)
    addresses = {r: np.array([t.data_ptr()], dtype=np.uint64) for r, t in shards.items()}
    table = plan.bind(addresses)
    assert _native.copy_cpu(table, pids=[0]).bytes_read == plan.local_bytes + plan.remote_bytes
    assert _native.compare_cpu(table, pids=[0]).wrong_elements == 0
    return plan.local_bytes + plan.remote_bytes


@CASES
@given(st.data())
def test_any_view_into_any_parameter_matches_torch(data):
    layout = data.draw(layouts())
    full = random_weight(layout, data.draw(st.integers(0, 1000)))
    view = view_of(data.draw, full)
    parameter = torch.full(
        (math.prod(view.shape) * 2 + 7,), 7.0, dtype=DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    )
    order = data.draw(st.permutations(range(view.ndim)))
    offset = data.draw(st.integers(0, 5))
    # The destination: dimensions in another order (a transposed parameter), with a gap after each row (a stack).
    extents = [view.shape[d] for d in order]
    gap = data.draw(st.integers(0, 1)) if view.ndim > 1 and math.prod(extents) else 0
    strides = [0] * view.ndim
    step = 1
    for d, extent in reversed(list(zip(order, extents, strict=True))):
        strides[d] = step
        step *= extent + (gap if step == 1 else 0)
    if offset + step > parameter.numel():
        parameter = torch.full((offset + step,), 7.0, dtype=parameter.dtype)
    expected = parameter.clone()
    expected.as_strided(view.shape, strides, offset).copy_(view)
    target = parameter.as_strided(view.shape, strides, offset)
    copy = recorded(view, target)
    shards = scatter(layout, full)
    rank = data.draw(st.sampled_from(layout.meshes[0].ranks))
    moved = run(layout, [copy], shards, rank)
    assert torch.equal(parameter.view(torch.uint8), expected.view(torch.uint8))
    # A byte moves once: the elements of the view, each read from exactly one rank.
    assert moved == view.numel() * full.element_size()


@CASES
@given(layouts())
def test_pieces_are_what_torch_cuts(layout):
    weight, mesh = layout.weights[0], layout.meshes[0]
    shape = boxed_shape(weight.shape, weight.placements)
    full = torch.arange(math.prod(shape)).view(shape)
    shards = scatter(layout, full.view(weight.shape))
    found = {rank: full.new_empty(0) for rank in mesh.ranks}
    for piece in pieces(weight.shape, mesh, weight.placements):
        at = tuple(slice(s, s + n) for s, n in zip(piece.box.start, piece.box.size, strict=True))
        found.update(dict.fromkeys(piece.ranks, full[at]))
    for rank in mesh.ranks:
        box = local_box(weight.shape, mesh, weight.placements, rank)
        assert box.size == shards[rank].shape
        assert torch.equal(found[rank].flatten(), shards[rank].flatten())


@pytest.mark.parametrize(("extent", "parts"), [(10, 4), (3, 4), (1, 2), (7, 7), (8, 3)])
def test_uneven_shards_are_torch_chunks(extent, parts):
    weight = Weight("w", (extent, 2), "float32", 0, (Shard(0),))
    mesh = Mesh((parts,), tuple(range(parts)))
    chunks = torch.arange(extent).chunk(parts)
    found = {p.ranks[0]: (p.box.start[0], p.box.size[0]) for p in pieces(weight.shape, mesh, weight.placements)}
    assert found == {i: (int(c[0]), len(c)) for i, c in enumerate(chunks)}


@given(st.integers(1, 24), st.integers(1, 5), st.integers(1, 4))
@CASES
def test_strided_shards_that_look_like_fsdp2s_are(size, data, tensor):
    """torch reads `[_StridedShard(0, tensor), Shard(0)]` from left to right, FSDP2 cuts from right to left.

    Uneven parts may differ then, but never on a row of the mesh whose ranks all hold what FSDP2 would have given them.
    """
    mesh, placements = Mesh((data, tensor), tuple(range(data * tensor))), (StridedShard(0), Shard(0))
    rows, _ = _StridedShard(0, split_factor=tensor)._split_tensor(torch.arange(size), data, with_padding=False)
    for at, row in enumerate(rows):
        chunks = [part.tolist() for part in row.chunk(tensor)]
        theirs = [*chunks, *([[]] * (tensor - len(chunks)))]
        boxes = [local_box((size,), mesh, placements, at * tensor + i) for i in range(tensor)]
        ours = [list(range(box.start[0], box.start[0] + box.size[0])) for box in boxes]
        assert ours == theirs or list(map(len, ours)) != list(map(len, theirs))


def whole(shape, address=64, name="w", parameter="p"):
    strides = contiguous_strides(shape)
    return RecordedCopy(name, shape, 0, strides, address, strides, "float32", parameter)


@CASES
@given(layouts())
def test_every_rank_reads_in_its_own_replica(layout):
    weight, mesh = layout.weights[0], layout.meshes[0]
    for rank in mesh.ranks:
        plan = build_plan(layout, [whole(weight.shape)], rank=rank)
        own = replica_of(mesh, weight.placements, rank)
        assert {replica_of(mesh, weight.placements, int(source)) for source in plan.rank} == {own}
        held = local_box(weight.shape, mesh, weight.placements, rank).elements
        assert plan.local_bytes == held * ITEM_SIZE[weight.dtype]


def test_ranks_without_weights_spread_over_the_replicas():
    layout = SourceLayout((Weight("w", (4, 4), "float32", 0, (Replicate(),)),), (Mesh((3,), (0, 1, 2)),))
    plans = [build_plan(layout, [whole((4, 4))], rank=rank) for rank in range(6)]
    assert [set(plan.rank.tolist()) for plan in plans] == [{0}, {1}, {2}, {0}, {1}, {2}]
    assert [plan.local_bytes for plan in plans] == [64, 64, 64, 0, 0, 0]


@CASES
@given(layouts(), st.data())
def test_a_row_of_a_mesh_is_described_over_all_of_it(layout, data):
    """Each rank sees its row of a mesh alone; over the whole mesh all of them give the same description."""
    weight, over = layout.weights[0], layout.meshes[0]
    kept = sorted(data.draw(st.sets(st.integers(0, len(over.shape) - 1), min_size=1)))
    expected = tuple(p if d in kept else Replicate() for d, p in enumerate(weight.placements))
    grid = np.array(over.ranks).reshape(over.shape)
    for rank in over.ranks:
        at = [int(i[0]) for i in np.nonzero(grid == rank)]
        row = grid[tuple(slice(None) if d in kept else i for d, i in enumerate(at))]
        placements = spread(
            Mesh(row.shape, tuple(row.flatten().tolist())), tuple(weight.placements[d] for d in kept), over, rank
        )
        assert placements is not None
        boxes = [local_box(weight.shape, over, p, rank) for p in (placements, expected)]
        assert boxes[0] == boxes[1]
        assert placements == expected or 1 in over.shape
    assert spread(Mesh((2,), (98, 99)), (Replicate(),), over, over.ranks[0]) is None
    assert spread(Mesh((1,), (98,)), (Replicate(),), over, 98) is None


def test_a_row_sharded_weight_is_one_row_of_the_table():
    layout = SourceLayout((Weight("w", (8, 16), "bfloat16", 0, (Shard(0),)),), (Mesh((2,), (0, 1)),))
    plan = build_plan(layout, [whole((8, 16))], rank=0)
    assert len(plan.table) == 2
    assert list(plan.table["rows"]) == [1, 1] and list(plan.table["row_elems"]) == [64, 64]


def test_a_missing_weight_is_named():
    layout = SourceLayout((Weight("w", (4,), "float32", 0, (Shard(0),)),), (Mesh((2,), (0, 1)),))
    with pytest.raises(PlanError, match=r"'other'.*'layer\.bias'.*lacks it"):
        build_plan(layout, [whole((4,), name="other", parameter="layer.bias")], rank=0)


@pytest.mark.parametrize(("sizes", "strides"), [((4, 4), (0, 1)), ((4, 4), (5, 1)), ((9,), (2,))])
def test_elements_that_the_weight_does_not_have_are_refused(sizes, strides):
    layout = SourceLayout((Weight("w", (4, 4), "float32", 0, (Shard(1),)),), (Mesh((2,), (0, 1)),))
    copy = RecordedCopy("w", sizes, 0, strides, 64, contiguous_strides(sizes), "float32", "p")
    with pytest.raises(PlanError, match=r"'p' wants elements of weight 'w' \[4, 4\] that it does not have"):
        build_plan(layout, [copy], rank=0)


def test_binding_new_addresses_moves_only_the_sources():
    layout = SourceLayout((Weight("w", (4, 4), "float32", 0, (Shard(0),)),), (Mesh((2,), (0, 1)),))
    plan = build_plan(layout, [whole((4, 4))], rank=0)
    first = plan.bind({0: np.array([1000], np.uint64), 1: np.array([2000], np.uint64)})
    second = plan.bind({0: np.array([5000], np.uint64), 1: np.array([2000], np.uint64)})
    assert list(second["src"].astype(int) - first["src"].astype(int)) == [4000, 0]
    assert (first["dst"] == second["dst"]).all()


def test_the_first_difference_of_layouts_is_named():
    mesh = Mesh((2,), (0, 1))
    cut = Weight("a", (4, 4), "float32", 0, (Shard(0),))
    whole = Weight("b", (4,), "bfloat16")

    def difference(*weights, mesh=mesh):
        mine = SourceLayout((cut, whole), (Mesh((2,), (0, 1)),))
        return first_difference({3: mine, 5: SourceLayout(weights, (mesh,))})

    assert difference(cut, whole) == ""
    assert difference(whole, cut) == "ranks 3 and 5 have the weights in another order"
    assert difference(cut) == "weight 'b' is bfloat16 [4] on rank 3, and missing on rank 5"
    assert difference(cut, whole, replace(whole, name="c")).startswith("weight 'c' is missing on rank 3, and bfloat16")
    found = difference(cut, whole, mesh=Mesh((2,), (0, 2)))
    shared = "float32 [4, 4] Shard(dim=0) over ranks [0, {}] as [2] on rank {}"
    assert found == f"weight 'a' is {shared.format(1, 3)}, and {shared.format(2, 5)}"
