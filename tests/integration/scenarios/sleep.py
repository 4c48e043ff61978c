"""Releasing memory and taking it again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import models
import psutil
import pytest

from integration.scenarios import observe
from integration.scenarios.common import greedy, shard
from spmd_engine import errors

TAGS = ("weights", "kv_cache", "cuda_graph")
SUBSETS = [list(tags) for count in (1, 2, 3) for tags in combinations(TAGS, count)]
# Llama's vocabulary is padded: an update does not write the padding, so a wake must restore it.
SHAPE = {"hidden_size": 512, "intermediate_size": 4096}
KV_TOKENS = 100_000
KV_BYTES_PER_TOKEN = 2 * 2 * 128 * 2  # layers, keys and values, one head a rank, bfloat16


class Sleeper:
    """An engine with the memory saver, and what it must say once it has the weights of `model` again."""

    def __init__(self, context: Any, engine: Any) -> None:
        self.rank, self.engine = context.rank, engine
        self.model = shard(models.make_model("llama", seed=2, **SHAPE), context.world)
        self.other = shard(models.make_model("llama", seed=3, **SHAPE), context.world)
        self.stats = engine.update_weights(self.model, verify=True)
        self.tokens, self.checksums = greedy(engine), engine.weight_checksums()

    def refused(
        self, call: Callable[[], object], match: str, kind: type[Exception] = errors.MemoryOccupationError
    ) -> None:
        """The call is an error of exactly this type, and changes nothing."""
        sleeping, version = self.engine.sleeping, self.engine.weight_version
        with pytest.raises(kind, match=match) as caught:
            call()
        assert type(caught.value) is kind
        assert (self.engine.sleeping, self.engine.weight_version) == (sleeping, version)
        if not sleeping:
            assert greedy(self.engine) == self.tokens

    def check_lost(self) -> None:
        """Nothing is generated from weights that have no contents."""
        with pytest.raises(errors.WeightsInconsistentError, match="call update_weights"):
            greedy(self.engine)

    def check_update(self) -> None:
        """One update makes all as before, down to the padding, by the plan that was made first."""
        version = self.engine.weight_version
        stats = self.engine.update_weights(self.model, verify=True)
        assert not stats.planned and stats.wrong_elements == 0 and stats.weight_version == version + 1

    def check_serves(self) -> None:
        assert self.engine.sleeping == ()
        assert greedy(self.engine) == self.tokens and self.engine.weight_checksums() == self.checksums


def rss(engine: Any) -> int:
    return int(psutil.Process(engine.scheduler_pid).memory_info().rss)


def sleep(context: Any, path: str) -> dict[str, Any]:
    """Legal orders give memory and tokens back; illegal ones are typed errors on all ranks."""
    arguments = {"enable_memory_saver": True, "max_total_tokens": KV_TOKENS}
    with context.engine(path, context.world, **arguments) as engine:
        sleeper = Sleeper(context, engine)
        measured = _memory_comes_back(sleeper)
        _legal_orders(sleeper)
        _illegal_orders(sleeper)
        _sources_that_moved(sleeper)
        engine.update_weights(sleeper.model)
        observe.traced(engine, sleeper.model, context.directory / f"trace{context.rank}.json")
        observe.logged(engine, sleeper.model)
        observe.summed(engine)
        observe.idle(engine)
        return measured


def _memory_comes_back(sleeper: Sleeper) -> dict[str, Any]:
    engine = sleeper.engine
    awake, held = rss(engine), engine.stats().memory
    assert held.keys() == set(TAGS) and held["cuda_graph"] == 0
    engine.release_memory_occupation(["kv_cache"])
    without_kv = rss(engine)
    assert engine.stats().memory == {**held, "kv_cache": 0}
    engine.release_memory_occupation(["weights"])
    without_weights = rss(engine)
    assert engine.sleeping == ("weights", "kv_cache") and not any(engine.stats().memory.values())
    # The staged wake.
    engine.resume_memory_occupation(["weights"])
    sleeper.check_update()
    engine.flush_cache()
    assert engine.sleeping == ("kv_cache",) and engine.weight_checksums() == sleeper.checksums
    assert rss(engine) - without_weights < 1.5 * (without_kv - without_weights)  # no KV cache yet
    engine.resume_memory_occupation(["kv_cache"])
    sleeper.check_serves()
    assert engine.stats().memory == held
    expected = {
        "kv_cache": KV_TOKENS * KV_BYTES_PER_TOKEN,
        "weights": sleeper.stats.local_bytes + sleeper.stats.remote_bytes,
    }
    for tag, size in expected.items():
        assert size <= held[tag] < 1.1 * size, f"{tag}: {held[tag]} bytes are reported of {size}"
    return {
        "kv_cache": [awake - without_kv, expected["kv_cache"]],
        "weights": [without_kv - without_weights, expected["weights"]],
    }


def _legal_orders(sleeper: Sleeper) -> None:
    """Every set of tags, released together and resumed one by one, or the reverse, or what is left by None."""
    engine = sleeper.engine
    for index, tags in enumerate(SUBSETS):
        if index % 2:
            engine.release_memory_occupation(tags)
            for tag in reversed(tags):
                engine.resume_memory_occupation([tag])
        else:
            for tag in tags:
                engine.release_memory_occupation([tag])
            engine.resume_memory_occupation(tags)
        if "weights" in tags:
            sleeper.check_lost()
            engine.update_weights(sleeper.other)
            sleeper.check_update()
        sleeper.check_serves()

    engine.release_memory_occupation(["kv_cache"])
    engine.sleep()
    assert engine.sleeping == TAGS
    engine.resume_memory_occupation(("weights", "weights"))
    engine.update_weights(sleeper.other)
    sleeper.check_update()
    engine.wake_up()
    sleeper.check_serves()


def _illegal_orders(sleeper: Sleeper) -> None:
    engine, rank = sleeper.engine, sleeper.rank
    release, resume = engine.release_memory_occupation, engine.resume_memory_occupation
    refused = sleeper.refused

    # Awake.
    refused(engine.wake_up, "nothing is released")
    refused(lambda: resume(["kv_cache"]), "kv_cache is not released: resume only what sleeps, now nothing")
    for tags in (["weigths"], [], "weights", ["weights", 3]):
        refused(lambda tags=tags: release(tags), r"some of \['weights', 'kv_cache', 'cuda_graph'\]")
        refused(lambda tags=tags: resume(tags), r"some of \['weights', 'kv_cache', 'cuda_graph'\]")
    mismatch = errors.CollectiveMismatchError
    mine = ["weights"] if rank == 0 else ["kv_cache"]
    refused(lambda: release(mine), r"rank 0: release_memory_occupation\(\['weights'\]\); rank 1: .*kv_cache", mismatch)
    refused(lambda: release(["weights"] if rank == 0 else ["wrong"]), "different calls", mismatch)
    refused(lambda: release() if rank == 0 else resume(), "different calls", mismatch)
    refused(lambda: greedy(engine) if rank == 0 else release(), "different calls", mismatch)

    # The KV cache or the graphs sleep.
    for tag in ("kv_cache", "cuda_graph"):
        release([tag])
        refused(lambda tag=tag: release([tag]), f"{tag} is released already")
        refused(lambda tag=tag: release(["weights", tag]), f"{tag} is released already")
        refused(lambda tag=tag: resume(["weights", tag]), "weights is not released")
        refused(lambda: greedy(engine), rf"resume_memory_occupation\(\['{tag}'\]\) before generate", errors.AsleepError)
        refused(lambda tag=tag: resume([tag] if rank else None), "different calls", mismatch)
        sleeper.check_update()
        resume([tag])
        sleeper.check_serves()

    # All sleeps.
    engine.sleep()
    refused(engine.sleep, "everything is released already")
    refused(lambda: release(["weights"]), "weights is released already")
    refused(lambda: greedy(engine), "before generate", errors.AsleepError)
    before_update = r"resume_memory_occupation\(\['weights'\]\) before update_weights"
    refused(lambda: engine.update_weights(sleeper.model), before_update, errors.AsleepError)
    refused(engine.weight_checksums, "before weight_checksums", errors.AsleepError)
    refused(lambda: resume(["weights"]) if rank == 0 else engine.update_weights(sleeper.model), "different", mismatch)
    engine.flush_cache()
    resume(["weights"])
    refused(lambda: resume(["weights"]), r"weights is not released: .* now \['kv_cache', 'cuda_graph'\]")
    refused(lambda: greedy(engine), "before generate", errors.AsleepError)
    sleeper.check_update()
    engine.wake_up()
    sleeper.check_serves()

    # Weights without contents serve only after an update that succeeds.
    release(["weights"])
    resume(["weights"])
    sleeper.check_lost()
    with pytest.raises(errors.PlanError):
        engine.update_weights({})
    sleeper.check_lost()
    release(["kv_cache"])
    resume(["kv_cache"])
    sleeper.check_lost()
    sleeper.check_update()
    sleeper.check_serves()


def _sources_that_moved(sleeper: Sleeper) -> None:
    """The trainer off-loads its copy while the engine sleeps, and loads it elsewhere."""
    engine = sleeper.engine
    weights = {name: tensor.detach() for name, tensor in models.make_model("llama", seed=2, **SHAPE).named_parameters()}
    assert engine.update_weights(weights).planned
    for _ in range(2):
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        engine.sleep()
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        engine.resume_memory_occupation(["weights"])
        assert not engine.update_weights(weights, verify=True).planned
        engine.resume_memory_occupation()
        sleeper.check_serves()


def with_backup(context: Any, path: str) -> dict[str, Any]:
    """Weights with a backup serve after a wake without an update."""
    with context.engine(path, context.world, enable_memory_saver=True, enable_weights_cpu_backup=True) as engine:
        tokens, checksums = greedy(engine), engine.weight_checksums()
        engine.sleep()
        with pytest.raises(errors.AsleepError, match="before update_weights"):
            engine.update_weights(models.make_model("qwen2", seed=2))
        engine.wake_up()
        assert engine.weight_checksums() == checksums and greedy(engine) == tokens
    return {}


def kept_mapped(context: Any, path: str) -> dict[str, Any]:
    """With `keep_mapped` an update after a wake has nothing to open, unless the trainer's weights have moved."""
    seconds: dict[str, list[float]] = {"kept": [], "moved": []}
    with context.engine(path, context.world, enable_memory_saver=True, keep_mapped=True) as engine:
        model = shard(models.make_model("qwen2", seed=2), context.world)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        engine.update_weights(weights)
        tokens, checksums = greedy(engine), engine.weight_checksums()
        for _ in range(2):
            for name in seconds:
                engine.sleep()
                if name == "moved":
                    weights = {name: tensor.clone() for name, tensor in weights.items()}
                engine.resume_memory_occupation(["weights"])
                stats = engine.update_weights(weights, verify=True)
                assert not stats.planned and stats.wrong_elements == 0
                engine.wake_up()
                assert greedy(engine) == tokens and engine.weight_checksums() == checksums
                seconds[name].append(stats.bind_s)
    return {name: min(values) for name, values in seconds.items()}


def two_replicas(context: Any, path: str) -> dict[str, Any]:
    """A replica that sleeps while another updates tells it so; then each wakes as it likes."""
    with context.engine(path, 1, enable_memory_saver=True) as engine:
        model = shard(models.make_model("qwen2", seed=2), context.world)
        engine.update_weights(model)
        tokens = greedy(engine)
        if context.rank == 1:
            engine.sleep()
        with pytest.raises(errors.AsleepError, match="rank 1: weights is released"):
            engine.update_weights(model)
        assert engine.weight_version == 1
        if context.rank == 1:
            engine.resume_memory_occupation(["weights"])
        else:
            assert greedy(engine) == tokens
        assert not engine.update_weights(model, verify=True).planned
        if context.rank == 1:
            engine.wake_up()
        assert greedy(engine) == tokens and engine.weight_version == 2
    return {}
