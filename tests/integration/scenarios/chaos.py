"""Seeded random faults over a loop of rollouts and weight updates."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import models
import psutil
import pytest
import torch.distributed as dist

from integration.scenarios.common import GREEDY, PROMPTS, greedy, shard
from spmd_engine import errors

CALL_TIMEOUT_S = 8.0
NOTICED_S = CALL_TIMEOUT_S + 10.0
# Deaths and hangs cost a restart each: they are rarer.
STEPS = {"rollout": 3, "update": 3, "late": 2, "bad_input": 2, "mismatch": 2, "nap": 2, "kill": 2, "stop": 1}


class Chaos:
    """One rank of the loop. All ranks draw the same steps."""

    def __init__(self, context: Any, path: str, seed: int) -> None:
        self.context, self.random = context, random.Random(seed)
        self.engine = context.engine(path, context.world, enable_memory_saver=True)
        self.sources = [shard(models.make_model("qwen2", seed=seed), context.world) for seed in (2, 3)]
        self.engine._client.timeout_s = CALL_TIMEOUT_S
        self.tokens = []
        for current in range(len(self.sources)):
            self.engine.update_weights(self.sources[current])
            self.tokens.append(greedy(self.engine))
            self.current = current
        assert self.tokens[0] != self.tokens[1]

    def run(self, steps: int) -> dict[str, int]:
        """Take some steps; how often each kind was taken."""
        taken = dict.fromkeys(STEPS, 0)
        for number in range(steps):
            # Each kind once, then at random.
            kinds, odds = list(STEPS), list(STEPS.values())
            kind = kinds[number] if number < len(kinds) else self.random.choices(kinds, odds)[0]
            print(f"step {number}: {kind}", flush=True)
            getattr(self, kind)()
            self.rollout()
            taken[kind] += 1
        self.engine.shutdown()
        assert psutil.Process().children(recursive=True) == []
        return taken

    def rollout(self) -> None:
        assert greedy(self.engine) == self.tokens[self.current]

    def update(self) -> None:
        self.current = self.random.randrange(len(self.sources))
        stats = self.engine.update_weights(self.sources[self.current], verify=True)
        assert stats.wrong_elements == 0

    def late(self) -> None:
        late, delay_s = self.random.randrange(self.context.world), self.random.uniform(0.0, 0.5)
        if self.context.rank == late:
            time.sleep(delay_s)
        self.random.choice([self.rollout, self.update])()

    def bad_input(self) -> None:
        call, kind = self.random.choice(
            [
                (lambda: self.engine.generate(input_ids=[10**6]), errors.InvalidRequestError),
                (lambda: self.engine.generate(input_ids=[1], sampling_params={"top_p": 7}), errors.InvalidRequestError),
                (lambda: self.engine.update_weights({}), errors.PlanError),
                (lambda: self.engine.resume_memory_occupation(["weights"]), errors.MemoryOccupationError),
            ]
        )
        with pytest.raises(kind):
            call()

    def mismatch(self) -> None:
        odd = self.random.randrange(self.context.world)
        with pytest.raises(errors.CollectiveMismatchError):
            if self.context.rank == odd:
                self.engine.flush_cache()
            else:
                self.engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)

    def nap(self) -> None:
        tags = self.random.sample(["weights", "kv_cache", "cuda_graph"], self.random.randint(1, 3))
        self.engine.release_memory_occupation(tags)
        with pytest.raises(errors.AsleepError):
            greedy(self.engine)
        self.random.shuffle(tags)
        for tag in tags:
            self.engine.resume_memory_occupation([tag])
        if "weights" in tags:
            with pytest.raises(errors.WeightsInconsistentError):
                greedy(self.engine)
            self.update()

    def kill(self) -> None:
        victim = self.random.randrange(self.context.world)
        error = self._fail(victim, signal.SIGKILL, errors.SchedulerDiedError)
        assert error.rank == victim and error.exit_status == -signal.SIGKILL

    def stop(self) -> None:
        self._fail(self.random.randrange(self.context.world), signal.SIGSTOP, errors.CollectiveTimeoutError)

    def _fail(self, victim: int, how: int, kind: type[Exception]) -> Any:
        """Something happens to a scheduler process in the middle of calls; then the engine is restarted."""
        call: Callable[[], Any] = self.random.choice([self.rollout, self.update])
        delay_s = self.random.uniform(0.0, 0.3)
        common = self.random.getstate()  # a rank may begin one call more than the other
        dist.barrier()
        if self.context.rank == victim:
            threading.Timer(delay_s, os.kill, (self.engine.scheduler_pid, how)).start()
        began = time.monotonic()
        with pytest.raises(kind) as caught:
            while time.monotonic() - began < NOTICED_S:
                call()
        assert time.monotonic() - began < NOTICED_S
        self.random.setstate(common)
        self.engine.restart()
        self.engine._client.timeout_s = CALL_TIMEOUT_S
        with pytest.raises(errors.WeightsInconsistentError):
            greedy(self.engine)
        self.update()
        return caught.value


def faults(context: Any, path: str, seed: int, steps: int) -> dict[str, int]:
    """Never a hang, never a wrong token, never a leftover."""
    return Chaos(context, path, seed).run(steps)
