"""Runs jobs on GPUs, several at a time: one engine each, which serves one scenario after the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from gpu.scenarios import END, START
from integration.jobs import free_port
from integration.nodes import Node

from spmd_engine.trainer.environment import with_this_package

WORKER = Path(__file__).with_name("worker.py")
TESTS = Path(__file__).parents[1]
GRACE_S = 15.0
# A first start compiles kernels. Long scenarios are those that start engines anew.
ATTEMPT_S, SCENARIO_S = 300.0, 240.0


@dataclass(frozen=True)
class Job:
    """Trainer ranks with one engine of a given shape, and the scenarios that it serves.

    Attributes:
        scenarios: "module.function" of `gpu.scenarios`.
        model: a name of `models.CONFIGS`; None for a job without an engine.
        world: ranks; each has a GPU.
        one_gpu_each: a rank sees its own GPU only, as under Ray.
        alone: it measures or takes all memory of its GPUs, so no other job runs on them.
        two_nodes: each rank is on a node of its own.
        env: more environment variables of the ranks.
        server_args: more arguments of the engine.
    """

    name: str
    scenarios: tuple[str, ...]
    model: str | None = "qwen2"
    tp: int = 1
    world: int = 1
    one_gpu_each: bool = False
    alone: bool = False
    two_nodes: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    server_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[str, ...]:
        """The start of the engine, the scenarios, and the end."""
        return (START, *self.scenarios, END)


@dataclass(frozen=True)
class Result:
    """How one step of a job went.

    Attributes:
        outcome: "passed", "failed" or "skipped".
        seconds: on the slowest rank.
        text: output of the ranks, or why it did not run.
    """

    outcome: str
    seconds: float
    text: str


class _Attempt:
    """The processes of a job, from a start to an end."""

    def __init__(
        self, job: Job, scenarios: tuple[str, ...], directory: Path, path: str, gpus: list[str], nodes: Sequence[Node]
    ) -> None:
        directory.mkdir(parents=True)
        self.job, self.scenarios, self.gpus = job, scenarios, gpus
        self._directory = directory
        self._deadline = time.monotonic() + ATTEMPT_S + SCENARIO_S * len(scenarios)
        self._late = ""
        wanted = json.dumps({**asdict(job), "scenarios": scenarios, "path": path})
        port, self._ranks = str(free_port()), []
        for rank in range(job.world):
            env = {**with_this_package(os.environ), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env["PYTHONPATH"] = os.pathsep.join([str(TESTS), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
            env.update(WORLD_SIZE=str(job.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
            env["CUDA_VISIBLE_DEVICES"] = gpus[rank] if gpus and job.one_gpu_each else ",".join(gpus)
            if nodes:
                env.update(nodes[rank].environment(nodes[0], ipv6=False), LOCAL_RANK="0")
                # NCCL would see through it: the nodes are one machine.
                env.update(NCCL_SOCKET_IFNAME=env["GLOO_SOCKET_IFNAME"], NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")
            env.update(job.env)
            with open(self._log(rank), "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, str(WORKER), wanted],
                    cwd=directory,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=nodes[rank].enter if nodes else None,
                )
            self._ranks.append(process)

    def _log(self, rank: int) -> Path:
        return self._directory / f"rank{rank}.log"

    def is_over(self) -> bool:
        """Whether all ranks have ended; those that wait too long for others are ended."""
        if all(rank.poll() is not None for rank in self._ranks):
            return True
        if any(rank.poll() for rank in self._ranks):  # the others may wait for the one that failed
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > self._deadline:
            self._late = f"ended by force, with {[rank.poll() for rank in self._ranks]} as the status of its ranks\n"
            self.end()
            return True
        return False

    def end(self) -> None:
        for process in self._ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def collect(self) -> dict[str, Result]:
        """Results of the steps that began, in order; the last may have failed."""
        found: dict[str, Result] = {}
        records = [self._records(rank) for rank in range(self.job.world)]
        for step in (START, *self.scenarios, END):
            of_ranks = [record[step] for record in records if step in record]
            seconds = max((record["seconds"] for record in of_ranks), default=0.0)
            if len(of_ranks) == len(records) and all(record["passed"] for record in of_ranks):
                found[step] = Result("passed", seconds, "\n".join(record["text"] for record in of_ranks))
                continue
            found[step] = Result("failed", seconds, self._late + self._logs())
            break
        return found

    def _records(self, rank: int) -> dict[str, Any]:
        path = self._directory / f"rank{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {record["step"]: record for record in map(json.loads, lines)}

    def _logs(self) -> str:
        texts = (self._log(rank).read_text(errors="replace")[-6000:] for rank in range(self.job.world))
        return "\n".join(f"---- rank {rank} ----\n{text}" for rank, text in enumerate(texts))


class Runner:
    """Runs jobs in the order given, as many at a time as the GPUs take. A failure hides no later scenario of its job:
    those run on a new engine.

    Args:
        jobs: what to run.
        root: an empty directory.
        gpus: values of CUDA_VISIBLE_DEVICES, one for each GPU.
        jobs_a_gpu: jobs at a time on a GPU, unless one wants it alone.
        checkpoint: gives the path of a saved model by its name.
        make_nodes: makes two nodes, or skips.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        root: Path,
        gpus: Sequence[str],
        *,
        jobs_a_gpu: int,
        checkpoint: Callable[[str], str],
        make_nodes: Callable[[], contextlib.AbstractContextManager[Sequence[Node]]],
    ) -> None:
        self._waiting = [(job, job.scenarios) for job in jobs]
        self._root, self._gpus, self._slots = root, list(gpus), jobs_a_gpu
        self._checkpoint, self._make_nodes = checkpoint, make_nodes
        self._running: list[tuple[_Attempt, contextlib.ExitStack]] = []
        self._results: dict[tuple[str, str], Result] = {}
        self._started = 0

    def result(self, job: str, step: str) -> Result:
        """Wait for a step of a job, and look after the others meanwhile."""
        while (job, step) not in self._results:
            self._poll()
            time.sleep(0.1)
        return self._results[job, step]

    def close(self) -> None:
        for attempt, resources in self._running:
            attempt.end()
            resources.close()
        self._running.clear()

    def _poll(self) -> None:
        for entry in list(self._running):
            attempt, resources = entry
            if attempt.is_over():
                self._running.remove(entry)
                resources.close()
                self._take(attempt)
        for entry in list(self._waiting):
            job, scenarios = entry
            if (gpus := self._free_gpus(job)) is not None:
                self._waiting.remove(entry)
                self._start(job, scenarios, gpus)

    def _free_gpus(self, job: Job) -> list[str] | None:
        """GPUs for a job, those with the fewest jobs first; None while too few are free."""
        if not self._gpus:  # on the CPU
            return [] if len(self._running) < self._slots else None
        taken = dict.fromkeys(self._gpus, 0)
        for attempt, _ in self._running:
            for gpu in attempt.gpus:
                taken[gpu] += self._slots if attempt.job.alone else 1
        limit = 0 if job.alone else self._slots - 1
        free = sorted((gpu for gpu in self._gpus if taken[gpu] <= limit), key=taken.__getitem__)
        return free[: job.world] if len(free) >= job.world else None

    def _start(self, job: Job, scenarios: tuple[str, ...], gpus: list[str]) -> None:
        resources = contextlib.ExitStack()
        try:
            nodes = resources.enter_context(self._make_nodes()) if job.two_nodes else ()
        except pytest.skip.Exception as reason:
            self._finish(job, job.steps, Result("skipped", 0.0, str(reason)))
            return
        path = "" if job.model is None else self._checkpoint(job.model)
        self._started += 1
        directory = self._root / f"{job.name}-{self._started}"
        self._running.append((_Attempt(job, scenarios, directory, path, gpus, nodes), resources))

    def _take(self, attempt: _Attempt) -> None:
        """Keep what an attempt found, and put what it did not come to in line again."""
        job, found = attempt.job, attempt.collect()
        for step, result in found.items():
            self._results.setdefault((job.name, step), result)
        left = tuple(scenario for scenario in attempt.scenarios if scenario not in found)
        if left and found[START].outcome == "passed":
            self._waiting.insert(0, (job, left))
            return
        last = list(found.values())[-1]
        self._finish(job, job.steps, replace(last, seconds=0.0, text=f"not run: the job ended before\n{last.text}"))

    def _finish(self, job: Job, steps: Sequence[str], result: Result) -> None:
        for step in steps:
            self._results.setdefault((job.name, step), result)
