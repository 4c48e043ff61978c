"""The plans that a scheduler process keeps: few, and none with addresses of memory that was closed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spmd_engine.control.messages import KNOWN_LAYOUTS
from spmd_engine.planning.layout import SourceLayout, Weight
from spmd_engine.planning.plan import RecordedCopy, build_plan
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.scheduler.plan_cache import Places, PlanCache, Prepared
from spmd_engine.transfer import direct
from spmd_engine.transfer.fingerprint import Fingerprint

LAYOUT = SourceLayout((Weight("w", (4,), "float32"),), ())
TOPOLOGY = ((0, True),)


def prepare(model: torch.nn.Module) -> Prepared:
    address = model.weight.data_ptr()
    copy = RecordedCopy("w", (4,), 0, (1,), address, (1,), "float32", "weight")
    plan = build_plan(LAYOUT, [copy], rank=0)
    transfer = direct.prepare(plan, rank=0, device=torch.device("cpu"), handles=None)
    target = Fingerprint(model, model.parameters())
    return Prepared(LAYOUT, plan, {}, frozenset(), 0.0, 0.0, transfer, None, False, [], target)


@pytest.fixture
def model():
    return torch.nn.Linear(4, 1, bias=False)


def test_only_the_plans_of_the_last_layouts_are_kept(model):
    cache = PlanCache()
    for number in range(KNOWN_LAYOUTS):
        cache.learn(f"layout-{number}", LAYOUT, frozenset())
        cache.use((f"layout-{number}", TOPOLOGY), prepare(model))
    first = cache.latest("layout-0")
    cache.learn("layout-0", None, frozenset())  # used once more: now another one is the oldest
    cache.learn("another", LAYOUT, frozenset({"w"}))
    assert cache.latest("layout-1") is None and cache.latest("layout-0") is first is not None
    assert len(cache.all()) == KNOWN_LAYOUTS - 1
    assert cache.layout("another") == (LAYOUT, frozenset({"w"}))
    with pytest.raises(KeyError):
        cache.layout("layout-1")


def test_a_plan_goes_when_sglang_replaces_its_parameters(model):
    cache = PlanCache()
    cache.learn("layout", LAYOUT, frozenset())
    cache.use(("layout", TOPOLOGY), prepare(model))
    cache.drop_stale(model)
    assert cache.latest("layout") is not None
    model.weight = torch.nn.Parameter(torch.zeros(1, 4))
    cache.drop_stale(model)  # SGLang has not run since: it cannot have been it
    assert cache.latest("layout") is not None
    cache.parameters_may_change()
    cache.drop_stale(model)
    assert cache.latest("layout") is None and cache.all() == []


class Handles:
    """Counts what is closed, as `OpenHandles` does; there is no GPU here."""

    generation = 0

    def keep_only(self, handles):
        self.generation += 1


def test_places_have_a_generation_that_grows_when_shards_move_or_mappings_close():
    memory = ShardMemory("cpu", 1, (), (), np.zeros(1, np.uint32), np.array([64], np.uint64))
    places = Places(Handles())  # type: ignore[arg-type]
    before = places.generation
    places.take({0: memory, 1: memory})
    moved = places.generation
    places.take({0: None, 1: None})
    assert places.generation == moved > before
    places.close()
    assert places.generation > moved
    assert places.of((1, 0)) == {1: memory, 0: memory}
