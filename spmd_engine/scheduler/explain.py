"""Finds out what all ranks would read in an update, without reading any of it."""

from __future__ import annotations

import math

import msgspec
import torch

from spmd_engine.control import codec
from spmd_engine.control.agreement import AllGather, Failure, attempt, raise_first
from spmd_engine.control.calls import Explain, Explained, ReadsOfRank
from spmd_engine.control.digest import digest
from spmd_engine.control.messages import Start
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import SourceLayout
from spmd_engine.planning.read_sets import PackedReadSets, ReadSet, pack, read_sets_of, unpack_distinct
from spmd_engine.scheduler.recording.loading import Loads, check_all_used, record
from spmd_engine.scheduler.weights import WeightsKeeper


class _Found(msgspec.Struct, frozen=True):
    """What a rank has found out, or why it could not."""

    error: Failure
    reads: ReadsOfRank
    used: PackedReadSets
    fallback: dict[str, str]


class _Said(msgspec.Struct, frozen=True):
    """Read sets, from one of the ranks that have the same."""

    read_sets: PackedReadSets | None


def explain(
    weights: WeightsKeeper, model: torch.nn.Module, call: Explain, gather: AllGather, *, start: Start
) -> Explained:
    """What every rank would read in an update, the same answer on all of them.

    Args:
        model: SGLang's.
        gather: over the scheduler processes of `call.holders`.
        start: of this process.

    Raises:
        PlanError: an update would be refused.
    """
    made: list[tuple[dict[str, ReadSet], dict[str, str]]] = []

    def find_reads() -> None:
        loads = weights.prerecorded(call.layout) or record(model, call.layout, weights.checkpoint_format)
        made.append(wants_and_fallback(loads, call.layout))

    error = attempt(find_reads, rank=start.rank, device=weights.device)
    wants, fallback = made[0] if made else ({}, {})
    read_sets = pack(wants, call.layout.names())
    is_off_loaded = call.is_in_cpu_memory and weights.device.type != "cpu"
    reads = ReadsOfRank(digest([codec.encode(read_sets).hex()]), start.node, is_off_loaded)
    found = gather(_Found(error, reads, read_sets, fallback))
    raise_first(found)
    check_all_used(call.layout, call.optional, unpack_distinct((one.used for one in found), call.layout.names()))
    # Ranks of all replicas read the same as those of the first: one of them says what.
    keys = [one.reads.read_sets for one in found]
    is_first = keys.index(reads.read_sets) == call.holders.index(start.rank)
    said = gather(_Said(read_sets if is_first else None))
    return Explained(
        ranks=[one.reads for one in found],
        read_sets={key: one.read_sets for key, one in zip(keys, said, strict=True) if one.read_sets is not None},
        fallback={name: why for one in found for name, why in one.fallback.items()},
    )


def wants_and_fallback(loads: Loads, layout: SourceLayout) -> tuple[dict[str, ReadSet], dict[str, str]]:
    """What this rank would read of each weight, which weights it would read whole for the model's own loader and why.

    Args:
        loads: how the weights of `layout` load.
    """
    by_name = {weight.name: weight for weight in layout.weights}
    wants = read_sets_of(loads.copies, {name: weight.shape for name, weight in by_name.items()})
    for weight in (by_name[name] for name in loads.fallback):
        size = math.prod(weight.shape)
        parts = (tuple(((0, extent),) for extent in weight.shape or (1,)),)
        wants[weight.name] = ReadSet(parts, size * ITEM_SIZE[weight.dtype])
    return wants, loads.fallback
