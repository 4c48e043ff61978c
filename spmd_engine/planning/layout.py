"""Where the elements of a weight lie: global shapes, boxes and meshes. Pure Python, no torch, no devices.

A source layout names, for every weight, its global shape and how a mesh of ranks shares it, not each rank's piece;
the pieces follow from the placements, and `pieces` works them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any

import msgspec

Shape = tuple[int, ...]


class Shard(msgspec.Struct, frozen=True, tag=True):
    """Dimension `dim` is cut along this mesh dimension as torch.chunk cuts it: late ranks may have less, or nothing."""

    dim: int


class StridedShard(msgspec.Struct, frozen=True, tag=True):
    """Like `Shard`, but cut after all later mesh dimensions have cut theirs, as FSDP2 cuts what is tensor-parallel.

    It is torch's `_StridedShard(dim, split_factor)` where `split_factor` is the number of parts that the later mesh
    dimensions make of `dim`.
    """

    dim: int


class FlatShard(msgspec.Struct, frozen=True, tag=True):
    """The weight is a part of a flat buffer that is cut into equal chunks along this mesh dimension, as FSDP1 does it.

    Every rank holds an interval of the flattened weight, or nothing. The other mesh dimensions can only replicate.

    Attributes:
        offset: where the weight starts in the buffer, elements.
        chunk: elements of one chunk; paddings are counted like everything else.
    """

    offset: int
    chunk: int


class Replicate(msgspec.Struct, frozen=True, tag=True):
    """Every rank along this mesh dimension has all of it."""


Placement = Shard | StridedShard | FlatShard | Replicate


@dataclass(frozen=True)
class Mesh:
    """Ranks that share weights.

    Attributes:
        shape: extents of the mesh dimensions.
        ranks: global ranks in row-major order of `shape`.
    """

    shape: Shape
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangular part of a weight: `start[d] <= index[d] < start[d] + size[d]`."""

    start: Shape
    size: Shape

    @property
    def elements(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Weight:
    """One weight of the trainer.

    Attributes:
        name: its Hugging Face name.
        shape: global shape.
        dtype: one of `dtypes.ELEMENT_TYPES`.
        mesh: index into `SourceLayout.meshes`, or -1: every rank has all of it in its own memory.
        placements: one for each dimension of that mesh.
    """

    name: str
    shape: Shape
    dtype: str
    mesh: int = -1
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True)
class SourceLayout:
    """What the ranks of a trainer hold, the same description on all of them.

    Attributes:
        weights: in the order in which the ranks list the addresses of their shards.
        meshes: the meshes that weights refer to.
    """

    weights: tuple[Weight, ...]
    meshes: tuple[Mesh, ...]

    def names(self) -> list[str]:
        """The names of the weights, in their order."""
        return [weight.name for weight in self.weights]

    def ranks(self) -> tuple[int, ...]:
        """All ranks that hold a shard of something, ascending."""
        return tuple(sorted({rank for mesh in self.meshes for rank in mesh.ranks}))

    def plain(self) -> list[list[Any]]:
        """As values that JSON has: for each weight its name, dtype, shape, and how it is shared."""
        shared = [f"over ranks {list(mesh.ranks)} as {list(mesh.shape)}" for mesh in self.meshes]
        return [
            [w.name, w.dtype, list(w.shape), [repr(p) for p in w.placements], shared[w.mesh] if w.mesh >= 0 else ""]
            for w in self.weights
        ]


def first_difference(layouts: Mapping[int, SourceLayout]) -> str:
    """The first weight that ranks do not have alike, and how they have it; "" if there is none.

    Args:
        layouts: by rank.
    """
    plains = {rank: layout.plain() for rank, layout in layouts.items()}
    (first, expected), *others = ((rank, {name: how for name, *how in plain}) for rank, plain in plains.items())
    for rank, found in others:
        for name in [*expected, *found]:
            if (one := expected.get(name)) != (other := found.get(name)):
                return f"weight {name!r} is {_how(one)} on rank {first}, and {_how(other)} on rank {rank}"
        if list(expected) != list(found):
            return f"ranks {first} and {rank} have the weights in another order"
    return ""


def _how(described: list[Any] | None) -> str:
    if described is None:
        return "missing"
    dtype, shape, placements, shared = described
    return " ".join(filter(None, [dtype, str(shape), ", ".join(placements), shared]))


@dataclass(frozen=True)
class Piece:
    """A box of a weight and the ranks that hold it, each as one contiguous tensor of the box's size.

    The box has the dimensions of `boxed_shape`. There is one rank for each replica that the mesh has, in their order.
    """

    box: Box
    ranks: tuple[int, ...]


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """Start and size of part `index` when torch.chunk cuts `extent` into `parts`."""
    size = -(-extent // parts)
    start = min(extent, size * index)
    return start, min(extent, start + size) - start


def boxed_shape(shape: Shape, placements: tuple[Placement, ...]) -> Shape:
    """The shape whose boxes the ranks hold: a weight's own, or that of the flattened weight."""
    return (math.prod(shape),) if any(isinstance(p, FlatShard) for p in placements) else shape


@lru_cache(maxsize=65536)
def pieces(shape: Shape, mesh: Mesh, placements: tuple[Placement, ...]) -> tuple[Piece, ...]:
    """The pieces that the ranks of `mesh` hold, without empty ones."""
    holders: dict[Box, list[int]] = {}
    for rank, coordinates in zip(mesh.ranks, product(*(range(n) for n in mesh.shape)), strict=True):
        box = _box(shape, mesh, placements, coordinates)
        if box.elements:
            holders.setdefault(box, []).append(rank)
    return tuple(Piece(box, tuple(ranks)) for box, ranks in holders.items())


def local_box(shape: Shape, mesh: Mesh, placements: tuple[Placement, ...], rank: int) -> Box:
    """The box that `rank` holds; with a zero extent if it holds nothing."""
    if rank not in mesh.ranks:
        nothing = (0,) * len(boxed_shape(shape, placements))
        return Box(nothing, nothing)
    return _box(shape, mesh, placements, _coordinates(mesh, rank))


def _box(shape: Shape, mesh: Mesh, placements: tuple[Placement, ...], coordinates: Shape) -> Box:
    """Placements apply one after the other: a dimension that is sharded twice is cut twice."""
    whole = boxed_shape(shape, placements)
    start, size = [0] * len(whole), list(whole)
    for d in _order(placements):
        placement, extent, index = placements[d], mesh.shape[d], coordinates[d]
        if isinstance(placement, (Shard, StridedShard)):
            begin, length = chunk(size[placement.dim], extent, index)
            start[placement.dim] += begin
            size[placement.dim] = length
        elif isinstance(placement, FlatShard):
            first = index * placement.chunk - placement.offset
            begin, end = (min(max(at, 0), whole[0]) for at in (first, first + placement.chunk))
            start[0], size[0] = begin, end - begin
    return Box(tuple(start), tuple(size))


def _order(placements: tuple[Placement, ...]) -> list[int]:
    """Mesh dimensions in the order in which their placements apply: from the first, but strided ones afterwards."""
    order: list[int] = []
    for d in reversed(range(len(placements))):
        order.insert(len(order) if isinstance(placements[d], StridedShard) else 0, d)
    return order


def replica_of(mesh: Mesh, placements: tuple[Placement, ...], rank: int) -> int:
    """Number of the replica that `rank` belongs to, among those that the mesh has; for a rank outside any number."""
    if rank not in mesh.ranks:
        return rank
    replica = 0
    for placement, extent, index in zip(placements, mesh.shape, _coordinates(mesh, rank), strict=True):
        if isinstance(placement, Replicate):
            replica = replica * extent + index
    return replica


def spread(mesh: Mesh, placements: tuple[Placement, ...], over: Mesh, rank: int) -> tuple[Placement, ...] | None:
    """The placements over a larger mesh of a weight whose own mesh is one row of it, replicated along the others.

    Args:
        mesh, placements: of the weight, as `rank` sees it.
        over: the larger mesh.
        rank: the rank that sees it so.

    Returns:
        None if `mesh` is not the part of `over` along some of its dimensions that `rank` is in.
    """
    if rank not in over.ranks:
        return None
    here, strides = _coordinates(over, rank), contiguous_strides(over.shape)
    for kept in combinations(range(len(over.shape)), len(mesh.shape)):
        free = [range(n) if d in kept else (here[d],) for d, n in enumerate(over.shape)]
        part = [over.ranks[sum(i * s for i, s in zip(at, strides, strict=True))] for at in product(*free)]
        if tuple(part) == mesh.ranks and tuple(over.shape[d] for d in kept) == mesh.shape:
            along = dict(zip(kept, placements, strict=True))
            return tuple(along.get(d, Replicate()) for d in range(len(over.shape)))
    return None


def _coordinates(mesh: Mesh, rank: int) -> Shape:
    number = mesh.ranks.index(rank)
    return tuple(number // stride % n for stride, n in zip(contiguous_strides(mesh.shape), mesh.shape, strict=True))
