"""What every rank of `sleep_wake.py` does."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import report
import torch
import torch.distributed as dist
from machine import PeakMemory, device_used_bytes, header
from torch.distributed.device_mesh import init_device_mesh
from trainers import make_trainer, renew

from spmd_engine import SpmdEngine
from spmd_engine.shapes import model_directory

MIB = 1 << 20
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 100, 200], list(range(20, 60))]
GREEDY = {"max_new_tokens": 32, "temperature": 0.0, "ignore_eos": True}
WEIGHTS, REST = ["weights"], ["kv_cache", "cuda_graph"]
WARMUP = 2
CHANGED = 3  # exit status: other tokens after a wake


def run_rank(args: argparse.Namespace) -> int:
    """The whole benchmark on this rank; rank 0 prints and writes. Returns the exit status."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=args.timeout))
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="sleep-wake-") as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        if dist.get_rank() == 0:
            model_directory(args.model, Path(shared[0]))
        dist.barrier()
        path = model_directory(args.model, Path(shared[0]))
        found = _measure(args, path, device)
        dist.barrier()
    result = {"header": header(device, model=args.model, tp=args.tp, cycles=args.cycles, pause_s=args.pause_s), **found}
    if dist.get_rank() == 0:
        _print(result)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    return CHANGED if found["changed"] else 0


def _measure(args: argparse.Namespace, path: Path, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    model = make_trainer(path, "fsdp2", dtype=torch.bfloat16, device=device)
    renew(model, seed=2)
    alone = _used(device)
    mesh = init_device_mesh("cpu", (args.tp,))
    given = {"load_format": "dummy", "enable_memory_saver": on_gpu, "skip_tokenizer_init": True, **args.server_args}
    with SpmdEngine(path, device_mesh_cpu=mesh, timeout_s=args.timeout, **given) as engine:
        engine.update_weights(model)
        expected = _tokens(engine)
        awake = _used(device)
        if not on_gpu:
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
    of_ranks: list[Any] = [None] * args.tp
    dist.all_gather_object(of_ranks, rows[WARMUP:])
    return {
        "phases_s": report.slowest(of_ranks),
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
