"""What an engine's rank reads of the trainer's weights, as sets of elements that are counted without listing them.

A set is a union of *parts*, each a product of index sets, one for every dimension of the weight: what `load_weights`
takes for one tensor-parallel rank (rows, columns, heads, experts) is one part, or a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import Box, Shape
from spmd_engine.planning.plan import RecordedCopy
from spmd_engine.planning.views import axis_steps

# Half-open intervals of indices, ascending, which do not touch.
Runs = tuple[tuple[int, int], ...]
Part = tuple[Runs, ...]
_View = tuple[Shape, int, Shape]  # sizes, offset and strides in elements


@dataclass(frozen=True)
class ReadSet:
    """What a rank reads of one weight.

    Attributes:
        parts: the elements. One that goes to two places in the engine is in two parts.
        written: bytes that they become in the engine.
    """

    parts: tuple[Part, ...]
    written: int


def read_sets_of(copies: Iterable[RecordedCopy], shapes: Mapping[str, Shape]) -> dict[str, ReadSet]:
    """What recorded copies read, by the name of the weight.

    Args:
        copies: of one rank.
        shapes: global shapes of the weights.
    """
    views: dict[str, list[_View]] = {}
    written: dict[str, int] = {}
    for copy in copies:
        views.setdefault(copy.weight, []).append((copy.sizes, copy.src_offset, copy.src_strides))
        moved = math.prod(copy.sizes) * ITEM_SIZE[copy.dst_dtype]
        written[copy.weight] = written.get(copy.weight, 0) + moved
    # Layers and experts are read alike: each way of reading is worked out once, and its set is one object.
    made: dict[tuple[Shape, int, tuple[_View, ...]], ReadSet] = {}
    found: dict[str, ReadSet] = {}
    for name, read in views.items():
        key = (shapes[name], written[name], tuple(read))
        if key not in made:
            made[key] = ReadSet(_parts_of(read, shapes[name]), written[name])
        found[name] = made[key]
    return found


def _parts_of(views: list[_View], shape: Shape) -> tuple[Part, ...]:
    parts: list[Part] = []
    for sizes, offset, strides in views:
        if all(sizes):
            for axes in axis_steps(sizes, offset, strides, shape):
                parts.append(tuple(_runs(first, steps) for first, steps in axes))
    return _merge(parts) if parts else ()


def count(parts: Iterable[Part], boxes: Sequence[Box], shape: Shape) -> np.ndarray:
    """How many elements of `parts` each box holds.

    Args:
        boxes: with the dimensions of `shape`, or with one: intervals of the flattened weight.
        shape: of the weight.
    """
    low = np.array([box.start or (0,) for box in boxes], dtype=np.int64)
    high = low + np.array([box.size or (1,) for box in boxes], dtype=np.int64)
    total = np.zeros(len(boxes), dtype=np.int64)
    for part in parts:
        if low.shape[1] == len(part):
            found = np.ones(len(boxes), dtype=np.int64)
            for axis, runs in enumerate(part):
                found *= _below(runs, high[:, axis]) - _below(runs, low[:, axis])
        else:
            found = _before(part, high[:, 0], shape) - _before(part, low[:, 0], shape)
        total += found
    return total


def unite(wants: Iterable[ReadSet]) -> list[Part]:
    """The elements that one of several ranks reads, each once: disjoint parts."""
    found: list[Part] = []
    for part in dict.fromkeys(part for want in wants for part in want.parts):
        rest = [part]
        for other in found:
            rest = [piece for whole in rest for piece in _without(whole, other)]
        found += rest
    return found


@dataclass(frozen=True)
class PackedReadSets:
    """Read sets of weights whose names the other process knows; equal ones, of which there are many, once.

    Attributes:
        numbers: for each weight, in the order of the names, an index into `sets`; -1 if it is not read.
        sets: what is read.
    """

    numbers: list[int]
    sets: list[ReadSet]


def pack(reads: Mapping[str, ReadSet], names: Iterable[str]) -> PackedReadSets:
    """Read sets for another process, which knows the names."""
    known: dict[ReadSet, int] = {}
    numbers = [known.setdefault(reads[name], len(known)) if name in reads else -1 for name in names]
    return PackedReadSets(numbers, list(known))


def unpack(packed: PackedReadSets, names: Iterable[str]) -> dict[str, ReadSet]:
    """What `pack` was given, without other names; equal read sets are one object."""
    numbered = zip(names, packed.numbers, strict=True)
    return {name: packed.sets[number] for name, number in numbered if number >= 0}


def unpack_distinct(packed: Iterable[PackedReadSets], names: Sequence[str]) -> list[dict[str, ReadSet]]:
    """What ranks read, without those that read the same as another: ranks of all replicas do."""
    found: list[PackedReadSets] = []
    for one in packed:
        if one not in found:
            found.append(one)
    return [unpack(one, names) for one in found]


def subtract(parts: Iterable[Part], shape: Shape) -> list[Part]:
    """The elements of a weight that none of `parts` has, as disjoint parts."""
    rest: list[Part] = [tuple(((0, extent),) for extent in shape or (1,))] if math.prod(shape) else []
    for part in parts:
        if not rest:
            break
        rest = [left for whole in rest for left in _without(whole, part)]
    return rest


def elements(part: Part) -> int:
    """How many elements a part has."""
    return math.prod(sum(stop - start for start, stop in runs) for runs in part)


def _runs(first: int, steps: list[tuple[int, int]]) -> Runs:
    starts, length = np.array([first], dtype=np.int64), 1
    for size, step in sorted(steps, key=lambda pair: pair[1]):
        if step == length and len(starts) == 1:
            length *= size
        else:
            starts = (starts[:, None] + np.arange(size, dtype=np.int64) * step).ravel()
    return _join((int(start), int(start) + length) for start in starts)


def _join(runs: Iterable[tuple[int, int]]) -> Runs:
    """Disjoint runs in order, those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _merge(parts: list[Part]) -> tuple[Part, ...]:
    """The same elements in fewer parts: those that differ along one dimension alone become one."""
    for axis in range(len(parts[0])):
        groups: dict[tuple[Part, Part], list[Runs]] = {}
        for part in parts:
            groups.setdefault((part[:axis], part[axis + 1 :]), []).append(part[axis])
        parts = []
        for (before, after), along in groups.items():
            runs = _join(run for several in along for run in several)
            is_disjoint = all(one[1] < other[0] for one, other in pairwise(runs))
            parts += [(*before, each, *after) for each in ([runs] if is_disjoint else along)]
    return tuple(sorted(parts))


def _without(part: Part, other: Part) -> list[Part]:
    """The elements of `part` that `other` does not have, as disjoint parts."""
    shared = [_intersection(mine, theirs) for mine, theirs in zip(part, other, strict=True)]
    if not all(shared):
        return [part]
    found = []
    for axis, (mine, both) in enumerate(zip(part, shared, strict=True)):
        left = _difference(mine, both)
        if left:
            found.append((*shared[:axis], left, *part[axis + 1 :]))
    return found


def _intersection(one: Runs, other: Runs) -> Runs:
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple((start, stop) for start, stop in both if start < stop)


def _difference(runs: Runs, inside: Runs) -> Runs:
    """`runs` without the runs `inside` of them."""
    found = []
    for start, stop in runs:
        for a, b in inside:
            if start <= a and b <= stop:
                found.append((start, a))
                start = b
        found.append((start, stop))
    return tuple((start, stop) for start, stop in found if start < stop)


def _below(runs: Runs, limit: np.ndarray) -> np.ndarray:
    """How many indices of `runs` are below each limit."""
    bounds = np.array(runs, dtype=np.int64)
    starts, lengths = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
    found: np.ndarray = np.clip(limit[:, None] - starts, 0, lengths).sum(axis=1)
    return found


def _before(part: Part, limit: np.ndarray, shape: Shape) -> np.ndarray:
    """How many elements of `part` come before each position in the flattened weight."""
    sizes = [sum(stop - start for start, stop in runs) for runs in part]
    found = np.zeros(len(limit), dtype=np.int64)
    inside = np.ones(len(limit), dtype=bool)  # so far the position's indices are those of an element
    rest = limit.copy()
    for axis, runs in enumerate(part):
        index, rest = np.divmod(rest, math.prod(shape[axis + 1 :]))
        below = _below(runs, index)
        found += inside * below * math.prod(sizes[axis + 1 :])
        inside &= _below(runs, index + 1) > below
    return found
