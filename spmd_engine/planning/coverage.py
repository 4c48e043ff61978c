"""Exactness of a recording: every element of every parameter is written, and no weight is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from spmd_engine.planning.layout import Shape, contiguous_strides
from spmd_engine.planning.plan import RecordedCopy

Region = tuple[int, Shape, Shape]  # address, sizes, strides in elements
_AT_ONCE = 512  # boxes that are compared with all others in one go


def as_box(region: Region, base: int, item_size: int, shape: Shape) -> tuple[Shape, Shape] | None:
    """A region of a contiguous parameter as (start, size) in `shape`'s dimensions; None if it is not a box of it."""
    address, sizes, strides = region
    offset, left = divmod(address - base, item_size)
    if left:
        return None
    start = []
    for step in contiguous_strides(shape):
        start.append(offset // step)
        offset %= step
    size = [1] * len(shape)
    wanted = {step: d for d, step in reversed(list(enumerate(contiguous_strides(shape))))}
    for extent, step in _merge(sizes, strides):
        d = wanted.get(step)
        if d is None:
            return None
        # A run that fills whole inner dimensions spreads over them.
        while extent > shape[d] and d > 0 and start[d] == 0 and extent % shape[d] == 0:
            size[d] = shape[d]
            extent //= shape[d]
            d -= 1
        size[d] = extent
    if any(begin + extent > whole for begin, extent, whole in zip(start, size, shape, strict=True)):
        return None
    return tuple(start), tuple(size)


def _merge(sizes: Shape, strides: Shape) -> list[tuple[int, int]]:
    """(extent, stride) pairs without those of extent 1, neighbours that are contiguous merged."""
    dims: list[tuple[int, int]] = []
    for extent, step in sorted(zip(sizes, strides, strict=True), key=lambda pair: -pair[1]):
        if extent == 1:
            continue
        if dims and dims[-1][1] == extent * step:
            dims[-1] = (dims[-1][0] * extent, step)
        else:
            dims.append((extent, step))
    return dims


def uncovered(regions: Iterable[Region], base: int, item_size: int, shape: Shape) -> int | None:
    """How many elements of a contiguous parameter the regions leave out; None if they overlap or are not boxes.

    Args:
        regions: what is written, as addresses.
        base: address of the parameter.
        item_size: bytes an element.
    """
    boxes = [as_box(region, base, item_size, shape) for region in dict.fromkeys(regions)]
    if any(box is None for box in boxes):
        return None
    starts = np.array([box[0] for box in boxes if box], dtype=np.int64).reshape(len(boxes), len(shape))
    sizes = np.array([box[1] for box in boxes if box], dtype=np.int64).reshape(len(boxes), len(shape))
    if _any_overlap(starts, starts + sizes):
        return None
    return math.prod(shape) - int(sizes.prod(axis=1).sum())


def _any_overlap(low: np.ndarray, high: np.ndarray) -> bool:
    for begin in range(0, len(low), _AT_ONCE):
        some = slice(begin, begin + _AT_ONCE)
        meet = np.ones((len(low[some]), len(low) - begin), dtype=bool)  # each with itself and with those behind it
        for axis in range(low.shape[1]):
            meet &= low[some, axis, None] < high[None, begin:, axis]
            meet &= low[None, begin:, axis] < high[some, axis, None]
        np.fill_diagonal(meet, False)
        if meet.any():
            return True
    return False


def last_of_duplicates(copies: Sequence[RecordedCopy]) -> list[RecordedCopy]:
    """Copies without those that a later one overwrites exactly, as when two names of a tied weight are both given."""
    latest: dict[tuple[int, Shape, Shape], RecordedCopy] = {}
    for copy in copies:
        key = (copy.dst_address, copy.sizes, copy.dst_strides)
        latest.pop(key, None)
        latest[key] = copy
    return list(latest.values())


def region_of(copy: RecordedCopy) -> Region:
    return copy.dst_address, copy.sizes, copy.dst_strides
