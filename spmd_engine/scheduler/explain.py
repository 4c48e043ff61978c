"""The scheduler process's side of `explain`: what all ranks would read, without reading any of it."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from spmd_engine.control.agreement import Exchange, attempt, raise_first
from spmd_engine.control.digest import digest
from spmd_engine.control.messages import Start
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import SourceLayout
from spmd_engine.planning.read_sets import ReadSet, from_numbers, read_sets_of, to_numbers, to_plain
from spmd_engine.scheduler.recording.loading import Loads, check_all_used, recorded
from spmd_engine.scheduler.weights import WeightsKeeper


def survey(
    weights: WeightsKeeper, model: torch.nn.Module, payload: dict[str, Any], exchange: Exchange, *, start: Start
) -> dict[str, Any]:
    """What every rank would read in an update, the same answer on all of them.

    Args:
        model: SGLang's.
        payload: from `spmd_engine.trainer.weight_updates`.
        exchange: all-gather over the scheduler processes of `payload["ranks"]`.
        start: of this process.

    Returns:
        "ranks": for each rank the key of what it reads in "wants", its node, and whether its shards are off-loaded;
        "wants": each as `wants.to_plain` makes it; "fallback": weights and reasons.

    Raises:
        PlanError: an update would be refused.
    """
    ranks, (layout, optional) = tuple(payload["ranks"]), payload["layout"]
    made: list[tuple[dict[str, ReadSet], dict[str, str]]] = []
    error = attempt(
        lambda: made.append(
            wants_and_fallback(weights.foreseen(layout) or recorded(model, layout, weights.conversion), layout)
        ),
        rank=start.rank,
        device=weights.device,
    )
    wants, fallback = made[0] if made else ({}, {})
    names = [weight.name for weight in layout.weights]
    text = json.dumps(to_plain(wants))
    fact = {
        "error": error,
        "wants": digest(text),
        "node": start.node,
        "off_loaded": payload["in_cpu_memory"] and weights.device.type != "cpu",
    }
    frames = exchange(fact, json.dumps([to_numbers(wants, names), fallback]).encode())
    raise_first(frames, ranks)
    facts = [header for header, _ in frames]
    found = [json.loads(blob) for _, blob in frames]
    check_all_used(layout, optional, [from_numbers(used, names) for used, _ in found])
    # Ranks of all replicas read the same as those of the first: one of them says what.
    keys = [header["wants"] for header in facts]
    is_first = keys.index(fact["wants"]) == ranks.index(start.rank)
    said = exchange({}, text.encode() if is_first else b"")
    return {
        "ranks": facts,
        "wants": {key: json.loads(blob) for key, (_, blob) in zip(keys, said, strict=True) if blob},
        "fallback": {name: why for _, reasons in found for name, why in reasons.items()},
    }


def wants_and_fallback(loads: Loads, layout: SourceLayout) -> tuple[dict[str, ReadSet], dict[str, str]]:
    """What this rank would read of each weight, and which weights it would read whole for the model's own loader and
    why.

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
