"""What the trainer holds: a module or a mapping -> SourceLayout, and the addresses of this rank's shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from spmd_engine.errors import PlanError
from spmd_engine.layout import Mesh, Placement, Replicate, Shard, SourceLayout, Weight, local_shape

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """A source as one rank sees it.

    Attributes:
        layout: the same on all ranks.
        addresses: of this rank's shard of each weight, uint64; 0 where it holds nothing.
        optional: names that the engine may ignore: buffers, and second names of a weight that is listed already.
        shards: the local tensors, kept alive while they are read.
    """

    layout: SourceLayout
    addresses: np.ndarray
    optional: frozenset[str]
    shards: tuple[torch.Tensor, ...]


def describe(source: torch.nn.Module | Mapping[str, torch.Tensor], rank: int) -> Source:
    """Describe a module (plain, or sharded by FSDP2) or a mapping from names to tensors or DTensors.

    Raises:
        PlanError: a weight that cannot be read as it is, by name, with what to do.
    """
    weights: list[Weight] = []
    meshes: dict[Mesh, int] = {}
    shards: list[torch.Tensor] = []
    optional: set[str] = set()
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor, is_buffer in _named_tensors(source):
        local, mesh, placements = _local(name, tensor)
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            if is_buffer:
                continue
            raise PlanError(
                f"weight {name!r} is {tensor.dtype}: only float32, float16 and bfloat16 weights can be moved; "
                "quantised and integer weights cannot fill a floating-point engine"
            )
        if local.device.type != "cpu":
            raise PlanError(f"weight {name!r} is on {local.device}, which cannot be moved yet; keep the weights on the CPU")
        if not local.is_contiguous():
            raise PlanError(f"weight {name!r} is not contiguous in the trainer's memory; pass tensor.contiguous()")
        number = -1
        if mesh is not None:
            number = meshes.setdefault(mesh, len(meshes))
            expected = local_shape(tuple(tensor.shape), mesh, placements, rank)
            if local.numel() and tuple(local.shape) != expected:
                raise PlanError(
                    f"weight {name!r} {list(tensor.shape)}: rank {rank} should hold {list(expected)} by its placements "
                    f"{list(placements)}, but holds {list(local.shape)}"
                )
        identity = (local.data_ptr(), tensor.shape)
        if is_buffer or (local.numel() and identity in seen):
            optional.add(name)
        seen.add(identity)
        weights.append(Weight(name, tuple(tensor.shape), dtype, number, placements))
        shards.append(local)
    if not weights:
        raise PlanError("the source holds no weights")
    addresses = np.array([shard.data_ptr() if shard.numel() else 0 for shard in shards], dtype=np.uint64)
    return Source(SourceLayout(tuple(weights), tuple(meshes)), addresses, frozenset(optional), tuple(shards))


def ranks_of(source: object) -> set[int]:
    """All ranks that hold a shard of something in `source`, by the meshes of its DTensors."""
    from torch.distributed.tensor import DTensor

    tensors = source.parameters() if isinstance(source, torch.nn.Module) else getattr(source, "values", tuple)()
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    return {int(rank) for mesh in meshes for rank in mesh.mesh.flatten().tolist()}


def _named_tensors(source: object) -> Iterator[tuple[str, torch.Tensor, bool]]:
    if isinstance(source, torch.nn.Module):
        persistent = source.state_dict(keep_vars=True)
        parameters = dict(source.named_parameters(remove_duplicate=False))
        for name, tensor in persistent.items():
            if isinstance(tensor, torch.Tensor):
                yield name, tensor, name not in parameters
    elif isinstance(source, Mapping):
        for name, tensor in source.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise PlanError(f"a mapping source must map names to tensors; {name!r} maps to {type(tensor).__name__}")
            yield name, tensor, False
    else:
        raise PlanError(f"a source is an nn.Module or a mapping from names to tensors, got {type(source).__name__}")


def _local(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Mesh | None, tuple[Placement, ...]]:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Replicate as TorchReplicate
    from torch.distributed.tensor import Shard as TorchShard

    if tensor.is_meta:
        raise PlanError(f"weight {name!r} is on the meta device: it has no data to move")
    if not isinstance(tensor, DTensor):
        return tensor.detach(), None, ()
    placements: list[Placement] = []
    for placement in tensor.placements:
        if type(placement) is TorchShard:
            placements.append(Shard(placement.dim % tensor.ndim))
        elif type(placement) is TorchReplicate:
            placements.append(Replicate())
        else:
            raise PlanError(
                f"weight {name!r} has the placement {placement}, which is not supported; "
                "redistribute it to Shard or Replicate first"
            )
    grid = tensor.device_mesh.mesh
    mesh = Mesh(tuple(grid.shape), tuple(int(rank) for rank in grid.flatten().tolist()))
    return tensor.to_local().detach(), mesh, tuple(placements)
