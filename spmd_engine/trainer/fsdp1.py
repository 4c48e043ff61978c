"""Weights inside FSDP1's flat parameters (`torch.distributed.fsdp.FullyShardedDataParallel`), where they lie.

FSDP1 flattens the weights of a wrapped unit into one buffer, pads it, and cuts it into equal chunks over its process
group. The geometry is read from the metadata of the flat parameter (torch/distributed/fsdp/_flat_param.py), the values
from this rank's chunk, which is what the optimizer steps: nothing is gathered or unsharded.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from spmd_engine.errors import PlanError
from spmd_engine.planning.layout import FlatShard, Mesh, Placement, Replicate, local_box
from spmd_engine.trainer.names import join


@dataclass(frozen=True)
class FlatWeight:
    """A weight inside a flat parameter.

    Attributes:
        shape: of the whole weight.
        local: this rank's interval of the flattened weight; the whole weight in its shape if FSDP does not shard it.
        mesh: the ranks that share it; None if FSDP does not shard it.
        placements: one for each dimension of `mesh`.
    """

    shape: torch.Size
    local: torch.Tensor
    mesh: Mesh | None
    placements: tuple[Placement, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype


# (name, weight or tensor, whether the engine may ignore it)
Item = tuple[str, FlatWeight | torch.Tensor, bool]


def is_used_in(module: torch.nn.Module) -> bool:
    """Whether FSDP1 wraps anything in `module`."""
    return any(True for _ in _units(module))


def ranks_of(module: torch.nn.Module) -> set[int]:
    """All ranks that hold a chunk of something in `module`."""
    meshes = (_mesh_of(unit)[0] for unit in _units(module))
    return {rank for mesh in meshes if mesh is not None for rank in mesh.ranks}


def named_weights(module: torch.nn.Module) -> Iterator[Item]:
    """Everything that `module` holds, inside flat parameters and beside them. (A state dict of FSDP1 would gather.)

    Raises:
        PlanError: a weight whose present values cannot be read where FSDP keeps them, by name, with what to do.
    """
    units = {id(unit) for unit in _units(module)}
    flattened = _flattened(module)
    seen: set[int] = set()
    for prefix, child in module.named_modules(remove_duplicate=False):
        if id(child) in units:
            for name, weight, is_second_name in _flat_weights(prefix, child):
                yield name, weight, is_second_name or id(child) in seen
            seen.add(id(child))
        for name, tensor, is_buffer in _beside(child, flattened):
            yield join(prefix, name), tensor, is_buffer


class FlatFingerprint:
    """Recognises a module with FSDP1 in it whose tensors are where they were, as `Fingerprint` does for others.

    What FSDP registers as parameters changes during a training step, so the flat parameters themselves are looked at.
    Like the other one it has no reference to a tensor.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._facts, objects = self._look(module)
        self._objects = list(map(weakref.ref, objects))

    def holds(self, source: object) -> bool:
        """Whether `source` is the module that was seen, with tensors at the same addresses, sharded alike."""
        # While an object lives no other has its id.
        if self._objects[0]() is not source or any(reference() is None for reference in self._objects):
            return False
        try:
            return self._look(source)[0] == self._facts
        except PlanError:
            return False  # describing it anew says more

    @staticmethod
    def _look(module: Any) -> tuple[list[object], list[Any]]:
        """All that a description depends on, and the objects whose ids are in it, `module` first."""
        facts: list[object] = []
        objects: list[Any] = []
        flattened = _flattened(module)
        for child in module.modules():
            objects.append(child)
            facts.append((id(child), *child._modules, *map(id, child._modules.values())))
            for name, tensor, is_buffer in _beside(child, flattened):
                local = getattr(tensor, "_local_tensor", tensor)
                place = (local.data_ptr(), local.shape, local.stride(), local.dtype)
                facts.append((name, is_buffer, place, getattr(tensor, "_spec", None)))
        for unit in _units(module):
            chunk = _current_chunk(unit, "")
            objects.append(unit._handle)
            facts.append((id(unit._handle), chunk.data_ptr(), chunk.shape, chunk.dtype))
        return facts, objects


def _flattened(module: torch.nn.Module) -> set[tuple[int, str]]:
    """Places, as (id of a module, name), of parameters that are in a flat one now.

    At times FSDP registers views of unsharded values there.
    """
    flats = (unit._handle.flat_param for unit in _units(module))
    return {
        (id(info.module), info.param_name) for flat in flats for info in (*flat._param_infos, *flat._shared_param_infos)
    }


def _beside(child: torch.nn.Module, flattened: set[tuple[int, str]]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """A module's own parameters that are in no flat one, and its persistent buffers: name, tensor, is it a buffer."""
    from torch.distributed.fsdp import FlatParameter

    for name, parameter in child._parameters.items():
        if parameter is None or isinstance(parameter, FlatParameter) or (id(child), name) in flattened:
            continue
        yield name, parameter, False
    for name, buffer in child._buffers.items():
        if buffer is not None and name not in child._non_persistent_buffers_set:
            yield name, buffer, True


def _units(module: torch.nn.Module) -> Iterator[Any]:
    """The wrappers in `module` that have a flat parameter of their own."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for child in module.modules():
        if isinstance(child, FullyShardedDataParallel) and child._handle is not None:
            yield child


def _flat_weights(prefix: str, unit: Any) -> Iterator[tuple[str, FlatWeight, bool]]:
    """The weights of one flat parameter: name, weight, and whether it is the second name of another."""
    handle = unit._handle
    flat = handle.flat_param
    names = [_name(prefix, info) for info in flat._param_infos]
    chunk = _current_chunk(unit, prefix)
    mesh, outer = _mesh_of(unit)
    ends = list(accumulate(flat._numels_with_padding))
    offsets = [
        end - size
        for end, size, is_padding in zip(ends, flat._numels_with_padding, flat._is_padding_mask, strict=True)
        if not is_padding
    ]
    held: dict[tuple[int, str], FlatWeight] = {}
    for number, (name, offset, shape) in enumerate(zip(names, offsets, flat._shapes, strict=True)):
        if flat._param_extensions[number] is not None:
            raise PlanError(f"weight {name!r} is a DTensor inside FSDP1, which is not supported: use FSDP2 with it")
        if not flat._contiguities[number]:
            raise PlanError(f"weight {name!r} was not contiguous when FSDP flattened it: make it so before wrapping")
        if mesh is None:
            weight = FlatWeight(shape, chunk.narrow(0, offset, math.prod(shape)).view(shape), None, ())
        else:
            placements = (*outer, FlatShard(offset, chunk.numel()))
            box = local_box(tuple(shape), mesh, placements, dist.get_rank())
            (start,), (size,) = box.start, box.size
            begin = offset + start - handle.rank * chunk.numel() if size else 0
            _check(name, flat._shard_param_infos[number], start, size, begin)
            weight = FlatWeight(shape, chunk.narrow(0, begin, size), mesh, placements)
        info = flat._param_infos[number]
        held[id(info.module), info.param_name] = weight
        yield name, weight, False
    for info in flat._shared_param_infos:
        weight = held[id(info.prim_module), info.prim_param_name]
        yield _name(prefix, info), weight, True


def _current_chunk(unit: Any, prefix: str) -> torch.Tensor:
    """This rank's chunk of a flat parameter, in full precision.

    FSDP keeps it in `_local_shard` from the first forward on, while the flat parameter itself shows sharded,
    unsharded or low-precision values in turn.
    """
    from torch.distributed.fsdp._flat_param import HandleTrainingState

    handle, flat = unit._handle, unit._handle.flat_param
    what = f"weight {_name(prefix, flat._param_infos[0])!r} and what FSDP flattened with it"
    if handle._training_state is HandleTrainingState.SUMMON_FULL_PARAMS:
        raise PlanError(f"{what} is unsharded by summon_full_params: call update_weights after leaving it")
    shown = flat.detach()
    chunk: torch.Tensor = getattr(flat, "_local_shard", shown)
    low_precision = getattr(flat, "_mp_shard", None)
    if shown.size() == flat._sharded_size and not _is_same_memory(shown, chunk):
        if low_precision is None or not _is_same_memory(shown, low_precision):
            raise PlanError(
                f"{what} was replaced (moved, cast, or given new .data) behind FSDP's back, so it is not clear which "
                "values are meant: after moving a flat parameter set flat_param._local_shard = flat_param.data"
            )
    elif _is_same_memory(shown, chunk) and flat._params is not None and not handle._skipped_use_sharded_views:
        _check_original_parameters(flat, shown, prefix)
    return chunk


def _check_original_parameters(flat: Any, shown: torch.Tensor, prefix: str) -> None:
    """With `use_orig_params` FSDP writes a parameter's new storage back to its chunk at the next forward."""
    base, item = shown.data_ptr(), shown.element_size()
    for parameter, info, place in zip(flat._params, flat._param_infos, flat._shard_param_infos, strict=True):
        if place.in_shard and parameter.data_ptr() != base + place.offset_in_shard * item:
            raise PlanError(
                f"weight {_name(prefix, info)!r} was given new .data, which FSDP takes over in its next forward: run "
                "one first, or change the weight in place"
            )


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.dtype, one.device) == (other.data_ptr(), other.dtype, other.device)


def _check(name: str, info: Any, start: int, size: int, begin: int) -> None:
    """Compare what follows from the placement with what FSDP says of this rank."""
    expected = (info.intra_param_start_idx, info.numel_in_shard, info.offset_in_shard) if info.in_shard else None
    found = (start, size, begin) if size else None
    if found != expected:
        raise PlanError(
            f"weight {name!r}: FSDP keeps {expected} (start, elements, place) of it on rank {dist.get_rank()}, "
            f"not {found} as its flat parameter's layout says; this version of torch is not supported"
        )


def _mesh_of(unit: Any) -> tuple[Mesh | None, tuple[Placement, ...]]:
    """The ranks that share a unit's flat parameter, and the placements of all mesh dimensions but the last."""
    handle = unit._handle
    if not handle.uses_sharded_strategy:
        return None, ()
    shards = dist.get_process_group_ranks(handle.process_group)
    group = getattr(unit, "_inter_node_pg", None)
    if group is None:
        return Mesh((len(shards),), tuple(shards)), ()
    replicas = dist.get_process_group_ranks(group)
    # A rank knows its own row and column of a hybrid mesh. The others follow if the ranks are spaced evenly; all ranks
    # must agree on the layout, so an uneven mesh is refused and not misread.
    grid = tuple(replica + shard - dist.get_rank() for replica in replicas for shard in shards)
    device_mesh = getattr(unit, "_device_mesh", None)
    if device_mesh is not None:
        grid = tuple(int(rank) for rank in device_mesh.mesh.flatten().tolist())
    if len(set(grid)) < len(grid) or not set(grid) <= set(range(dist.get_world_size())):
        raise PlanError(
            f"FSDP shards over the ranks {shards} and replicates over {replicas}, which are not spaced evenly: "
            "give FSDP a two-dimensional device_mesh instead of process groups"
        )
    return Mesh((len(replicas), len(shards)), grid), (Replicate(),)


def _name(prefix: str, info: Any) -> str:
    return join(prefix, info.module_name, info.param_name)
