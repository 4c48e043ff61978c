"""Hangs, interrupts, loaders that raise, and neighbours in the same process."""

from __future__ import annotations

import asyncio
import atexit
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import models
import psutil
import pytest
import torch
import torch.distributed as dist

from integration.scenarios.common import GREEDY, PROMPTS, greedy, shard
from spmd_engine import errors

CALL_TIMEOUT_S = 3.0
NOTICED_S = CALL_TIMEOUT_S + 10.0


def long_rollout(engine: Any) -> None:
    engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 200})


def once_inside(engine: Any, action: Callable[[], object]) -> None:
    """Do something in another thread as soon as this one is inside a call of the engine."""

    def watch() -> None:
        while not engine._client._lock.locked():
            pass
        action()

    threading.Thread(target=watch, daemon=True).start()


# ---- hangs and interrupts ----


def silence(context: Any, path: str) -> None:
    """A rank that does not answer, or that its user interrupts, is named on all ranks; after a restart all is well."""
    with context.engine(path, context.world) as engine:
        model = shard(models.make_model("qwen2", seed=2), context.world)
        engine.update_weights(model)
        tokens = greedy(engine)

        open_files: list[int] = []

        def restarted() -> None:
            assert psutil.Process().children(recursive=True) == []
            open_files.append(len(os.listdir("/proc/self/fd")))
            engine.restart()
            assert engine.update_weights(model, verify=True).wrong_elements == 0
            assert greedy(engine) == tokens
            dist.barrier()

        _trainer_hangs(context, engine)
        restarted()
        _scheduler_hangs(context, engine)
        restarted()
        interrupted(context, engine, lambda: engine.update_weights(model))
        interrupted(context, engine, engine.restart)
    assert psutil.Process().children(recursive=True) == []
    open_files.append(len(os.listdir("/proc/self/fd")))
    assert len(set(open_files)) == 1, open_files
    dist.barrier()  # a rank that has gone leaves fewer connections to be counted on the others


def _trainer_hangs(context: Any, engine: Any) -> None:
    engine._client.timeout_s = CALL_TIMEOUT_S
    pids: list[int] = [0] * context.world
    dist.all_gather_object(pids, os.getpid())
    if context.rank == 0:
        os.kill(pids[1], signal.SIGSTOP)  # it goes no further than to the barrier
        try:
            began = time.monotonic()
            with pytest.raises(errors.CollectiveTimeoutError, match=r"generate.* for rank 1, which did not"):
                greedy(engine)
            assert time.monotonic() - began < NOTICED_S
        finally:
            os.kill(pids[1], signal.SIGCONT)
    dist.barrier()
    with pytest.raises(errors.CollectiveTimeoutError, match="for rank 1, which did not"):
        greedy(engine)


def _scheduler_hangs(context: Any, engine: Any) -> None:
    engine._client.timeout_s = CALL_TIMEOUT_S
    if context.rank == 1:
        once_inside(engine, lambda: os.kill(engine.scheduler_pid, signal.SIGSTOP))
    began = time.monotonic()
    with pytest.raises(errors.CollectiveTimeoutError, match="rank 1") as caught:
        while time.monotonic() - began < NOTICED_S:
            long_rollout(engine)
    assert time.monotonic() - began < NOTICED_S
    if context.rank == 1:
        assert f"rank 1 (pid {engine.scheduler_pid}) is stopped" in str(caught.value)


def interrupted(context: Any, engine: Any, call: Callable[[], object]) -> None:
    """Ctrl-C goes to the whole process group of rank 1, its scheduler process included."""
    if context.rank != 1:
        with pytest.raises(errors.SchedulerDiedError, match="of rank 1 was interrupted by KeyboardInterrupt"):
            while True:
                call()
        return

    done = threading.Event()

    def press() -> None:
        while not done.wait(0.02):
            os.killpg(0, signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        inner = frame
        while inner is not None and not done.is_set():
            if inner.f_code.co_name in ("prepare", "send_call", "await_ready"):  # not just between two calls
                done.set()
                signal.default_int_handler(number, frame)
            inner = inner.f_back

    previous = signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                call()
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGINT, previous)
    with pytest.raises(errors.EngineClosedError, match=r"was interrupted by KeyboardInterrupt; call restart\(\)"):
        greedy(engine)


# ---- a model's loader ----


def loader_raises(context: Any, path: str) -> None:
    """A loader that refuses a value refuses it when the other weights have moved: no tokens from the mixture."""
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "integration.checked_models"
    tests = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    with context.engine(path, context.world) as engine:
        weights = models.make_model("qwen2", seed=2).state_dict()
        stats = engine.update_weights(weights, verify=True)
        assert stats.wrong_elements == 0 and stats.fallback_weights == ("model.norm.weight",)
        tokens, checksums = greedy(engine), engine.weight_checksums()
        bad = dict(weights)
        if context.rank == 1:
            bad["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
        with pytest.raises(errors.TransferError, match=r"rank 1: ValueError: model.norm.weight is not finite"):
            engine.update_weights(bad)
        assert engine.weight_version == engine.stats().weight_version == 1
        for _ in range(2):
            with pytest.raises(errors.WeightsInconsistentError, match=r"weight version 2 failed half-way.* not finite"):
                greedy(engine)
        assert not engine.update_weights(weights, verify=True).planned
        assert engine.weight_version == 2
        assert greedy(engine) == tokens and engine.weight_checksums() == checksums
        check_different_tokens(engine, weights, tokens)


def check_different_tokens(engine: Any, weights: dict[str, torch.Tensor], tokens: Any) -> None:
    """Ranks that do not agree about a token end the engine: the next collective of theirs might never end."""

    async def beside() -> None:
        await engine.async_generate(input_ids=[5, 319], sampling_params=GREEDY)

    for collective in (True, False):
        with pytest.raises(errors.SchedulerError, match=r"TP ranks \[0, 1\] generated different tokens"):
            if collective:
                engine.generate(input_ids=[5, 319], sampling_params=GREEDY)
            elif engine.is_leader:  # it is found out at the next collective call
                asyncio.run(beside())
            engine.flush_cache()
        with pytest.raises(errors.SchedulerError, match="generated different tokens"):
            greedy(engine)
        engine.restart()
        engine.update_weights(weights)
        assert greedy(engine) == tokens


# ---- neighbours ----


def neighbours(context: Any, path: str, other: str) -> None:
    """Two engines of one job, used in turn, through a fork, a full disk, and the death of one of them."""
    logs = context.directory / "logs"
    with context.engine(path, context.world, log_dir=logs, log_level="info") as one:
        with context.engine(other, context.world) as two:
            sources = {
                engine: [shard(models.make_model(name, seed=seed), context.world) for seed in (2, 3)]
                for engine, name in ((one, "qwen2"), (two, "llama"))
            }
            expected: dict[Any, list[Any]] = {engine: [] for engine in sources}
            for engine, pair in sources.items():
                for source in pair:
                    assert engine.update_weights(source, verify=True).wrong_elements == 0
                    expected[engine].append((greedy(engine), engine.weight_checksums()))

            def check(held: dict[Any, int]) -> None:
                for engine, index in held.items():
                    assert (greedy(engine), engine.weight_checksums()) == expected[engine][index]

            check({one: 1, two: 1})
            one.update_weights(sources[one][0])
            check({one: 0, two: 1})
            two.update_weights(sources[two][0])
            check({one: 0, two: 0})

            _fork(one)
            check({one: 0, two: 0})

            limit = _fill_disk(one, logs)
            one.update_weights(sources[one][1])
            check({one: 1, two: 0})

            dist.barrier()
            if context.rank == 1:
                os.kill(two.scheduler_pid, signal.SIGKILL)
            with pytest.raises(errors.SchedulerDiedError, match="rank 1"):
                greedy(two)
            check({one: 1})
        one.update_weights(sources[one][0])
        check({one: 0})
        dist.barrier()
        if context.rank == 1:
            os.kill(one.scheduler_pid, signal.SIGKILL)
        with pytest.raises(errors.SchedulerDiedError, match="rank 1"):
            greedy(one)
        assert max(path.stat().st_size for path in logs.iterdir()) <= limit
    assert psutil.Process().children(recursive=True) == []


def _fork(engine: Any) -> None:
    """A fork of the trainer, such as a data loader's worker, can neither use nor end the engine."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for call in (lambda: greedy(engine), engine.flush_cache, engine.restart):
                with pytest.raises(errors.EngineClosedError, match="is a fork of rank"):
                    call()
            engine.shutdown()
            atexit._run_exitfuncs()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def _fill_disk(engine: Any, logs: Path) -> int:
    """From now on the scheduler process can write no further than its log is long. Returns that length."""
    dist.barrier()
    limit = max(path.stat().st_size for path in logs.iterdir())
    resource.prlimit(engine.scheduler_pid, resource.RLIMIT_FSIZE, (1, 1))
    dist.barrier()
    return limit
