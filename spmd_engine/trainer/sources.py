"""What the trainer holds: a module or a mapping -> SourceLayout, and the addresses of this rank's shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from spmd_engine.errors import PlanError
from spmd_engine.planning.dtypes import ELEMENT_TYPES
from spmd_engine.planning.layout import (
    Mesh,
    Placement,
    Replicate,
    Shard,
    SourceLayout,
    StridedShard,
    Weight,
    local_box,
    spread,
)
from spmd_engine.trainer import fsdp1
from spmd_engine.trainer.names import Rename, checkpoint_names
from spmd_engine.transfer.fingerprint import Fingerprint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# (name, tensor, whether the engine may ignore it)
Item = tuple[str, torch.Tensor | fsdp1.FlatWeight, bool]
Located = tuple[torch.Tensor, Mesh | None, tuple[Placement, ...]]
_DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in ELEMENT_TYPES}


@dataclass(frozen=True)
class Source:
    """A source as one rank sees it.

    Attributes:
        layout: the same on all ranks.
        addresses: of this rank's shard of each weight, uint64; 0 where it holds nothing.
        sizes: bytes of each of these shards, uint64.
        device: CUDA ordinal that holds all shards of this rank, None for the CPU.
        optional: names that the engine may ignore: buffers, and second names of a weight that is listed already.
        shards: the local tensors, kept alive while they are read; none where the source itself does that.
    """

    layout: SourceLayout
    addresses: np.ndarray
    sizes: np.ndarray
    device: int | None
    optional: frozenset[str]
    shards: tuple[torch.Tensor, ...]


class SourceReader:
    """Describes the source of each update of one rank, and recognises one that has not changed since.

    Args:
        rank: this rank's global number.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._last: Source | None = None
        self._rename: Rename | None = None
        self._fingerprint: Fingerprint | fsdp1.FlatFingerprint | None = None

    def read(self, source: torch.nn.Module | Mapping[str, torch.Tensor], rename: Rename | None = None) -> Source:
        """Describe a module (plain, or sharded by FSDP1 or FSDP2) or a mapping from names to tensors or DTensors.

        Args:
            rename: from the names of `source`, without those of wrappers, to names of a checkpoint.

        Returns:
            A Source whose `layout` is the same object as the last time, if no more than values and places changed.

        Raises:
            PlanError: a weight that cannot be read as it is, by name, with what to do.
        """
        last, fingerprint = self._last, self._fingerprint
        if rename is not self._rename:
            fingerprint, self._rename = None, rename
        if last is not None and fingerprint is not None and fingerprint.holds(source):
            return last
        with torch.no_grad():  # without it, DTensor.to_local() builds an autograd node
            items = _items(source, rename)
            if (
                last is not None and fingerprint is not None and fingerprint.holds(source)
            ):  # FSDP2 had weights unsharded till now
                return last
            self._last, self._fingerprint = None, None
            described = describe(items, self._rank)
            if last is not None and described.layout == last.layout:
                described = replace(described, layout=last.layout)
            if isinstance(source, (torch.nn.Module, dict)):
                self._fingerprint = _take_fingerprint(source, items)
        self._last = replace(described, shards=())
        return described


def describe(items: list[Item], rank: int) -> Source:
    """The Source that named tensors amount to. Call it without gradients.

    Raises:
        PlanError: a weight that cannot be read as it is, by name, with what to do.
    """
    weights: list[Weight] = []
    meshes: dict[Mesh, int] = {}
    shards: list[torch.Tensor] = []
    optional: set[str] = set()
    seen: set[tuple[object, ...]] = set()
    devices: dict[torch.device, str] = {}
    located = [_local(name, tensor) for name, tensor, _ in items]
    for (name, tensor, is_optional), place in zip(items, _over_one_mesh(located, rank), strict=True):
        local, mesh, placements = place
        if local.is_meta:
            raise PlanError(f"weight {name!r} is on the meta device: it has no data to move")
        if local.numel() and not local.data_ptr():
            raise PlanError(f"weight {name!r} has no memory at present: bring back what was freed or off-loaded first")
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            if is_optional:
                continue
            raise PlanError(
                f"weight {name!r} is {tensor.dtype}: only float32, float16 and bfloat16 weights can be moved; "
                "quantised and integer weights cannot fill a floating-point engine"
            )
        devices.setdefault(local.device, name)
        _check_devices(devices)
        if not local.is_contiguous():
            raise PlanError(f"weight {name!r} is not contiguous in the trainer's memory; pass tensor.contiguous()")
        number = -1
        if mesh is not None:
            number = meshes.setdefault(mesh, len(meshes))
            expected = local_box(tuple(tensor.shape), mesh, placements, rank).size
            if tuple(local.shape) != expected and (local.numel() or math.prod(expected)):
                raise PlanError(
                    f"weight {name!r} {list(tensor.shape)}: rank {rank} should hold {list(expected)} by its placements "
                    f"{list(placements)}, but holds {list(local.shape)}"
                )
        # The storage tells, too, where a rank holds nothing: all ranks must find the same.
        identity = (local.untyped_storage()._cdata, local.storage_offset(), tensor.shape)
        if is_optional or (identity in seen and not isinstance(tensor, fsdp1.FlatWeight)):
            optional.add(name)
        seen.add(identity)
        weights.append(Weight(name, tuple(tensor.shape), dtype, number, placements))
        shards.append(local)
    if not weights:
        raise PlanError("the source holds no weights")
    addresses = np.array([shard.data_ptr() if shard.numel() else 0 for shard in shards], dtype=np.uint64)
    device = next(iter(devices))
    return Source(
        layout=SourceLayout(tuple(weights), tuple(meshes)),
        addresses=addresses,
        sizes=np.array([shard.nbytes for shard in shards], dtype=np.uint64),
        device=None if device.type == "cpu" else device.index,
        optional=frozenset(optional),
        shards=tuple(shards),
    )


def _check_devices(devices: dict[torch.device, str]) -> None:
    """Refuse what is not on the CPU or a GPU, and more than one of them; `devices` has a weight's name for each."""
    for device, name in devices.items():
        if device.type not in ("cpu", "cuda"):
            raise PlanError(f"weight {name!r} is on {device}: weights can be moved from CPU and CUDA memory only")
    if len(devices) > 1:
        (one, first), (other, second) = list(devices.items())[:2]
        raise PlanError(
            f"weight {first!r} is on {one} and weight {second!r} on {other}: all weights of a rank must be on one "
            "device"
        )


def ranks_of(source: object) -> set[int]:
    """All ranks that hold a shard of something in `source`, by the meshes of its DTensors."""
    from torch.distributed.tensor import DTensor

    tensors: Iterable[object] = getattr(source, "values", tuple)()
    flat: set[int] = set()
    if isinstance(source, torch.nn.Module):
        tensors, flat = source.parameters(), fsdp1.ranks_of(source)
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    return flat | {int(rank) for mesh in meshes for rank in mesh.mesh.flatten().tolist()}


def _items(source: object, rename: Rename | None) -> list[Item]:
    """All tensors of a source, by their names in a checkpoint."""
    items = list(_named_tensors(source))
    names = checkpoint_names((name for name, _, _ in items), source, rename)
    return [(names[name], tensor, is_optional) for name, tensor, is_optional in items]


def _take_fingerprint(
    source: torch.nn.Module | dict[str, torch.Tensor], items: list[Item]
) -> Fingerprint | fsdp1.FlatFingerprint:
    if isinstance(source, torch.nn.Module) and fsdp1.is_used_in(source):
        return fsdp1.FlatFingerprint(source)
    return Fingerprint(source, [tensor for _, tensor, _ in items if isinstance(tensor, torch.Tensor)])


def _named_tensors(source: object) -> Iterator[Item]:
    if isinstance(source, torch.nn.Module) and fsdp1.is_used_in(source):
        yield from fsdp1.named_weights(source)
    elif isinstance(source, torch.nn.Module):
        persistent = source.state_dict(keep_vars=True)
        for name, tensor in persistent.items():
            if isinstance(tensor, torch.Tensor):
                yield name, tensor, not isinstance(tensor, torch.nn.Parameter)
    elif isinstance(source, Mapping):
        for name, tensor in source.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise PlanError(f"a mapping source must map names to tensors; {name!r} maps to {type(tensor).__name__}")
            yield name, tensor, False
    else:
        raise PlanError(f"a source is an nn.Module or a mapping from names to tensors, got {type(source).__name__}")


def _local(
    name: str, tensor: torch.Tensor | fsdp1.FlatWeight
) -> tuple[torch.Tensor, Mesh | None, tuple[Placement, ...]]:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Replicate as TorchReplicate
    from torch.distributed.tensor import Shard as TorchShard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(tensor, fsdp1.FlatWeight):
        return tensor.local, tensor.mesh, tensor.placements
    if not isinstance(tensor, DTensor):
        return tensor, None, ()
    placements: list[Placement] = []
    for mesh_dim, placement in enumerate(tensor.placements):
        if type(placement) is TorchShard:
            placements.append(Shard(placement.dim % tensor.ndim))
        elif type(placement) is TorchReplicate:
            placements.append(Replicate())
        elif type(placement) is _StridedShard and (
            int(placement.split_factor) == _parts_after(tensor, mesh_dim, placement.dim)
        ):
            placements.append(StridedShard(placement.dim % tensor.ndim))
        else:
            raise PlanError(
                f"weight {name!r} has the placement {placement}, which is not supported; "
                "redistribute it to Shard or Replicate first"
            )
    return tensor.to_local(), _mesh(tensor.device_mesh), tuple(placements)


def _parts_after(tensor: DTensor, mesh_dim: int, dim: int) -> int:
    """Into how many parts the mesh dimensions after `mesh_dim` cut dimension `dim`."""
    later = list(enumerate(tensor.placements))[mesh_dim + 1 :]
    wanted = (dim % tensor.ndim, dim % tensor.ndim - tensor.ndim)
    return math.prod(tensor.device_mesh.size(d) for d, p in later if getattr(p, "dim", None) in wanted)


def _over_one_mesh(located: list[Located], rank: int) -> list[Located]:
    """The same with weights on rows of the largest mesh described over all of it.

    Where some weights are tensor-parallel, FSDP2 knows of the others only the row of the mesh that this rank is in.
    What lies on the whole mesh shows that its rows train one model.
    """
    meshes = {mesh for _, mesh, _ in located if mesh is not None}
    size = max((len(mesh.ranks) for mesh in meshes), default=0)
    largest = sorted((mesh for mesh in meshes if len(mesh.ranks) == size), key=lambda mesh: (mesh.shape, mesh.ranks))
    result: list[Located] = []
    for local, mesh, placements in located:
        if mesh is not None and len(mesh.ranks) < size:
            for over in largest:
                wider = spread(mesh, placements, over, rank)
                if wider is not None:
                    mesh, placements = over, wider
                    break
        result.append((local, mesh, placements))
    return result


@lru_cache(maxsize=64)
def _mesh(mesh: DeviceMesh) -> Mesh:
    grid = mesh.mesh
    return Mesh(tuple(grid.shape), tuple(int(rank) for rank in grid.flatten().tolist()))
