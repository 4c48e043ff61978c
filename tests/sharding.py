"""Random meshes and placements, the shards that torch would cut by them, and views of weights as loaders take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from spmd_engine.planning.layout import (
    FlatShard,
    Mesh,
    Placement,
    Replicate,
    Shape,
    Shard,
    SourceLayout,
    StridedShard,
    Weight,
)
from spmd_engine.planning.plan import RecordedCopy

CASES = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_RANKS = 16


@st.composite
def meshes(draw: Callable[..., Any]) -> Mesh:
    """Up to three dimensions, ranks in any order."""
    shape: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        shape.append(draw(st.integers(1, min(4, MAX_RANKS // math.prod(shape)))))
    return Mesh(tuple(shape), tuple(draw(st.permutations(range(math.prod(shape))))))


def draw_placements(draw: Callable[..., Any], shape: Shape, mesh: Mesh) -> tuple[Placement, ...]:
    """Random ones, or those of a part of a flat parameter."""
    if draw(st.integers(0, 3)):
        dims = st.integers(0, len(shape) - 1)
        kinds = st.one_of(st.just(Replicate()), st.builds(Shard, dims), st.builds(StridedShard, dims))
        return tuple(draw(kinds) for _ in mesh.shape)
    offset, rest = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    cut = draw(st.integers(0, len(mesh.shape) - 1))
    chunk = -(-(offset + math.prod(shape) + rest) // mesh.shape[cut])
    return tuple(FlatShard(offset, chunk) if d == cut else Replicate() for d in range(len(mesh.shape)))


@st.composite
def layouts(draw: Callable[..., Any]) -> SourceLayout:
    """A weight, and a mesh of ranks that shares it by random placements."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = draw(meshes())
    dtype = draw(st.sampled_from(list(DTYPES)))
    return SourceLayout((Weight("w", shape, dtype, 0, draw_placements(draw, shape, mesh)),), (mesh,))


def scatter(layout: SourceLayout, full: torch.Tensor, weight: Weight | None = None) -> dict[int, torch.Tensor]:
    """The shard of every rank, as torch would cut it.

    Args:
        full: the weight, or other values of its shape.
        weight: one of the layout's; by default the first.
    """
    weight = weight or layout.weights[0]
    mesh, placements = layout.meshes[weight.mesh], weight.placements
    if weight.mesh < 0:
        return dict.fromkeys(mesh.ranks, full)
    shards = {}
    for number, rank in enumerate(mesh.ranks):
        shard = full
        cuts = list(zip(placements, mesh.shape, np.unravel_index(number, mesh.shape), strict=True))
        # FSDP2 cuts what tensor parallelism has left: its mesh dimensions come first and its cuts last.
        strided = [cut for cut in cuts if isinstance(cut[0], StridedShard)]
        for placement, extent, index in [cut for cut in cuts if cut not in strided] + strided[::-1]:
            if isinstance(placement, (Shard, StridedShard)):
                chunks = shard.chunk(extent, placement.dim)
                shard = chunks[index] if index < len(chunks) else shard.narrow(placement.dim, 0, 0)
            elif isinstance(placement, FlatShard):
                numbers = torch.full((extent * placement.chunk,), -1)
                numbers[placement.offset :][: full.numel()] = torch.arange(full.numel())
                held = numbers.chunk(extent)[index]
                shard = full.flatten()[held[held >= 0]]
        shards[rank] = shard.contiguous()
    return shards


def random_weight(layout: SourceLayout, seed: int, weight: Weight | None = None) -> torch.Tensor:
    weight = weight or layout.weights[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=generator).to(DTYPES[weight.dtype])


def recorded(view: torch.Tensor, target: torch.Tensor) -> RecordedCopy:
    """What a loader that copies a view of the weight "w" into a parameter would have recorded."""
    return RecordedCopy(
        weight="w",
        sizes=tuple(view.shape),
        src_offset=view.storage_offset(),
        src_strides=tuple(view.stride()),
        dst_address=target.data_ptr(),
        dst_strides=tuple(target.stride()),
        dst_dtype=str(target.dtype).removeprefix("torch."),
        parameter="p",
    )


def view_of(draw, full: torch.Tensor) -> torch.Tensor:
    """A random chain of the view operations that loaders use."""
    view = full
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["narrow", "transpose", "chunk", "select", "reshape", "flatten", "step"]))
        dim = draw(st.integers(0, view.ndim - 1)) if view.ndim else 0
        if kind == "narrow" and view.ndim:
            start = draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
        elif kind == "transpose" and view.ndim > 1:
            view = view.transpose(dim, (dim + 1) % view.ndim)
        elif kind == "chunk" and view.ndim and view.shape[dim] % 2 == 0:
            view = view.chunk(2, dim)[draw(st.integers(0, 1))]
        elif kind == "select" and view.ndim > 1:
            view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
        elif kind == "reshape" and view.ndim:
            factors = [n for n in range(1, view.shape[dim] + 1) if view.shape[dim] % n == 0]
            inner = draw(st.sampled_from(factors))
            view = view.unflatten(dim, (view.shape[dim] // inner, inner))
        elif kind == "flatten" and view.is_contiguous():
            view = view.reshape(-1)
        elif kind == "step" and view.ndim and view.shape[dim] % 2 == 0:
            view = view[(slice(None),) * dim + (slice(draw(st.integers(0, 1)), None, 2),)]
    return view
