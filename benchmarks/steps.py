"""What every rank of `rl_step.py` does: the loop on one engine after the other, from the same weights."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import report
import step_report
import torch
import torch.distributed as dist
from baselines import BaselineError, StockReplica
from job import Job, args_of_both_engines, joined
from machine import PeakMemory, header
from step_report import OURS, STEP, THEIRS
from trainers import make_trainer, renew

from spmd_engine import SpmdEngine

WEIGHTS, REST = ["weights"], ["kv_cache", "cuda_graph"]
WARMUP = 2
WEIGHTS_SEED = 2
LEARNING_RATE = 1e-3  # bfloat16 would round much smaller steps away
BUCKET_BYTES = 512 << 20  # verl's default
WRONG = 3  # exit status: weights differ

Tokens = list[list[int]]
Measured = Callable[[str, Callable[[], Any]], Any]


def run_rank(args: argparse.Namespace) -> int:
    """The whole benchmark on this rank; rank 0 prints and writes. Returns the exit status."""
    with joined(args, name="rl-step", server_args=_server_args(args)) as job:
        result = _measure(job)
    return WRONG if any(found["wrong_elements"] for found in result["engines"].values()) else 0


def _server_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of both engines: the KV cache holds a rollout."""
    sequences, tokens = args.rollout
    made = {"load_format": "dummy", **args_of_both_engines(sequences * (args.prompt_tokens + tokens))}
    if torch.cuda.is_available():
        made["disable_prefill_cuda_graph"] = True  # these graphs cannot be released
    return {**made, **args.server_args}


# ---- the engines, as the loop uses them ----


class Engine(Protocol):
    """Collective over the ranks of a replica, but for `shutdown`."""

    pids: list[int]
    sleeps: bool

    def settle(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self, tags: list[str]) -> None: ...

    def update(self, model: torch.nn.Module) -> None: ...

    def generate(self, prompts: Tokens, params: Mapping[str, Any]) -> Tokens: ...

    def wrong_elements(self, model: torch.nn.Module) -> int | None:
        """After the loop: how many elements differ from the trainer's, None if only changes can be told."""

    def shutdown(self) -> None: ...


class Ours:
    """SpmdEngine."""

    sleeps = True

    def __init__(self, job: Job) -> None:
        arguments = {**job.server_args, "enable_memory_saver": True, "keep_mapped": job.args.keep_mapped}
        self._engine = SpmdEngine(job.path, device_mesh_cpu=job.mesh, timeout_s=job.args.timeout, **arguments)
        self.pids = [self._engine.scheduler_pid]

    def settle(self) -> None:
        """Nothing to do: calls take turns."""

    def sleep(self) -> None:
        self._engine.sleep()

    def wake(self, tags: list[str]) -> None:
        self._engine.resume_memory_occupation(tags)

    def update(self, model: torch.nn.Module) -> None:
        self._engine.update_weights(model)

    def generate(self, prompts: Tokens, params: Mapping[str, Any]) -> Tokens:
        outputs = self._engine.generate(input_ids=prompts, sampling_params=params)
        assert isinstance(outputs, list)
        return [list(output["output_ids"]) for output in outputs]

    def wrong_elements(self, model: torch.nn.Module) -> int | None:
        return self._engine.update_weights(model, verify=True).wrong_elements

    def shutdown(self) -> None:
        self._engine.shutdown()


class Theirs:
    """`sglang.Engine` behind the first rank of each replica."""

    def __init__(self, job: Job) -> None:
        self.sleeps = job.on_gpu
        arguments = {**job.server_args, "enable_memory_saver": self.sleeps}
        self._tp_rank = job.mesh.get_local_rank()
        self._replica = StockReplica(job.path, job.mesh, device=job.device, server_args=arguments, scratch=job.scratch)
        self.pids = self._replica.pids
        self._first: dict[str, str] = {}

    def settle(self) -> None:
        self._replica.settle()

    def sleep(self) -> None:
        self._replica.release()

    def wake(self, tags: list[str]) -> None:
        self._replica.resume(tags)

    def update(self, model: torch.nn.Module) -> None:
        self._replica.update("sglang-flattened", model, bucket_bytes=BUCKET_BYTES)
        if not self._first:  # in a step that does not count
            self._first = self._replica.digests(exact=False)[self._tp_rank]

    def generate(self, prompts: Tokens, params: Mapping[str, Any]) -> Tokens:
        return self._replica.generate(prompts, params)

    def wrong_elements(self, model: torch.nn.Module) -> int | None:
        """Not told.

        Raises:
            BaselineError: a parameter is as it was after the first update.
        """
        last = self._replica.digests(exact=False)[self._tp_rank]
        stale = [name for name, digest in last.items() if self._first[name] == digest]
        if stale:
            raise BaselineError(f"updates left {len(stale)} of {len(last)} parameters as they were, e.g. {stale[:3]}")
        return None

    def shutdown(self) -> None:
        self._replica.shutdown()


ENGINES: dict[str, Callable[[Job], Engine]] = {OURS: Ours, THEIRS: Theirs}
CHOSEN = {"both": (OURS, THEIRS), "spmd": (OURS,), "sglang": (THEIRS,)}


# ---- the loop ----


def _measure(job: Job) -> dict[str, Any]:
    args, leads = job.args, dist.get_rank() == 0
    model = make_trainer(job.path, "fsdp2", dtype=torch.bfloat16, device=job.device)
    facts = {name: getattr(args, name) for name in ("model", "tp", "dp", "steps", "prompt_tokens")}
    facts["keep_mapped"] = args.keep_mapped
    for name in ("rollout", "train_tokens"):
        facts[name] = "x".join(map(str, getattr(args, name)))
    facts["kv_tokens"] = job.server_args["max_total_tokens"]
    result: dict[str, Any] = {"header": header(job.device, **facts), "server_args": job.server_args, "engines": {}}
    rollouts = {}
    for name in CHOSEN[args.engines]:
        renew(model, seed=WEIGHTS_SEED)
        gc.collect()  # the optimizer of the loop before
        if job.on_gpu:
            torch.cuda.empty_cache()
        job.align()
        began = time.perf_counter()
        engine = ENGINES[name](job)
        try:
            job.align()
            start_s = time.perf_counter() - began
            found, rollouts[name] = _loop(job, model, engine)
            job.align()
        finally:
            engine.shutdown()
        result["engines"][name] = {"start_s": start_s, **found}
        if leads:
            step_report.print_engine(result, name)
            _write(args, result)
    result["rollouts"] = _compared(job, rollouts)
    if leads:
        step_report.print_comparison(result)
        _write(args, result)
    return result


def _loop(job: Job, model: torch.nn.Module, engine: Engine) -> tuple[dict[str, Any], list[Tokens]]:
    """All steps on this rank: what all ranks measured, and the tokens of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rows, losses, rollouts = [], [], []
    for number in range(WARMUP + job.args.steps):
        row: dict[str, float] = {}
        loss, tokens = _step(job, model, optimizer, engine, number, _timed(job, row))
        rows.append(row)
        losses.append(loss)
        rollouts.append(tokens)
    levels: dict[str, dict[str, int]] = {}
    _step(job, model, optimizer, engine, WARMUP + job.args.steps, _sampled(job, engine, levels))
    wrong = engine.wrong_elements(model)
    ranks = job.gather({"rows": rows[WARMUP:], "losses": losses, "levels": levels, "wrong": wrong})
    steps = [_slowest(of_ranks) for of_ranks in zip(*(rank["rows"] for rank in ranks), strict=True)]
    return {
        "phases_s": report.slowest([steps]),
        "steps_s": steps,
        "memory": {
            phase: {key: max(rank["levels"][phase][key] for rank in ranks) for key in level}
            for phase, level in levels.items()
        },
        "losses": [sum(of_ranks) / len(ranks) for of_ranks in zip(*(rank["losses"] for rank in ranks), strict=True)],
        "wrong_elements": None if wrong is None else sum(rank["wrong"] for rank in ranks),
    }, rollouts


def _step(
    job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, engine: Engine, number: int, measured: Measured
) -> tuple[float, Tokens]:
    """One step: this rank's loss, and its replica's tokens."""
    batch, prompts = _batch(job, number), _prompts(job, number)
    sequences, tokens = job.args.rollout
    params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    if engine.sleeps:
        engine.settle()
        measured("sleep", engine.sleep)
    loss = measured("train", lambda: _train(model, optimizer, batch))
    if engine.sleeps:
        measured("wake weights", lambda: engine.wake(WEIGHTS))
    measured("update_weights", lambda: engine.update(model))
    if engine.sleeps:
        measured("wake KV cache", lambda: engine.wake(REST))
    made = measured("rollout", lambda: engine.generate(prompts, params))
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss of step {number} is {loss}")
    if [len(output) for output in made] != [tokens] * sequences:
        raise RuntimeError(f"step {number} did not make {tokens} tokens of each of {sequences} prompts")
    return loss, made


def _timed(job: Job, row: dict[str, float]) -> Measured:
    """Puts the seconds of each phase into `row`: from when all ranks are ready until this one's share is done."""

    def measured(phase: str, action: Callable[[], Any]) -> Any:
        job.align()
        began = time.perf_counter()
        value = action()
        if job.on_gpu:
            torch.cuda.synchronize()
        row[phase] = time.perf_counter() - began
        return value

    return measured


def _sampled(job: Job, engine: Engine, levels: dict[str, dict[str, int]]) -> Measured:
    """Puts the memory of each phase into `levels`, of which no time is taken: the peak, and what is left after it.

    All memory in use on this rank's GPU; on the CPU the resident memory of all processes, for rank 0.
    """
    watched = job.watched([os.getpid(), *engine.pids])

    def measured(phase: str, action: Callable[[], Any]) -> Any:
        job.align()
        with PeakMemory(job.device, watched) as memory:
            value = action()
            job.align()
        after = memory.level()
        levels[phase] = {"peak_bytes": max(memory.peak, after), "after_bytes": after}
        return value

    return measured


def _slowest(of_ranks: tuple[dict[str, float], ...]) -> dict[str, float]:
    """What each phase of a step took the slowest rank, and their sum: nobody begins a phase before all are there."""
    row = {phase: max(rank[phase] for rank in of_ranks) for phase in of_ranks[0]}
    return {**row, STEP: sum(row.values())}


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """One optimizer step. Gradients and cached memory are given back, as verl does before an engine wakes."""
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if batch.is_cuda:
        torch.cuda.empty_cache()
    return loss.item()


def _batch(job: Job, number: int) -> torch.Tensor:
    """Random tokens [sequences, tokens], other ones on each rank and in each step, the same in both loops."""
    seed = number * dist.get_world_size() + dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(job.vocabulary, job.args.train_tokens, generator=generator).to(job.device)


def _prompts(job: Job, number: int) -> Tokens:
    """Random tokens, the same on all ranks of a replica, other ones in each step, the same in both loops."""
    first_rank = int(job.mesh.mesh.flatten()[0])
    draw, vocabulary = random.Random(f"{number} {first_rank}"), job.vocabulary
    return [[draw.randrange(3, vocabulary) for _ in range(job.args.prompt_tokens)] for _ in range(job.args.rollout[0])]


def _compared(job: Job, rollouts: dict[str, list[Tokens]]) -> dict[str, int] | None:
    """How many requests got other tokens from one engine than from the other; None if only one ran."""
    if len(rollouts) < 2:
        return None
    pairs = [pair for steps in zip(*rollouts.values(), strict=True) for pair in zip(*steps, strict=True)]
    mine = sum(a != b for a, b in pairs) if job.mesh.get_local_rank() == 0 else 0
    return {"requests": len(pairs) * job.args.dp, "differing": sum(job.gather(mine))}


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))
