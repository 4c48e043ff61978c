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
from spmd_engine.planning.layout import SourceLayout, Weight
from spmd_engine.planning.moved import Cluster, Moved, count_moved, split_by_link
from spmd_engine.planning.read_sets import ReadSet

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
        return split_by_link(self.matrix, np.array(self.nodes), self._is_off_loaded)

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
    cluster = Cluster(ranks, node, kind, np.array([rank in off_loaded for rank in ranks]))
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

    total = Moved.none(cluster)
    classes: dict[str, np.ndarray] = {}
    for weight, wants, names in identical.values():
        moved = count_moved(weight, layout, wants, cluster)
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


def _unit(largest: int) -> tuple[str, float]:
    """The unit that suits bytes of this size, and how many bytes it has."""
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= size), ("B", 1.0))


def _cell(value: float, width: int = 12) -> str:
    return f"{value:{width}.3f}" if value else f"{'–':>{width}}"
