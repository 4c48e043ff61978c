"""Counts the bytes that one weight makes every rank read, by sets of elements, without a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import Box, Piece, SourceLayout, Weight, pieces, replica_of
from spmd_engine.planning.plan import nearest
from spmd_engine.planning.read_sets import ReadSet, count, unite


@dataclass(frozen=True)
class Cluster:
    """All ranks by their place in `ranks`: the number of each one's node, of what it reads (`kind`), and where its
    shards are. The last kind reads nothing."""

    ranks: tuple[int, ...]
    node: np.ndarray
    kind: np.ndarray
    is_off_loaded: np.ndarray

    @cached_property
    def place(self) -> dict[int, int]:
        return {rank: i for i, rank in enumerate(self.ranks)}

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The places of the ranks of each node."""
        return [np.flatnonzero(self.node == n) for n in range(int(self.node.max()) + 1)]


@dataclass
class Moved:
    """Bytes that one weight, or several, make ranks read; see PlanReport."""

    matrix: np.ndarray
    network: np.ndarray
    repeated: np.ndarray
    written: np.ndarray

    @classmethod
    def none(cls, cluster: Cluster) -> Moved:
        ranks, nodes = len(cluster.ranks), len(cluster.members)
        shapes = ((ranks, ranks), (nodes, nodes), (nodes,), (ranks,))
        return cls(*(np.zeros(shape, dtype=np.int64) for shape in shapes))

    def add(self, other: Moved, *, times: int) -> None:
        for name, value in vars(self).items():
            value += times * getattr(other, name)

    def by_link(self, cluster: Cluster) -> list[int]:
        links = {
            name: int(m.sum()) for name, m in split_by_link(self.matrix, cluster.node, cluster.is_off_loaded).items()
        }
        repeated = int(self.repeated.sum())
        return [links["local"], links["nvlink"] + repeated, links["staged"], links["network"] - repeated]


def split_by_link(matrix: np.ndarray, node: np.ndarray, is_off_loaded: np.ndarray) -> dict[str, np.ndarray]:
    """The matrix of ranks taken apart by what its bytes go over."""
    near = node[:, None] == node[None, :]
    own = np.eye(len(node), dtype=bool)
    return {
        "local": np.where(own & ~is_off_loaded, matrix, 0),
        "nvlink": np.where(near & ~own & ~is_off_loaded, matrix, 0),
        "staged": np.where(near & is_off_loaded, matrix, 0),
        "network": np.where(near, 0, matrix),
    }


def count_moved(weight: Weight, layout: SourceLayout, wants: list[ReadSet | None], cluster: Cluster) -> Moved:
    """What one weight makes all ranks read."""
    moved, item = Moved.none(cluster), ITEM_SIZE[weight.dtype]
    none = ReadSet((), 0)
    full = [want or none for want in wants] + [none]
    moved.written[:] = np.array([want.written for want in full], dtype=np.int64)[cluster.kind]
    if weight.mesh >= 0:
        held = pieces(weight.shape, layout.meshes[weight.mesh], weight.placements)
        holders = np.array([[cluster.place[rank] for rank in piece.ranks] for piece in held])  # [piece, replica]
        sources = _sources(weight, layout, holders, cluster) if held else holders  # [rank or one for all, piece]
    else:
        held = (Piece(Box((0,) * len(weight.shape), weight.shape), cluster.ranks),)
        holders = np.arange(len(cluster.ranks))[None, :]
        sources = holders.T
    if not held:
        return moved
    boxes = [piece.box for piece in held]
    elements = np.stack([count(want.parts, boxes, weight.shape) for want in full])  # [kind, piece]
    # What the engine has in fewer bytes is cast before it travels, but not before it is read in place.
    packed = np.array([min(item, w.written // max(1, int(n.sum()))) for w, n in zip(full, elements, strict=True)])
    in_place = (cluster.node[:, None] == cluster.node[None, :]) & ~cluster.is_off_loaded
    if len(sources) == 1:
        each = np.where(in_place[:, sources[0]], item, packed[cluster.kind][:, None])
        moved.matrix[:, sources[0]] += elements[cluster.kind] * each
    else:
        for at, kind in enumerate(cluster.kind):
            each = np.where(in_place[at, sources[at]], item, packed[kind])
            np.add.at(moved.matrix[at], sources[at], elements[kind] * each)

    shared: dict[frozenset[int], np.ndarray] = {}  # what the ranks of a node want together, by their kinds
    for number, members in enumerate(cluster.members):
        far = ~(cluster.node[holders] == number).any(axis=1)
        if not far.any() or not members.size:
            continue
        wanting = frozenset(cluster.kind[members].tolist())
        if wanting not in shared:
            size = max(packed[k] for k in wanting)
            shared[wanting] = count(unite(full[k] for k in wanting), boxes, weight.shape) * size
        once = np.where(far, shared[wanting], 0)
        np.add.at(moved.network[number], cluster.node[sources[members[0] if len(sources) > 1 else 0]], once)
        kinds = cluster.kind[members]
        moved.repeated[number] = int((elements[kinds][:, far] * packed[kinds][:, None]).sum() - once.sum())
    return moved


def _sources(weight: Weight, layout: SourceLayout, holders: np.ndarray, cluster: Cluster) -> np.ndarray:
    """The place of the rank that each rank reads each piece from; one line if that is the same for all."""
    if holders.shape[1] == 1:
        return holders.T
    mesh = layout.meshes[weight.mesh]
    lines: dict[tuple[int, int], np.ndarray] = {}  # by replica and node: what `nearest` looks at
    node = dict(enumerate(cluster.node.tolist()))
    found = np.empty((len(cluster.ranks), len(holders)), dtype=np.int64)
    for at, rank in enumerate(cluster.ranks):
        replica = replica_of(mesh, weight.placements, rank)
        key = (replica, node[at])
        if key not in lines:
            far = replica_of(mesh, weight.placements, cluster.ranks[cluster.members[node[at]][0]])
            lines[key] = np.array([nearest(line, at, replica, far, node) for line in holders.tolist()])
        found[at] = lines[key]
    return found
