"""Starting, idling, dying."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import spmd_engine
from integration.scenarios import exposure
from integration.scenarios.common import GREEDY, PROMPTS, greedy, shard
from spmd_engine import errors

# ---- the trainer process ----


def purity(context: Any, path: str) -> dict[str, Any]:
    """The trainer process stays as it was: no sglang, no environment, no patches, no random numbers, no threads."""
    from torch.multiprocessing import reductions

    model = shard(models.make_model("qwen2", seed=2), context.world)
    model(torch.tensor([[1, 2]]))  # FSDP makes its groups, which listen, when they are first used
    mesh = context.mesh(context.world)

    def state() -> dict[str, Any]:
        return {
            "environ": dict(os.environ),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "rng": torch.random.get_rng_state().tolist(),
            "reductions": {k: id(v) for k, v in vars(reductions).items() if callable(v)},
            "dispatch": {k: id(v) for k, v in vars(torch.distributed).items() if callable(v)},
            "dtype": str(torch.get_default_dtype()),
            "torch_threads": torch.get_num_threads(),
            "signals": {
                s: repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGQUIT)
            },
            "cwd": os.getcwd(),
        }

    torch.manual_seed(3)
    before = state()
    tasks = len(os.listdir("/proc/self/task"))
    listening = exposure.listening(os.getpid())
    logs = context.directory / "logs" / "deeper"
    engine = spmd_engine.SpmdEngine(path, device_mesh_cpu=mesh, timeout_s=90.0, log_dir=logs)
    greedy(engine)
    engine.update_weights(model)
    assert len(os.listdir("/proc/self/task")) == tasks
    children = psutil.Process().children(recursive=True)
    assert [child.pid for child in children] == [engine.scheduler_pid], children
    assert exposure.listening(os.getpid()) == listening
    exposure.check(engine.scheduler_pid, logs=logs)
    # What a launcher sends to the whole process group is for the trainer alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(engine.scheduler_pid, number)
    greedy(engine)
    engine.shutdown()
    after = state()
    assert {k for k in before if before[k] != after[k]} == set()
    assert [name for name in sys.modules if name.split(".")[0] == "sglang"] == []
    assert psutil.Process().children(recursive=True) == []
    return {}


def idle(context: Any, path: str) -> dict[str, Any]:
    """CPU seconds that an idle scheduler process uses while its trainer rank computes."""
    with context.engine(path, context.world) as engine:
        greedy(engine)
        child = psutil.Process(engine.scheduler_pid)
        time.sleep(1.0)
        before, began = child.cpu_times(), time.monotonic()
        while time.monotonic() - began < 5.0:
            torch.randn(200, 200) @ torch.randn(200, 200)
        used = child.cpu_times()
        seconds = used.user + used.system - before.user - before.system
        return {"share": seconds / (time.monotonic() - began)}


# ---- starts that fail ----


def bad_starts(context: Any, path: str) -> dict[str, Any]:
    """Every wrong start is a typed error on every rank, and leaves no process."""
    mesh = context.mesh(context.world)

    def refused(kind: type[Exception], match: str, model_path: str = path, **kwargs: Any) -> None:
        with pytest.raises(kind, match=match):
            spmd_engine.SpmdEngine(model_path, **{"device_mesh_cpu": mesh, "timeout_s": 60.0, **kwargs})
        assert psutil.Process().children(recursive=True) == []

    config = errors.ConfigError
    refused(config, "did you mean mem_fraction_static", mem_fraction_statik=0.5)
    refused(config, "does not exist", model_path="/no/such/model")
    for wrong in (0, math.inf, "long"):
        refused(config, "timeout_s must be above 0 and at most 2000000 seconds", timeout_s=wrong)
    refused(config, "is set by SpmdEngine", nnodes=2)
    refused(config, "one SpmdEngine a replica", dp_size=2)
    refused(config, "device_mesh_cpu has 2 ranks", tp_size=4)
    refused(config, "one dimension", device_mesh_cpu=init_device_mesh("cpu", (1, context.world)))
    refused(config, "on the CPU use grammar_backend='llguidance'", grammar_backend="xgrammar")
    refused(config, "attention_backend|choose|invalid|Invalid", attention_backend="no_such_backend")
    refused(errors.CollectiveMismatchError, "rank 0.*\n.*rank 1", context_length=128 + context.rank)
    refused(errors.CollectiveMismatchError, "'port': 1", **({"port": 1} if context.rank == 0 else {}))
    # A process that ends before it has met the others.
    with pytest.MonkeyPatch.context() as patch:
        if context.rank == 1:
            patch.setattr(sys, "executable", shutil.which("false"))
        refused(errors.SchedulerDiedError, r"scheduler process of rank 1 ended during start \(exit status 1\)")
    # One that cannot even be started.
    with pytest.MonkeyPatch.context() as patch:
        if context.rank == 1:
            patch.setattr(sys, "executable", "/no/such/python")
            refused(config, "process of rank 1 has a problem: it could not be started: FileNotFoundError: ")
        else:
            refused(errors.SchedulerDiedError, "of rank 1 ended during start: it could not be started: FileNotFound")
    dist.barrier()  # rank 0 serves the store of the others
    return {}


def heads_not_divisible(context: Any, path: str) -> dict[str, Any]:
    with pytest.raises(errors.ConfigError, match="TP 2"):
        context.engine(path, context.world)
    assert psutil.Process().children(recursive=True) == []
    return {}


# ---- deaths ----


def kill_scheduler(context: Any, path: str, during: str) -> dict[str, Any]:
    """`kill -9` of rank 1's scheduler process in the middle of a call."""
    engine = context.engine(path, context.world)
    model = shard(models.make_model("qwen2", seed=2), context.world)
    engine.update_weights(model)
    dist.barrier()
    killed = time.monotonic()
    if context.rank == 1:
        threading.Timer(0.4, lambda: os.kill(engine.scheduler_pid, signal.SIGKILL)).start()
    with pytest.raises(errors.SchedulerDiedError) as caught:
        while True:
            if during == "generate":
                engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 200})
            else:
                engine.update_weights(model)
    seconds = time.monotonic() - killed - 0.4
    assert seconds < 10.0, seconds
    assert caught.value.rank == 1 and "rank 1" in str(caught.value)
    assert caught.value.exit_status == -signal.SIGKILL
    with pytest.raises(errors.SchedulerDiedError, match="rank 1"):
        engine.generate(input_ids=[1])
    assert psutil.Process().children(recursive=True) == []
    engine.shutdown()
    return {"seconds": seconds}


def restart(context: Any, path: str, tp: int) -> dict[str, Any]:
    """After a death the trainer goes on: new processes, then new weights, then tokens as before."""
    with context.engine(path, tp) as engine:
        model = shard(models.make_model("qwen2", seed=2), context.world)
        engine.update_weights(model)
        checksums, tokens = engine.weight_checksums(), greedy(engine)
        dist.barrier()
        if context.rank == 1:
            os.kill(engine.scheduler_pid, signal.SIGKILL)
        with pytest.raises(errors.SchedulerDiedError):
            engine.update_weights(model)
        engine.restart()
        assert engine.weight_version == 1
        with pytest.raises(errors.WeightsInconsistentError, match="restarted"):
            greedy(engine)
        stats = engine.update_weights(model, verify=True)
        assert (stats.weight_version, stats.planned, stats.wrong_elements) == (2, True, 0)
        assert engine.weight_checksums() == checksums and greedy(engine) == tokens
        # One that is shut down, and one that runs, can be restarted, too.
        engine.shutdown()
        engine.restart()
        engine.restart()
        last = engine.update_weights(model, verify=True)
        assert last.weight_version == 3
        assert greedy(engine) == tokens
        stats = engine.stats()
        assert (stats.weight_version, stats.restarts, stats.updates, stats.rollouts) == (3, 3, 3, 3)
        assert stats.last_update == last and stats.local_bytes == 3 * last.local_bytes and stats.update_s > last.total_s
        assert stats.sequences == 3 * len(PROMPTS) and stats.prompt_tokens == 3 * sum(map(len, PROMPTS))
        assert stats.completion_tokens == 9 * GREEDY["max_new_tokens"] and stats.generate_s > 0
    with pytest.raises(errors.EngineClosedError):
        greedy(engine)
    assert psutil.Process().children(recursive=True) == []
    return {}


def kill_trainer(context: Any, path: str) -> dict[str, Any]:
    """Rank 1's trainer is killed while rank 0 generates."""
    engine = context.engine(path, context.world)
    greedy(engine)
    (context.directory / f"scheduler{context.rank}.pid").write_text(str(engine.scheduler_pid))
    dist.barrier()
    if context.rank == 1:
        threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(errors.SchedulerDiedError) as caught:
        while True:
            engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 200})
    assert time.monotonic() - began < 10.4
    assert caught.value.rank == 1 and "trainer" in str(caught.value)
    return {}


def peer_shuts_down(context: Any, path: str) -> dict[str, Any]:
    """A rank that leaves tells the others."""
    engine = context.engine(path, context.world)
    greedy(engine)
    if context.rank == 1:
        engine.shutdown()
    else:
        with pytest.raises(errors.EngineClosedError, match="rank 1"):
            greedy(engine)
        assert psutil.Process().children(recursive=True) == []
    return {}


def exit_without_shutdown(context: Any, path: str) -> dict[str, Any]:
    """Called in a process of its own by the test: Python ends without `shutdown`."""
    engine = context.engine(path, context.world)
    (context.directory / f"scheduler{context.rank}.pid").write_text(str(engine.scheduler_pid))
    Path(context.directory / f"rank{context.rank}.json").write_text(json.dumps({}))
    sys.exit(0)
