"""What the trainer takes its scheduler process to know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spmd_engine.control.calls import UpdateWeights
from spmd_engine.control.messages import KNOWN_LAYOUTS
from spmd_engine.scheduler.plan_cache import PlanCache
from spmd_engine.trainer import tracing
from spmd_engine.trainer.scheduler_client import CollectiveCall
from spmd_engine.trainer.weight_updates import PreparedUpdate, WeightUpdates


def source(size: int) -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(size)}


@pytest.fixture
def updates() -> WeightUpdates:
    return WeightUpdates(0, (0,), SimpleNamespace(), 10.0, None)  # type: ignore[arg-type]


def prepare(updates: WeightUpdates, size: int) -> PreparedUpdate:
    call = CollectiveCall(None, "update_weights", 1, tracing.Spans(), is_overlapped=False)  # type: ignore[arg-type]
    return updates.prepare(call, source(size), verify=False, running="wait", rename=None)


def learn(cache: PlanCache, body: UpdateWeights) -> None:
    cache.learn(body.key, body.layout, body.optional)


def test_a_layout_is_sent_once_and_never_left_out_where_it_is_not_known(updates):
    cache, sent = PlanCache(), []
    for size in [1, 2, 1, 2, 1, 3, 4, 2, 5, 6, 1, 6]:
        update = prepare(updates, size)
        learn(cache, update.body)  # a layout that is left out and not known would be an error here
        updates.commit(update)
        sent.append(update.body.layout is not None)
    assert KNOWN_LAYOUTS == 4
    assert sent == [True, True, False, False, False, True, True, False, True, True, True, False]


def test_after_an_update_that_failed_layouts_are_sent_anew(updates):
    cache = PlanCache()
    for size in (1, 2):
        update = prepare(updates, size)
        learn(cache, update.body)
        updates.commit(update)
    for size in (3, 4, 5, 6):  # they push the others out, and are not committed
        learn(cache, prepare(updates, size).body)
    update = prepare(updates, 1)
    assert update.body.layout is not None
    learn(cache, update.body)
