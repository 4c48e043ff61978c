"""What a weight update moves, and how long it must take at least: counted from layouts, without moving anything.

Each byte that a rank reads is one of four kinds: *local* (its own shard), *NVLink* (from another rank of its node),
*staged* (from CPU memory of its node, where the engine computes on a GPU), or *network* (from another node). What
several ranks of a node want of another node crosses the network once, and goes to the others over NVLink.

The count follows the planner (`plan.nearest`), but shares no other code with it: it works with sets of elements, so
that layers and experts which are laid out alike are counted once and multiplied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from spmd_engine.errors import ConfigError
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import Box, Piece, SourceLayout, Weight, pieces, replica_of
from spmd_engine.planning.plan import nearest
from spmd_engine.planning.read_sets import ReadSet, count, unite

LINKS = ("local", "nvlink", "staged", "network")
_MATRIX_SHOWN = 16
_NAMES_SHOWN = 3
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class LinkSpeeds:
    """Bytes per second that links carry. The defaults are those of H200s.

    Attributes:
        hbm: a copy inside a GPU's memory, a byte that is read and written counted once (measured, BENCHMARKS.md).
        nvlink: of one GPU, in each direction (measured with the copy engine, BENCHMARKS.md).
        host: from CPU memory to one GPU (nominal: PCIe 5.0 x16).
        network: of one node, in each direction (nominal: 8 adapters of 400 Gbit/s).
    """

    hbm: float = 2130e9
    nvlink: float = 397e9
    host: float = 63e9
    network: float = 400e9


@dataclass(frozen=True)
class WeightClass:
    """Weights whose names differ in numbers alone, and the bytes that all ranks together read of them.

    Attributes:
        name: with `*` for the numbers of layers and experts.
        weights: how many there are.
        local, nvlink, staged, network: bytes, each in one of them.
    """

    name: str
    weights: int
    local: int
    nvlink: int
    staged: int
    network: int


@dataclass(frozen=True, eq=False)
class PlanReport:
    """What one update moves.

    Attributes:
        ranks: global ranks that read or hold something, ascending.
        nodes: number of the node of each of them.
        classes: by name.
        matrix: `matrix[i, j]` are the bytes that `ranks[i]` reads of the shards of `ranks[j]`. What is staged or comes
            over the network is counted in the engine's dtype if that is smaller: it is cast before it travels.
        network: `network[m, n]` are the bytes that go from node n to node m, once a node.
        repeated: for each node the bytes that came once over the network and go to more of its ranks over NVLink.
        written: for each rank the bytes that it writes into the engine's parameters.
        off_loaded: ranks whose shards are in CPU memory while the engine computes on GPUs.
        fallback: weights that take the model's own loader, whole, and why.
        speeds: what `floors` reckons with.
    """

    ranks: tuple[int, ...]
    nodes: tuple[int, ...]
    classes: tuple[WeightClass, ...]
    matrix: np.ndarray = field(repr=False)
    network: np.ndarray = field(repr=False)
    repeated: np.ndarray = field(repr=False)
    written: np.ndarray = field(repr=False)
    off_loaded: frozenset[int]
    fallback: Mapping[str, str]
    speeds: LinkSpeeds

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of each kind, all ranks together."""
        return {link: sum(getattr(each, link) for each in self.classes) for link in LINKS}

    def bytes_of(self, rank: int) -> dict[str, int]:
        """Bytes of each kind that `rank` reads; those of other nodes as if it were alone on its own.

        Raises:
            KeyError: `rank` neither reads nor holds anything.
        """
        at = {r: i for i, r in enumerate(self.ranks)}[rank]
        return {link: int(self._links[link][at].sum()) for link in LINKS}

    @cached_property
    def _links(self) -> dict[str, np.ndarray]:
        return _by_link(self.matrix, np.array(self.nodes), self._is_off_loaded)

    @property
    def _is_off_loaded(self) -> np.ndarray:
        return np.array([rank in self.off_loaded for rank in self.ranks])

    @cached_property
    def floors(self) -> dict[str, float]:
        """Seconds that an update takes at least, by what limits it: "hbm", "nvlink", "staged" and "network".

        A GPU's memory carries what its rank reads of its own shard, what the others of its node read of it, and what it
        writes; NVLink of a GPU what it takes in and gives out, and of a node its share of `repeated`.
        """
        links, speeds, node = self._links, self.speeds, np.array(self.nodes)
        own, peers = links["local"], links["nvlink"]
        hbm = (own.sum(axis=1) + peers.sum(axis=0) + self.written) / 2
        sizes = np.maximum(np.bincount(node), 1)
        shared = (np.bincount(node, peers.sum(axis=1)) + self.repeated) / sizes
        nvlink = max(peers.sum(axis=1).max(), peers.sum(axis=0).max(), shared.max())
        return {
            "hbm": float(hbm.max()) / speeds.hbm,
            "nvlink": float(nvlink) / speeds.nvlink,
            "staged": float(links["staged"].sum(axis=1).max()) / speeds.host,
            "network": float(max(self.network.sum(axis=1).max(), self.network.sum(axis=0).max())) / speeds.network,
        }

    @property
    def floor_s(self) -> float:
        """Seconds that an update takes at least, with all links at work at the same time."""
        return max(self.floors.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as values that JSON has; the matrix of ranks only if there are at most 64."""
        return {
            "ranks": list(self.ranks),
            "nodes": list(self.nodes),
            "bytes": self.bytes,
            "classes": [vars(each) for each in self.classes],
            "matrix": self.matrix.tolist() if len(self.ranks) <= 64 else None,
            "network": self.network.tolist(),
            "repeated": self.repeated.tolist(),
            "written": self.written.tolist(),
            "off_loaded": sorted(self.off_loaded),
            "fallback": dict(self.fallback),
            "speeds": vars(self.speeds),
            "floors_s": self.floors,
            "floor_s": self.floor_s,
        }

    def save_heat_map(self, path: str | os.PathLike[str]) -> None:
        """Draw `matrix` as a PNG: who reads how much from whom.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(f"a heat map needs matplotlib: pip install matplotlib ({error})") from error
        figure = Figure(figsize=(7, 6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        unit, scale = _unit(int(self.matrix.max(initial=0)))
        image = axes.imshow(np.where(self.matrix > 0, self.matrix / scale, np.nan), vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=axes, label=unit)
        axes.set_xlabel("source rank")
        axes.set_ylabel("reading rank")
        axes.set_title(f"floor {self.floor_s * 1e3:.4g} ms", fontsize=10)
        if len(self.ranks) <= _MATRIX_SHOWN:
            axes.set_xticks(range(len(self.ranks)), [str(rank) for rank in self.ranks])
            axes.set_yticks(range(len(self.ranks)), [str(rank) for rank in self.ranks])
        for edge in np.flatnonzero(np.diff(self.nodes)) + 0.5:
            axes.axhline(edge, color="white", linewidth=0.5)
            axes.axvline(edge, color="white", linewidth=0.5)
        figure.savefig(path, dpi=130, format="png")

    def __str__(self) -> str:
        unit, scale = _unit(max(self.bytes.values(), default=0))
        nodes = len(self.network)
        where = f"{len(self.ranks)} ranks on {nodes} node{'s' if nodes > 1 else ''}"
        lines = [f"{where}; what all of them together read, {unit}"]
        width = max(len(each.name) for each in self.classes)
        lines.append(f"\n{'weights':{width}}{'':8}" + "".join(f"{link:>12}" for link in LINKS))
        for each in self.classes:
            values = "".join(_cell(getattr(each, link) / scale) for link in LINKS)
            lines.append(f"{each.name:{width}} ×{each.weights:<6}{values}")
        weights = sum(each.weights for each in self.classes)
        values = "".join(_cell(total / scale) for total in self.bytes.values())
        lines.append(f"{'all':{width}} ×{weights:<6}{values}")
        lines += [*self._fallback_lines(), *self._matrix_lines(), ""]
        speeds = {"hbm": self.speeds.hbm, "nvlink": self.speeds.nvlink, "staged": self.speeds.host}
        speeds["network"] = self.speeds.network
        for link, seconds in self.floors.items():
            per = "a node" if link == "network" else "a GPU"
            lines.append(f"{link:8}{seconds * 1e3:12.3f} ms at {speeds[link] / 1e9:.0f} GB/s {per}")
        lines.append(f"{'floor':8}{self.floor_s * 1e3:12.3f} ms: the slowest of these, all at the same time")
        return "\n".join(lines)

    def _fallback_lines(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for name, reason in sorted(self.fallback.items()):
            by_reason.setdefault(reason, []).append(name)
        lines = []
        for reason, names in by_reason.items():
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
            lines.append(f"\n{len(names)} weights take the model's own loader, whole: {reason}\n  {shown}")
        return lines

    def _matrix_lines(self) -> list[str]:
        """Rank by rank, or node by node, as far as it fits on a screen."""
        matrix, labels, what = self.matrix, list(self.ranks), "rank"
        if len(labels) > _MATRIX_SHOWN:
            matrix, labels, what = self.network, list(range(len(self.network))), "node"
        if len(labels) > _MATRIX_SHOWN or not matrix.any():
            return []
        unit, scale = _unit(int(matrix.max()))
        lines = [f"\n{unit} that each {what} (line) reads from each (column)"]
        lines.append(" " * 6 + "".join(f"{label:>10}" for label in labels))
        for label, row in zip(labels, matrix, strict=True):
            lines.append(f"{label:6}" + "".join(_cell(value / scale, 10) for value in row))
        return lines


def make_report(
    layout: SourceLayout,
    readers: Mapping[int, Mapping[str, ReadSet]],
    *,
    nodes: Mapping[int, int],
    speeds: LinkSpeeds,
    off_loaded: frozenset[int] = frozenset(),
    fallback: Mapping[str, str] | None = None,
) -> PlanReport:
    """Count what an update moves.

    Args:
        layout: what the trainer holds.
        readers: for each rank of an engine what it reads of each weight. Ranks that read the same share one mapping,
            and weights that are read alike share one `ReadSet`: both are then counted once.
        nodes: number of the node of every rank, from 0.
        speeds: for the floors.
        off_loaded: ranks whose shards are in CPU memory while the engine computes on GPUs.
        fallback: weights that take the model's own loader, and why.
    """
    ranks = tuple(sorted({*readers, *layout.ranks()}))
    node = np.array([nodes[rank] for rank in ranks], dtype=np.int64)
    mappings = {id(mapping): mapping for mapping in readers.values()}
    kinds = {key: number for number, key in enumerate(mappings)}
    kind = np.array([kinds[id(readers[rank])] if rank in readers else len(kinds) for rank in ranks], dtype=np.int64)
    cluster = _Cluster(ranks, node, kind, np.array([rank in off_loaded for rank in ranks]))
    columns = list(mappings.values())

    identical: dict[tuple[Any, ...], tuple[Weight, list[ReadSet | None], dict[str, int]]] = {}
    interned: dict[ReadSet, int] = {}
    known: dict[int, int] = {}  # by the identity of a ReadSet, to hash each once
    for weight in layout.weights:
        wants = [mapping.get(weight.name) for mapping in columns]
        for want in wants:
            if want is not None and id(want) not in known:
                known[id(want)] = interned.setdefault(want, len(interned))
        key = (weight.shape, weight.dtype, weight.mesh, weight.placements, *(w and known[id(w)] for w in wants))
        _, _, names = identical.setdefault(key, (weight, wants, {}))
        name = _NUMBER.sub("*", weight.name)
        names[name] = names.get(name, 0) + 1

    total = _Moved.none(cluster)
    classes: dict[str, np.ndarray] = {}
    for weight, wants, names in identical.values():
        moved = _moved(weight, layout, wants, cluster)
        for name, times in names.items():
            entry = classes.setdefault(name, np.zeros(1 + len(LINKS), dtype=np.int64))
            entry += times * np.array([1, *moved.by_link(cluster)])
        total.add(moved, times=sum(names.values()))
    return PlanReport(
        ranks=ranks,
        nodes=tuple(node.tolist()),
        classes=tuple(WeightClass(name, *map(int, entry)) for name, entry in sorted(classes.items())),
        matrix=total.matrix,
        network=total.network,
        repeated=total.repeated,
        written=total.written,
        off_loaded=off_loaded,
        fallback=dict(fallback or {}),
        speeds=speeds,
    )


@dataclass(frozen=True)
class _Cluster:
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
class _Moved:
    """Bytes that one weight, or several, make ranks read; see PlanReport."""

    matrix: np.ndarray
    network: np.ndarray
    repeated: np.ndarray
    written: np.ndarray

    @classmethod
    def none(cls, cluster: _Cluster) -> _Moved:
        ranks, nodes = len(cluster.ranks), len(cluster.members)
        shapes = ((ranks, ranks), (nodes, nodes), (nodes,), (ranks,))
        return cls(*(np.zeros(shape, dtype=np.int64) for shape in shapes))

    def add(self, other: _Moved, *, times: int) -> None:
        for name, value in vars(self).items():
            value += times * getattr(other, name)

    def by_link(self, cluster: _Cluster) -> list[int]:
        links = {name: int(m.sum()) for name, m in _by_link(self.matrix, cluster.node, cluster.is_off_loaded).items()}
        repeated = int(self.repeated.sum())
        return [links["local"], links["nvlink"] + repeated, links["staged"], links["network"] - repeated]


def _by_link(matrix: np.ndarray, node: np.ndarray, is_off_loaded: np.ndarray) -> dict[str, np.ndarray]:
    """The matrix of ranks taken apart by what its bytes go over."""
    near = node[:, None] == node[None, :]
    own = np.eye(len(node), dtype=bool)
    return {
        "local": np.where(own & ~is_off_loaded, matrix, 0),
        "nvlink": np.where(near & ~own & ~is_off_loaded, matrix, 0),
        "staged": np.where(near & is_off_loaded, matrix, 0),
        "network": np.where(near, 0, matrix),
    }


def _moved(weight: Weight, layout: SourceLayout, wants: list[ReadSet | None], cluster: _Cluster) -> _Moved:
    """What one weight makes all ranks read."""
    moved, item = _Moved.none(cluster), ITEM_SIZE[weight.dtype]
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


def _sources(weight: Weight, layout: SourceLayout, holders: np.ndarray, cluster: _Cluster) -> np.ndarray:
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


def _unit(largest: int) -> tuple[str, float]:
    """The unit that suits bytes of this size, and how many bytes it has."""
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= size), ("B", 1.0))


def _cell(value: float, width: int = 12) -> str:
    return f"{value:{width}.3f}" if value else f"{'–':>{width}}"
