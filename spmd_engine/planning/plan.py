"""build_plan(source layout, recorded copies) -> TransferPlan: which bytes go from which rank to which address.

A pure function of its arguments: no torch, no device, no communication. A plan covers every element that the
recording asks for exactly once, or `build_plan` raises and names what is missing.

The algebra: a recorded copy reads a strided view of a weight, given by an offset and (size, stride) pairs in elements
of the contiguous global tensor. `views.py` writes each dimension of it as steps along one axis of the weight, and cuts
them axis by axis; the part of the view inside a box is again a strided view, now of the piece's memory.
Example: rows 4 to 7 of a weight [8, 16] begin at element 64 and are (4 rows, stride 16) × (16 elements, stride 1). A
rank that holds rows 6 and 7 has two of them: they begin at element 0 of its piece, with the same strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from spmd_engine.errors import PlanError
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ELEMENT_TYPES, ITEM_SIZE
from spmd_engine.planning.layout import (
    Box,
    Piece,
    Shape,
    SourceLayout,
    Weight,
    boxed_shape,
    contiguous_strides,
    pieces,
    replica_of,
)
from spmd_engine.planning.views import Block, Dim, View, along_axes, clip, coalesce


@dataclass(frozen=True)
class RecordedCopy:
    """One `copy_` that SGLang's loader would make, in elements.

    Attributes:
        weight: name of the source weight.
        sizes: extents of the copied block.
        src_offset, src_strides: the block inside the contiguous global source tensor.
        dst_address: address of the block's first element in the engine.
        dst_strides: the block inside the parameter's memory.
        dst_dtype: dtype of the parameter.
        parameter: name of the parameter, for messages.
    """

    weight: str
    sizes: Shape
    src_offset: int
    src_strides: Shape
    dst_address: int
    dst_strides: Shape
    dst_dtype: str
    parameter: str


@dataclass(frozen=True)
class TransferPlan:
    """A copy table without addresses of the sources, which may change between updates.

    Attributes:
        table: one row of `BLOCK_COPY_DTYPE` a block; `src` holds the offset in bytes inside the source shard.
        rank: global rank of the source of each row.
        weight: index of the weight of each row in the source layout.
        local_bytes, remote_bytes: bytes read from this rank's own shards and from those of others.
    """

    table: np.ndarray
    rank: np.ndarray
    weight: np.ndarray
    local_bytes: int
    remote_bytes: int

    def bind(self, addresses: dict[int, np.ndarray]) -> np.ndarray:
        """The table with source addresses filled in.

        Args:
            addresses: for each source rank, the address of its shard of every weight of the layout.
        """
        table = self.table.copy()
        for rank in np.unique(self.rank):
            rows = self.rank == rank
            table["src"][rows] += addresses[int(rank)][self.weight[rows]]
        return table


def build_plan(
    layout: SourceLayout,
    copies: Iterable[RecordedCopy],
    *,
    rank: int,
    nodes: Mapping[int, int] | None = None,
) -> TransferPlan:
    """Cut recorded copies along the pieces that ranks hold.

    Args:
        layout: what the trainer holds.
        copies: what the engine of `rank` wants.
        rank: the global rank that copies. It reads in the replica of the weights that it belongs to, where it may hold
            a piece itself, so that ranks of all replicas together read all of them alike. A rank that holds no weights
            reads in the replica that its number gives.
        nodes: number of the node of every rank; None if all are on one. Holders on the own node come first. All ranks
            of a node choose the same holder on another one, so that a byte needs to come only once: that in the
            replica of the lowest of them, as ranks of one replica tend to be neighbours.

    Raises:
        PlanError: a weight is missing, or a box of it is held by no rank.
    """
    index = {weight.name: i for i, weight in enumerate(layout.weights)}
    held: dict[int, list[_Held]] = {}
    nodes = nodes or {}
    leader = min((other for other, node in nodes.items() if node == nodes.get(rank)), default=rank)
    rows: list[tuple[int, ...]] = []
    sources: list[int] = []
    weights: list[int] = []
    for copy in copies:
        number = index.get(copy.weight)
        if number is None:
            raise PlanError(f"the engine wants weight {copy.weight!r} for {copy.parameter!r}, but the source lacks it")
        weight = layout.weights[number]
        last = _check_view(copy, weight)
        if number not in held:
            held[number] = _held_pieces(weight, layout, rank, leader, nodes)
        want = math.prod(copy.sizes)
        found = 0
        for piece in held[number]:
            if piece.last < copy.src_offset or last < piece.first:
                continue  # most of them, where experts are stacked
            for offset, block in _intersect(copy, piece):
                for row in _rows(copy, weight, offset, block):
                    rows.append(row)
                    sources.append(piece.source)
                    weights.append(number)
                found += math.prod(dim.size for dim in block)
        if found != want:
            raise PlanError(
                f"weight {copy.weight!r} {list(weight.shape)}: {want - found} of the {want} elements that parameter "
                f"{copy.parameter!r} needs are held by no rank of {_holders(weight, layout)}"
            )
    table = np.array(rows, dtype=BLOCK_COPY_DTYPE) if rows else np.zeros(0, BLOCK_COPY_DTYPE)
    ranks = np.array(sources, dtype=np.int64)
    sizes = np.array([ITEM_SIZE[layout.weights[i].dtype] for i in weights], dtype=np.int64)
    moved = table["rows"].astype(np.int64) * table["row_elems"].astype(np.int64) * sizes
    local = int(moved[ranks == rank].sum())
    return TransferPlan(table, ranks, np.array(weights, dtype=np.int64), local, int(moved.sum()) - local)


@dataclass(frozen=True)
class _Held:
    """A piece of a weight as the planner walks it.

    Attributes:
        source: the rank that it is read from.
        first, last: its first and last element, numbered in the flattened weight.
        axes: (extent, low, high) of the weight's merged axes; see `_merge_axes`.
        strides: of those axes in the piece's own memory.
    """

    source: int
    first: int
    last: int
    axes: list[tuple[int, int, int]]
    strides: list[int]


def _held_pieces(weight: Weight, layout: SourceLayout, rank: int, leader: int, nodes: Mapping[int, int]) -> list[_Held]:
    """All pieces of a weight, and for each the rank that `rank` reads it from."""
    shape = boxed_shape(weight.shape, weight.placements)
    everywhere: Sequence[Piece] = (Piece(Box((0,) * len(weight.shape), weight.shape), (rank,)),)
    replica = far = 0
    if weight.mesh >= 0:
        mesh = layout.meshes[weight.mesh]
        everywhere = pieces(weight.shape, mesh, weight.placements)
        replica, far = (replica_of(mesh, weight.placements, reader) for reader in (rank, leader))
    found = []
    for piece in everywhere:
        axes, cuts = _merge_axes(shape, piece.box)
        steps = contiguous_strides(tuple(extent for extent, _, _ in axes))
        first = sum(low * step for (_, low, _), step in zip(axes, steps, strict=True))
        last = sum((high - 1) * step for (_, _, high), step in zip(axes, steps, strict=True))
        source = nearest(piece.ranks, rank, replica, far, nodes)
        found.append(_Held(source, first, last, axes, _axis_strides(piece, cuts)))
    return found


def numbered(nodes: Mapping[int, str]) -> dict[int, int]:
    """The nodes of ranks as numbers, the same on all ranks."""
    order = list(dict.fromkeys(nodes.values()))
    return {rank: order.index(node) for rank, node in nodes.items()}


def nearest(holders: Sequence[int], rank: int, replica: int, far: int, nodes: Mapping[int, int]) -> int:
    """The holder of a piece that `rank` reads it from.

    Args:
        holders: one for each replica.
        replica, far: numbers of the replicas that `rank` and the leader of its node belong to, from `replica_of`.
        nodes: as for `build_plan`.
    """
    node = nodes.get(rank, 0)
    if not any(nodes.get(holder, 0) == node for holder in holders):
        return holders[far % len(holders)]
    chosen = holders[replica % len(holders)]
    if nodes.get(chosen, 0) == node:
        return chosen
    here = [holder for holder in holders if nodes.get(holder, 0) == node]
    return here[replica % len(here)]


def _holders(weight: Weight, layout: SourceLayout) -> str:
    return "this rank" if weight.mesh < 0 else f"the mesh {list(layout.meshes[weight.mesh].ranks)}"


def _intersect(copy: RecordedCopy, piece: _Held) -> list[Block]:
    """The parts of a recorded copy inside a piece."""
    axes, local = piece.axes, piece.strides
    found: list[Block] = []
    for view in along_axes(View(copy.sizes, copy.src_offset, copy.src_strides, 0, copy.dst_strides), axes):
        parts: list[Block] = [((0, view.dst_offset), [])]
        for axis, (_, low, high) in enumerate(axes):
            dims = [Dim(size, step, step * local[axis], dst) for size, step, dst in view.along[axis]]
            clipped = clip(dims, low - view.origin[axis], high - view.origin[axis])
            base = (view.origin[axis] - low) * local[axis]
            parts = [((src + base + s, dst + d), block + sub) for (src, dst), block in parts for (s, d), sub in clipped]
        found += parts
    return found


def _merge_axes(shape: Shape, box: Box) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Axes (extent, low, high) of the weight as the piece sees it, and which dimensions each of them merges.

    Dimensions that the piece holds whole are merged into the one before them: a `Shard(0)` piece is an interval of
    the flattened weight, whatever its rank.
    """
    axes: list[tuple[int, int, int]] = []
    cuts: list[tuple[int, int]] = []
    for d, extent in enumerate(shape):
        low, high = box.start[d], box.start[d] + box.size[d]
        if axes and low == 0 and high == extent:
            e, lo, hi = axes[-1]
            axes[-1] = (e * extent, lo * extent, hi * extent)
            cuts[-1] = (cuts[-1][0], d + 1)
        else:
            axes.append((extent, low, high))
            cuts.append((d, d + 1))
    if not axes:
        axes, cuts = [(1, 0, 1)], [(0, 0)]
    return axes, cuts


def _axis_strides(piece: Piece, cuts: list[tuple[int, int]]) -> list[int]:
    """Stride of each merged axis in the piece's own memory."""
    strides = contiguous_strides(piece.box.size)
    return [strides[last - 1] if last else 1 for _, last in cuts]


def _check_view(copy: RecordedCopy, weight: Weight) -> int:
    """The number, in the flattened weight, of the last element that `copy` wants.

    Raises:
        PlanError: the weight does not have all of them, or they are not different ones.
    """
    last = copy.src_offset + sum((n - 1) * s for n, s in zip(copy.sizes, copy.src_strides, strict=True))
    if last >= math.prod(weight.shape) or any(
        s <= 0 < n - 1 for n, s in zip(copy.sizes, copy.src_strides, strict=True)
    ):
        raise PlanError(
            f"parameter {copy.parameter!r} wants elements of weight {copy.weight!r} {list(weight.shape)} that it does "
            f"not have, or wants one several times: sizes {copy.sizes}, strides {copy.src_strides}, "
            f"offset {copy.src_offset}"
        )
    return last


def _rows(copy: RecordedCopy, weight: Weight, offset: tuple[int, int], block: list[Dim]) -> list[tuple[int, ...]]:
    """Rows of the copy table for one block: two dimensions each, further ones written out."""
    src_item, dst_item = ITEM_SIZE[weight.dtype], ITEM_SIZE[copy.dst_dtype]
    types = int(ELEMENT_TYPES[weight.dtype]), int(ELEMENT_TYPES[copy.dst_dtype])
    dims = coalesce(block)
    row = dims.pop() if dims and dims[-1].src == 1 and dims[-1].dst == 1 else Dim(1, 1, 1, 1)
    # The largest of the other dimensions becomes the pitch, so that fewest are written out.
    pitch = max(dims, key=lambda dim: dim.size, default=Dim(1, 1, 0, 0))
    outer = [dim for dim in dims if dim is not pitch]
    rows: list[tuple[int, ...]] = []
    for at in product(*(range(dim.size) for dim in outer)):
        src = offset[0] + sum(i * dim.src for i, dim in zip(at, outer, strict=True))
        dst = offset[1] + sum(i * dim.dst for i, dim in zip(at, outer, strict=True))
        rows.append(
            (
                src * src_item,
                copy.dst_address + dst * dst_item,
                pitch.size,
                row.size,
                pitch.src * src_item,
                pitch.dst * dst_item,
                0,
                *types,
            )
        )
    return rows
