"""What every rank of the benchmark does: SpmdEngine first, then the baselines on the same model."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import report
import torch
import torch.distributed as dist
from baselines import BaselineError, StockReplica
from job import Job, joined
from launcher import given_ceilings
from machine import PeakMemory, floor_s, header, resources
from trainers import DTYPES, make_trainer, renew

from spmd_engine import SpmdEngine, UpdateStats

ONCE = {"record", "plan"}
PROMPT_TOKENS = 16
DECODE_REPEAT = 3
BASELINE_WARMUP = 2
WRONG = 3  # exit status: weights differ


def run_rank(args: argparse.Namespace) -> int:
    """The whole benchmark on this rank; rank 0 prints and writes. Returns the exit status."""
    with joined(args, name="weight-sync", server_args=_server_args(args)) as job:
        result = _measure(job)
    unlike = [name for found in result["baselines"].values() for name in found["unlike_spmd_engine"] or ()]
    return WRONG if result["spmd_engine"]["wrong_elements"] or unlike else 0


def _server_args(args: argparse.Namespace) -> dict[str, Any]:
    tokens = 8192 if args.decode is None else max(8192, 2 * args.decode[0] * (PROMPT_TOKENS + args.decode[1]))
    return {"load_format": "dummy", "disable_cuda_graph": True, "max_total_tokens": tokens, **args.server_args}


def _measure(job: Job) -> dict[str, Any]:
    args, leads = job.args, dist.get_rank() == 0
    ceilings = given_ceilings()
    model = make_trainer(
        job.path,
        args.trainer,
        dtype=DTYPES[args.dtype],
        device=job.device,
        offload=args.offload,
        match_tp=args.match_tp,
    )
    renew(model, seed=2)
    facts = {name: getattr(args, name) for name in ("model", "trainer", "match_tp", "offload", "dtype", "tp", "dp")}
    result: dict[str, Any] = {
        "header": header(job.device, **facts, ranks=dist.get_world_size()),
        "ceilings_gb_s": ceilings,
        "baselines": {},
    }
    mine, digests = _measure_engine(job, model)
    result["ranks"] = job.gather(mine)
    result["spmd_engine"] = _summary(job, result["ranks"], ceilings)
    if leads:
        report.print_engine(result)
        _write(args, result)
    if args.baseline:
        result["baselines"] = _measure_baselines(job, model, digests)
        if leads:
            report.print_baselines(result)
            _write(args, result)
    if leads and args.plot is not None:
        report.plot(result, args.plot)
    return result


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


# ---- SpmdEngine ----


def _measure_engine(job: Job, model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """All updates on this rank, and the checksums of what the last one left, if they are needed."""
    args = job.args
    began = time.perf_counter()
    with SpmdEngine(job.path, device_mesh_cpu=job.mesh, timeout_s=args.timeout, **job.server_args) as engine:
        started_s = time.perf_counter() - began
        time.sleep(args.pause_s)
        pids = [os.getpid(), engine.scheduler_pid]
        processes = {"trainer": pids[0], "scheduler": pids[1]}
        decoded = None if args.decode is None else [_decode_rate(job, engine)]
        job.align()
        memory_before = PeakMemory(job.device, job.watched(pids)).level()
        seconds = array("d")  # flat: what the benchmark keeps must not look like growth
        held = {}
        for index in range(args.warmup + args.iters):
            job.align()
            call = time.perf_counter()
            stats = engine.update_weights(model)
            phases = _phases(stats, time.perf_counter() - call)
            seconds.extend(phases.values())
            if index == 0:
                first = {**phases, "record": stats.record_s, "plan": stats.plan_s}
            if index == args.warmup:
                held = resources(job.device, processes)
        job.align()
        grown = {name: now - held[name] for name, now in resources(job.device, processes).items()}
        if decoded is not None:
            decoded.append(_decode_rate(job, engine))
        memory = _peak(job, pids, memory_before, lambda: engine.update_weights(model))
        wrong = None
        if args.verify:
            renew(model, seed=3)
            wrong = engine.update_weights(model, verify=True).wrong_elements
        digests = engine.weight_checksums() if args.verify and args.baseline else {}
    return {
        "rows_s": _rows(list(phases), seconds)[args.warmup :],
        "first_s": {name: first[name] for name in ("record", "plan", "bind", "total")},
        "local_bytes": stats.local_bytes,
        "peer_bytes": stats.remote_bytes,
        "staged_bytes": stats.staged_bytes,
        "network_bytes": stats.network_bytes,
        "block_copies": stats.block_copies,
        "fallback_weights": len(stats.fallback_weights),
        "wrong_elements": wrong,
        "memory": memory,
        "growth": grown,
        "decode_tokens_s": decoded,
        "start_s": started_s,
    }, digests


def _phases(stats: UpdateStats, total: float) -> dict[str, float]:
    """The phases that an update reports, "other" for what none of them covers (messages, mostly), and "total"."""
    named = {field.name[:-2]: getattr(stats, field.name) for field in fields(stats) if field.name.endswith("_s")}
    covered = sum(value for name, value in named.items() if name not in report.INSIDE and name != "total")
    steady = {name: value for name, value in named.items() if name not in ONCE and name != "total"}
    return {**steady, "other": total - covered, "total": total}


def _rows(names: list[str], seconds: array[float]) -> list[dict[str, float]]:
    width = len(names)
    return [dict(zip(names, seconds[i : i + width], strict=True)) for i in range(0, len(seconds), width)]


def _summary(job: Job, ranks: list[dict[str, Any]], ceilings: dict[str, float | None]) -> dict[str, Any]:
    """What all ranks measured, in one: the slowest, the largest, the sum, as it fits. Bytes are those of the floor."""
    args = job.args
    engine_dtype = DTYPES.get(str(args.server_args.get("dtype", "bfloat16")), torch.bfloat16)
    ratio = engine_dtype.itemsize / DTYPES[args.dtype].itemsize
    floors = [
        floor_s(
            rank["local_bytes"], rank["peer_bytes"], rank["staged_bytes"], written_per_read=ratio, ceilings=ceilings
        )
        for rank in ranks
    ]
    bound = ranks[floors.index(max(floors))]
    wrong = [rank["wrong_elements"] for rank in ranks]
    decode = None
    if args.decode is not None:
        sequences, tokens = args.decode
        before, after = (min(rank["decode_tokens_s"][i] for rank in ranks) for i in (0, 1))
        decode = {"sequences": sequences, "tokens": tokens, "before_tokens_s": before, "after_tokens_s": after}
    return {
        "phases_s": report.slowest([rank["rows_s"] for rank in ranks]),
        "first_s": {name: max(rank["first_s"][name] for rank in ranks) for name in bound["first_s"]},
        **{name: bound[name] for name in ("local_bytes", "peer_bytes", "staged_bytes", "network_bytes")},
        **{name: bound[name] for name in ("block_copies", "fallback_weights")},
        "floor_s": max(floors),
        "wrong_elements": None if None in wrong else sum(wrong),
        "memory": _largest([rank["memory"] for rank in ranks]),
        "growth": {"updates": args.iters - 1, "by": _largest([rank["growth"] for rank in ranks])},
        "decode": decode,
    }


def _largest(found: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: max(of_rank[name] for of_rank in found) for name in found[0]}


def _decode_rate(job: Job, engine: SpmdEngine) -> float:
    """Tokens a second of greedy decoding on this replica, the median of some calls after one that warms up."""
    sequences, tokens = job.args.decode
    vocabulary = job.vocabulary
    prompts = [
        [(index * PROMPT_TOKENS + position) * 7919 % vocabulary for position in range(PROMPT_TOKENS)]
        for index in range(sequences)
    ]
    params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    times = []
    for _ in range(1 + DECODE_REPEAT):
        job.align()
        began = time.perf_counter()
        outputs = engine.generate(input_ids=prompts, sampling_params=params)
        times.append(time.perf_counter() - began)
        assert isinstance(outputs, list)
        made = sum(len(output["output_ids"]) for output in outputs)
        assert made == sequences * tokens, f"asked for {sequences * tokens} tokens, got {made}"
    return sequences * tokens / statistics.median(times[1:])


# ---- memory ----


def _peak(job: Job, pids: list[int], memory_before: int, update: Any) -> dict[str, int]:
    """Extra memory during one more update: over the level just before it, and over that before the first update."""
    watched = job.watched(pids)
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    job.align()
    with PeakMemory(job.device, watched) as memory:
        update()
        job.align()
    return {"peak_extra_bytes": memory.peak - memory.before, "peak_over_first_bytes": memory.peak - memory_before}


# ---- baselines ----


def _measure_baselines(job: Job, model: torch.nn.Module, digests: dict[str, str]) -> dict[str, Any]:
    """Each baseline in turn on one stock engine a replica.

    Args:
        digests: what SpmdEngine held after its last update, on this rank, to compare with; may be empty.

    Raises:
        BaselineError: an update was refused, or left a parameter as it was.
    """
    replica = StockReplica(job.path, job.mesh, device=job.device, server_args=job.server_args, scratch=job.scratch)
    try:
        found = {}
        for name in job.args.baseline:
            found[name] = _measure_baseline(job, model, replica, name, digests)
        dist.barrier(group=job.control)
    finally:
        replica.shutdown()
    return found


def _measure_baseline(
    job: Job, model: torch.nn.Module, replica: StockReplica, name: str, digests: dict[str, str]
) -> dict[str, Any]:
    args, tp_rank = job.args, job.mesh.get_local_rank()
    size = args.bucket_mib << 20

    def update() -> int:
        return replica.update(name, model, bucket_bytes=size)

    pids = [os.getpid(), *replica.pids]
    job.align()
    memory_before = PeakMemory(job.device, job.watched(pids)).level()
    renew(model, seed=4)
    update()
    old = replica.digests(exact=False)[tp_rank]
    renew(model, seed=3)  # as SpmdEngine had them last
    times = []
    for _ in range(BASELINE_WARMUP + args.baseline_iters):
        job.align()
        began = time.perf_counter()
        requests = update()
        times.append({"total": time.perf_counter() - began})
    memory = _peak(job, pids, memory_before, update)
    new = replica.digests(exact=False)[tp_rank]
    unchanged = [parameter for parameter, digest in new.items() if digest == old[parameter]]
    unlike = None
    if digests:
        exact = replica.digests(exact=True)[tp_rank]
        unlike = [parameter for parameter, digest in exact.items() if digests.get(parameter) != digest]
    ranks = job.gather({"rows_s": times[BASELINE_WARMUP:], "memory": memory, "unchanged": unchanged, "unlike": unlike})
    stale = sorted({parameter for rank in ranks for parameter in rank["unchanged"]})
    if stale:
        raise BaselineError(f"{name} left {len(stale)} of {len(new)} parameters as they were, e.g. {stale[:3]}")
    return {
        "total_s": report.slowest([rank["rows_s"] for rank in ranks])["total"],
        "requests": requests,
        "bucket_bytes": size,
        "memory": _largest([rank["memory"] for rank in ranks]),
        "parameters": len(new),
        "unlike_spmd_engine": None if unlike is None else sorted({p for rank in ranks for p in rank["unlike"]}),
    }
