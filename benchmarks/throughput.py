"""What every rank of `generate.py` does: both engines in turns, then what they hold, then who waits how."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import throughput_report as report
import torch
import torch.distributed as dist
from job import Job, args_of_both_engines, joined
from machine import header
from processes import busy_shares, cpu_s, held_by
from stock import StockEngine

from spmd_engine import SpmdEngine

ALONE, ALONE_TOKENS = 8, 32  # requests that run one at a time
SETTLE_S = 1.0
WITH_ASYNC = {None: (False,), "also": (False, True), "only": (True,)}
WRONG = 3  # exit status: the engines made different tokens

Prompts = list[list[int]]
Made = tuple[float, float, Prompts]  # seconds, CPU seconds of all processes of the engine, tokens


def run_rank(args: argparse.Namespace) -> int:
    """The whole benchmark on this rank; rank 0 prints and writes. Returns the exit status."""
    with joined(args, name="generate", server_args=args.server_args, backend="gloo") as job:
        result = _measure(replace(job, server_args=_server_args(job)))
    return WRONG if result["alone"]["differing_requests"] else 0


def _server_args(job: Job) -> dict[str, Any]:
    """Arguments of both engines: the KV cache holds the largest case."""
    needed = max(requests * (job.args.prompt_tokens + tokens) for requests, tokens in job.args.cases)
    made = args_of_both_engines(needed)
    if not any(job.path.glob("*.safetensors")):
        made["load_format"] = "dummy"
    return {**made, **job.server_args}


def _prompts(job: Job, count: int, *seeds: object) -> Prompts:
    """Random ones, the same on all ranks. Other seeds give others, so that no prefix cache has them."""
    draw, vocabulary = random.Random(repr(seeds)), job.vocabulary
    return [[draw.randrange(3, vocabulary) for _ in range(job.args.prompt_tokens)] for _ in range(count)]


class Both:
    """Both engines: SpmdEngine on all ranks, `sglang.Engine` behind the first one. Collective over the ranks."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._before = held_by({os.getpid(): "trainer"})[0]
        self._stock: StockEngine | None = None
        self.start_s: dict[str, list[float]] = {report.OURS: [], report.THEIRS: []}
        for number in range(job.args.starts):
            if number:
                self.shutdown()
            dist.barrier()
            began = time.perf_counter()
            self.engine = SpmdEngine(job.path, device_mesh_cpu=job.mesh, timeout_s=job.args.timeout, **job.server_args)
            dist.barrier()
            self.start_s[report.OURS].append(time.perf_counter() - began)
            if job.leads:
                self._stock = StockEngine(
                    {"model_path": str(job.path), "tp_size": job.args.tp, "log_level": "error", **job.server_args},
                    on_cpu=not job.on_gpu,
                    scratch=job.scratch,
                    timeout_s=job.args.timeout,
                )
                self.start_s[report.THEIRS].append(self._stock.start_s)
            dist.barrier()
        ranks = job.gather({os.getpid(): "trainer", self.engine.scheduler_pid: "scheduler"})
        self._roles: dict[int, str] = {pid: role for roles in ranks for pid, role in roles.items()}

    @property
    def max_total_tokens(self) -> int:
        """Of the KV cache of `sglang.Engine`, on the first rank."""
        return 0 if self._stock is None else self._stock.max_total_tokens

    def ours(self, prompts: Prompts, params: dict[str, Any], *, beside: bool) -> Made:
        """What SpmdEngine makes and takes; with `beside` on the first rank alone, while the others wait."""
        dist.barrier()
        began, cpu_before = time.perf_counter(), cpu_s(self._roles)
        outputs: Any = []
        if not beside:
            outputs = self.engine.generate(input_ids=prompts, sampling_params=params)
        elif self._job.leads:
            outputs = asyncio.run(generate_beside(self.engine, prompts, params))
        made = time.perf_counter() - began, cpu_s(self._roles) - cpu_before
        dist.barrier()
        return *made, [output["output_ids"] for output in outputs]

    def theirs(self, prompts: Prompts, params: dict[str, Any], *, beside: bool) -> Made:
        """What `sglang.Engine` makes and takes, on the first rank."""
        made: Made = (0.0, 0.0, [])
        if self._stock is not None:
            made = self._stock.generate(prompts, params, beside=beside)
        dist.barrier()
        return made

    def held(self) -> dict[str, Any]:
        """Memory of all processes of each engine, on all ranks."""
        mine = held_by({os.getpid(): "trainer", self.engine.scheduler_pid: "scheduler"})
        ranks = self._job.gather((mine, self._before))
        ours = [one for processes, _ in ranks for one in processes]
        found = {report.OURS: {"processes": ours, "hosts_before": [before for _, before in ranks]}}
        if self._stock is not None:
            theirs, before = self._stock.held()
            found[report.THEIRS] = {"processes": theirs, "hosts_before": [before]}
        return {
            name: {key: [asdict(one) for one in values] for key, values in lists.items()}
            for name, lists in found.items()
        }

    def idle(self) -> dict[str, dict[str, dict[str, float]]]:
        """Which share of a core each process uses while nothing runs, on the first rank; see `busy_shares`."""
        dist.barrier()
        time.sleep(SETTLE_S)  # the last call has just returned
        found = {}
        if self._stock is not None:
            found[report.OURS] = busy_shares(self._roles, self._job.args.idle_s)
            with self._stock.awake():
                found[report.THEIRS] = busy_shares(self._stock.pids, self._job.args.idle_s)
        dist.barrier()
        return found

    def shutdown(self) -> None:
        """End both engines. Waits for no other rank."""
        self.engine.shutdown()
        if self._stock is not None:
            self._stock.shutdown()


async def generate_beside(engine: SpmdEngine, prompts: Prompts, params: dict[str, Any]) -> list[Any]:
    """A request each, all at once."""
    requests = (engine.async_generate(input_ids=prompt, sampling_params=params) for prompt in prompts)
    return list(await asyncio.gather(*requests))


def _measure(job: Job) -> dict[str, Any]:
    args = job.args
    facts = {name: getattr(args, name) for name in ("model", "tp", "prompt_tokens", "rounds")}
    both = Both(job)
    try:
        result: dict[str, Any] = {
            "header": header(job.device, **facts, cores=os.cpu_count(), kv_tokens=both.max_total_tokens),
            "server_args": job.server_args,
            "alone": _alone(job, both),
            "cases": [],
            "waiting": None,
        }
        for requests, tokens in args.cases:
            for beside in WITH_ASYNC[args.beside]:
                result["cases"].append(_case(job, both, requests, tokens, beside))
                if job.leads:
                    report.print_case(result["cases"][-1])
                    _write(args, result)
        result.update(start_s=both.start_s, memory=both.held(), idle=both.idle())
        if args.waiting_ranks:
            result["waiting"] = _waiting(job, both)
        if job.leads:
            report.print_rest(result)
            _write(args, result)
        return result
    finally:
        both.shutdown()


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


def _params(tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}


def _alone(job: Job, both: Both) -> dict[str, int]:
    """Requests one at a time: whether both engines make the same tokens of them."""
    differing = 0
    for prompt in _prompts(job, ALONE, "alone"):
        *_, ours = both.ours([prompt], _params(ALONE_TOKENS), beside=False)
        *_, theirs = both.theirs([prompt], _params(ALONE_TOKENS), beside=False)
        differing += job.leads and ours != theirs
    shared = [differing]
    dist.broadcast_object_list(shared, src=0)
    return {"requests": ALONE, "tokens": ALONE_TOKENS, "differing_requests": shared[0]}


def _case(job: Job, both: Both, requests: int, tokens: int, beside: bool) -> dict[str, Any]:
    """Rounds of both engines in turns, each first as often as the other."""
    seconds: dict[str, list[float]] = {report.OURS: [], report.THEIRS: []}
    cpu_seconds = dict.fromkeys(seconds, 0.0)
    differing = 0
    for number in range(job.args.warmup + job.args.rounds):
        prompts = _prompts(job, requests, requests, tokens, beside, number)
        turns = [(report.OURS, both.ours), (report.THEIRS, both.theirs)]
        made = {}
        for name, run in turns if number % 2 else turns[::-1]:
            took, cpu_took, made[name] = run(prompts, _params(tokens), beside=beside)
            if number >= job.args.warmup:
                seconds[name].append(took)
                cpu_seconds[name] += cpu_took
        if job.leads:
            for name, outputs in made.items():
                if [len(output) for output in outputs] != [tokens] * requests:
                    raise RuntimeError(f"{name} did not make {tokens} tokens of each of {requests} requests")
            if number >= job.args.warmup:
                differing += sum(a != b for a, b in zip(*made.values(), strict=True))
    found: dict[str, Any] = {"requests": requests, "tokens": tokens, "mode": "async" if beside else "batch"}
    if job.leads:
        found.update(report.compare(seconds, cpu_seconds, requests * tokens))
        found["differing_requests"] = differing
        found["compared_requests"] = requests * job.args.rounds
    return found


# ---- ranks that wait ----


def _waiting(job: Job, both: Both) -> dict[str, Any]:
    """Decoding speed of asynchronous requests by what the other trainer ranks do meanwhile, in turns."""
    requests, tokens = job.args.cases[0]
    ways = _ways(job, both.engine)
    for way in ways.values():  # communicators are made at their first use
        way(not job.leads)
    dist.barrier()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(job.args.warmup + job.args.rounds):
        order = list(ways) if number % 2 else list(ways)[::-1]
        for name in order:
            prompts = _prompts(job, requests, name, number)
            dist.barrier()
            began = time.perf_counter()
            if job.leads:
                asyncio.run(generate_beside(both.engine, prompts, _params(tokens)))
                took = time.perf_counter() - began
                if number >= job.args.warmup:
                    seconds[name].append(took)
            ways[name](not job.leads)
            dist.barrier()
    found: dict[str, Any] = {"requests": requests, "tokens": tokens}
    if job.leads:
        base = seconds[report.ASLEEP]
        found["ways"] = {
            name: {
                "tokens_s": report.spread([requests * tokens / s for s in times]),
                "ratio": statistics.median(a / b for a, b in zip(base, times, strict=True)),
            }
            for name, times in seconds.items()
        }
    return found


def _ways(job: Job, engine: SpmdEngine) -> dict[str, Callable[[bool], None]]:
    """What the other ranks do while the first one has requests running; it joins them when these have finished."""
    store = dist.distributed_c10d._get_default_store()
    uses = {"count": 0}

    def asleep(waits: bool) -> None:
        """Blocked in a read of the rendezvous store's socket: no collective, nothing of the engine."""
        uses["count"] += 1
        key = f"generate/asleep/{uses['count']}"
        store.wait([key], timedelta(seconds=job.args.timeout)) if waits else store.set(key, "")

    def spinning(waits: bool) -> None:
        """A collective on the GPU: its kernel looks for the first rank's all the time. The case to avoid."""
        dist.all_reduce(torch.zeros(1, device=job.device), group=nccl)
        torch.cuda.synchronize()

    ways: dict[str, Callable[[bool], None]] = {
        report.ASLEEP: asleep,
        "in a call of the engine": lambda waits: engine.flush_cache(),
        "in a gloo barrier": lambda waits: dist.all_reduce(torch.zeros(1)),
    }
    if job.on_gpu:
        nccl = dist.new_group(backend="nccl", timeout=timedelta(seconds=job.args.timeout))
        ways["in an NCCL all-reduce"] = spinning
    return ways
