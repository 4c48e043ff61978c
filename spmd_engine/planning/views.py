"""Walks strided views along the axes of a weight, and cuts them at the ends of a box.

Each dimension of a view walks along one axis of the weight (`along_axes`, which splits views until that is so); `clip`
finds the part of it inside an interval of that axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from spmd_engine.planning.layout import Shape, contiguous_strides


@dataclass(frozen=True)
class Dim:
    """A dimension of a block: `size` steps of `step` along one axis of the weight, and where that leads."""

    size: int
    step: int
    src: int  # stride in the source piece, elements
    dst: int  # stride in the parameter, elements


# Element offsets (in the piece, in the parameter's block) and dimensions.
Block = tuple[tuple[int, int], list[Dim]]


@dataclass(frozen=True)
class View:
    """A strided block: sizes, and where its elements are in the flat weight and in the parameter."""

    sizes: Shape
    src_offset: int
    src_strides: Shape
    dst_offset: int
    dst_strides: Shape

    def split(self, d: int, at: int) -> tuple[View, View]:
        """Cut dimension `d` before index `at`."""
        sizes = list(self.sizes)
        sizes[d], rest = at, self.sizes[d] - at
        head = replace(self, sizes=tuple(sizes))
        sizes[d] = rest
        tail = replace(
            self,
            sizes=tuple(sizes),
            src_offset=self.src_offset + at * self.src_strides[d],
            dst_offset=self.dst_offset + at * self.dst_strides[d],
        )
        return head, tail


@dataclass(frozen=True)
class AxisView:
    """A block as steps along the axes of a weight: for each axis its origin and (size, step, parameter stride)s."""

    origin: list[int]
    along: list[list[tuple[int, int, int]]]
    dst_offset: int


def along_axes(view: View, axes: list[tuple[int, int, int]]) -> list[AxisView]:
    """Write a strided view as steps along axes. Where a dimension runs over the end of an axis, the view is split."""
    extents = [extent for extent, _, _ in axes]
    strides = contiguous_strides(tuple(extents))
    origin, rest = [], view.src_offset
    for stride in strides:
        origin.append(rest // stride)
        rest %= stride
    along: list[list[tuple[int, int, int]]] = [[] for _ in axes]
    owners: list[list[int]] = [[] for _ in axes]
    for d, (size, src, dst) in enumerate(zip(view.sizes, view.src_strides, view.dst_strides, strict=True)):
        if size == 1:
            continue
        axis = next(a for a, stride in enumerate(strides) if stride <= src and src % stride == 0)
        while True:
            step = src // strides[axis]
            inner = -(-(extents[axis] - origin[axis]) // step)  # indices that fit from the origin to the axis's end
            if axis == 0 or size <= inner:
                break
            if origin[axis] >= step or extents[axis] % step:  # it does not meet every row of the axis alike
                return [part for half in view.split(d, inner) for part in along_axes(half, axes)]
            if size % inner:
                return [part for half in view.split(d, size - size % inner) for part in along_axes(half, axes)]
            along[axis].append((inner, step, dst))
            owners[axis].append(d)
            axis, size, src, dst = axis - 1, size // inner, src * inner, dst * inner
        along[axis].append((size, step, dst))
        owners[axis].append(d)
    for axis in range(1, len(axes)):
        reach = origin[axis] + sum((size - 1) * step for size, step, _ in along[axis])
        if reach >= extents[axis]:
            # Together, two dimensions run over the end: cut the longer-stepped one until each part stays inside.
            d = max((d for d in owners[axis] if view.sizes[d] > 1), key=lambda d: view.src_strides[d])
            return [part for half in view.split(d, view.sizes[d] // 2) for part in along_axes(half, axes)]
    return [AxisView(origin, along, view.dst_offset)]


def axis_steps(
    sizes: Shape, offset: int, strides: Shape, shape: Shape
) -> list[list[tuple[int, list[tuple[int, int]]]]]:
    """The elements of a strided view of a weight, as disjoint products of index sets.

    Returns:
        For each product and each dimension of `shape` the first index, and (size, step) pairs that lead from it.
    """
    axes = [(extent, 0, extent) for extent in shape or (1,)]
    view = View(sizes, offset, strides, 0, (0,) * len(sizes))
    return [
        [(first, [(size, step) for size, step, _ in dims]) for first, dims in zip(part.origin, part.along, strict=True)]
        for part in along_axes(view, axes)
    ]


def clip(dims: list[Dim], low: int, high: int) -> list[Block]:
    """The index combinations whose position, the sum of index x step, is in [low, high), as blocks.

    Returns:
        ((source offset, destination offset) in elements, dimensions) of disjoint blocks.
    """
    if not dims:
        return [((0, 0), [])] if low <= 0 < high else []
    dims = sorted(dims, key=lambda dim: -dim.step)
    head, tail = dims[0], dims[1:]
    reach = sum((dim.size - 1) * dim.step for dim in tail)  # how far the inner dimensions go
    # Indices for which all of the inner block is inside: low <= i * step and i * step + reach < high.
    first = max(0, -(-low // head.step))
    last = min(head.size, (high - 1 - reach) // head.step + 1)
    # Indices for which some of it may be inside.
    touch_first = max(0, -(-(low - reach) // head.step))
    touch_last = min(head.size, (high - 1) // head.step + 1)
    parts: list[Block] = []
    if last > first:
        block = [Dim(last - first, head.step, head.src, head.dst), *tail]
        parts.append(((first * head.src, first * head.dst), block))
    else:
        first, last = touch_last, touch_last
    for i in [*range(touch_first, min(first, touch_last)), *range(max(last, touch_first), touch_last)]:
        parts += _shift(clip(tail, low - i * head.step, high - i * head.step), head, i)
    return parts


def _shift(parts: list[Block], head: Dim, i: int) -> list[Block]:
    return [((src + i * head.src, dst + i * head.dst), block) for (src, dst), block in parts]


def coalesce(block: list[Dim]) -> list[Dim]:
    """Outermost first, neighbours that are contiguous on both sides merged."""
    merged: list[Dim] = []
    for dim in sorted((d for d in block if d.size > 1), key=lambda d: (-abs(d.src), -abs(d.dst))):
        last = merged[-1] if merged else None
        if last is not None and last.src == dim.src * dim.size and last.dst == dim.dst * dim.size:
            merged[-1] = Dim(last.size * dim.size, dim.step, dim.src, dim.dst)
        else:
            merged.append(dim)
    return merged
