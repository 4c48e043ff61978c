"""What every rank of `sleep_wake.py` does."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import report
import torch
import torch.distributed as dist
from job import Job, joined
from machine import PeakMemory, device_used_bytes, header
from trainers import make_trainer, renew

from spmd_engine import SpmdEngine

MIB = 1 << 20
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 100, 200], list(range(20, 60))]
GREEDY = {"max_new_tokens": 32, "temperature": 0.0, "ignore_eos": True}
WEIGHTS, REST = ["weights"], ["kv_cache", "cuda_graph"]
WARMUP = 2
CHANGED = 3  # exit status: other tokens after a wake


def run_rank(args: argparse.Namespace) -> int:
    """The whole benchmark on this rank; rank 0 prints and writes. Returns the exit status."""
    with joined(args, name="sleep-wake", server_args=args.server_args) as job:
        found = _measure(job)
        facts = {name: getattr(args, name) for name in ("model", "tp", "cycles", "pause_s")}
        result = {"header": header(job.device, **facts), **found}
        if job.leads:
            _print(result)
            if args.json is not None:
                args.json.write_text(json.dumps(result, indent=1))
    return CHANGED if found["changed"] else 0


def _measure(job: Job) -> dict[str, Any]:
    args, device = job.args, job.device
    model = make_trainer(job.path, "fsdp2", dtype=torch.bfloat16, device=device)
    renew(model, seed=2)
    alone = _used(device)
    given: dict[str, Any] = {"load_format": "dummy", "enable_memory_saver": job.on_gpu, "skip_tokenizer_init": True}
    if job.on_gpu:
        given["disable_prefill_cuda_graph"] = True  # these graphs cannot be released
    given.update(job.server_args)
    with SpmdEngine(job.path, device_mesh_cpu=job.mesh, timeout_s=args.timeout, **given) as engine:
        engine.update_weights(model)
        expected = _tokens(engine)
        awake = _used(device)
        if not job.on_gpu:
            return {"phases_s": {}, "changed": int(_tokens(engine) != expected)}
        rows, levels, changed = [], [], 0
        for cycle in range(WARMUP + args.cycles):
            row, asleep = _cycle(engine, model, device, args.pause_s)
            rows.append(row)
            if cycle % args.check_every == 0:
                changed += _tokens(engine) != expected
            levels.append((asleep, _used(device)))
        peaks = {}
        for name, first, then in (("staged", WEIGHTS, REST), ("at once", WEIGHTS + REST, [])):
            peaks[name] = _peak_of_wake(engine, model, device, first, then)
            changed += _tokens(engine) != expected
    return {
        "phases_s": report.slowest(job.gather(rows[WARMUP:])),
        "engine_bytes": {"awake": awake - alone, "asleep": levels[-1][0] - alone},
        "change_bytes": {name: levels[-1][i] - levels[WARMUP][i] for i, name in enumerate(("asleep", "awake"))},
        "peak_bytes": peaks,
        "changed": changed,
    }


def _cycle(
    engine: SpmdEngine, model: torch.nn.Module, device: torch.device, pause_s: float
) -> tuple[dict[str, float], int]:
    """One cycle: the seconds of its phases, and the bytes in use while the engine slept."""
    row = {"release": _timed(engine.sleep)}
    asleep = _used(device)
    time.sleep(pause_s)
    row["resume weights"] = _timed(lambda: engine.resume_memory_occupation(WEIGHTS))
    row["update_weights"] = _timed(lambda: engine.update_weights(model))
    row["resume the rest"] = _timed(lambda: engine.resume_memory_occupation(REST))
    return row, asleep


def _peak_of_wake(
    engine: SpmdEngine, model: torch.nn.Module, device: torch.device, first: list[str], then: list[str]
) -> int:
    """Most bytes in use during a wake in which the trainer off-loads its weights as soon as the engine has them."""
    engine.sleep()
    _used(device)
    with PeakMemory(device, []) as memory:
        engine.resume_memory_occupation(first)
        engine.update_weights(model)
        model.cpu()
        _used(device)
        if then:
            engine.resume_memory_occupation(then)
        dist.barrier()
    model.to(device)
    return memory.peak


def _tokens(engine: SpmdEngine) -> list[list[int]]:
    outputs = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    return [output["output_ids"] for output in outputs]


def _timed(action: Callable[[], Any]) -> float:
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _used(device: torch.device) -> int:
    """Bytes in use on this rank's GPU, of all processes, once all ranks are idle and the trainer caches none."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    dist.barrier()
    return device_used_bytes(device)


def _print(result: dict[str, Any]) -> None:
    print("\n" + "  ".join(f"{name} {value}" for name, value in result["header"].items()))
    if not result["phases_s"]:
        print("no GPU, nothing to release: the engine started, took weights and generated")
        return
    print(f"\n{'slowest rank, ms':22}{'min':>10}{'median':>10}{'max':>10}")
    for name, times in result["phases_s"].items():
        print(f"{name:22}" + "".join(f"{times[key] * 1e3:10.1f}" for key in ("min", "median", "max")))
    held, change = result["engine_bytes"], result["change_bytes"]
    print(f"the engine holds {held['awake'] / MIB:.0f} MiB awake, {held['asleep'] / MIB:.0f} MiB asleep")
    cycles = result["header"]["cycles"]
    print(f"after {cycles} cycles: {change['asleep'] / MIB:+.0f} MiB asleep, {change['awake'] / MIB:+.0f} MiB awake")
    for name, peak in result["peak_bytes"].items():
        print(f"peak on the device, woken {name}: {peak / MIB:.0f} MiB")
    print(f"comparisons that found other tokens than at the start: {result['changed']}")
