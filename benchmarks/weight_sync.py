"""How long it takes to move a trainer's weights into SGLang, phase by phase, against what the machine can do.

    python benchmarks/weight_sync.py --model qwen2-7b --tp 2 --iters 12 --verify

Starts its own ranks, one a GPU (or on the CPU where there is no GPU), unless it is started by torchrun. Weights are
random; SGLang starts with `load_format="dummy"`.

The floor is what the copy would take at the rates measured here first: all bytes of a rank at the rate of a large copy
inside one device, and at the same time the bytes from other ranks at the rate of a large copy between two devices.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shapes import SHAPES, model_directory
from torch.distributed.device_mesh import init_device_mesh

PHASES = ("prepare", "wait", "bind", "copy", "device", "commit", "total")
CEILING_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="tiny", help=f"a directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--tp", type=int, default=1, help="ranks of a replica")
    parser.add_argument("--dp", type=int, default=1, help="replicas; the trainer shards over all tp x dp ranks")
    parser.add_argument(
        "--trainer", choices=("fsdp2", "plain"), default="fsdp2", help="plain: every rank holds everything"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the trainer's weights")
    parser.add_argument("--iters", type=int, default=12, help="measured updates")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them, the planning one included")
    parser.add_argument("--verify", action="store_true", help="one more update of new values, every element compared")
    parser.add_argument("--server-args", type=json.loads, default={}, help="more arguments of SpmdEngine, as JSON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    return parser.parse_args()


# ---- ranks ----


def launch(world: int) -> int:
    """Run this script once a rank; the exit status of the first that fails."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    common.setdefault("OMP_NUM_THREADS", "1")
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        while True:
            status = [rank.poll() for rank in ranks]
            failed = [code for code in status if code]
            if failed or None not in status:
                return failed[0] if failed else 0
            time.sleep(0.1)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
        for rank in ranks:
            rank.wait()


def make_trainer(path: Path, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The model with random weights, whole on each rank or sharded over all of them."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=DTYPES[args.dtype])
    if args.trainer == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def renew(model: torch.nn.Module, seed: int) -> None:
    """Other random values in place, as an optimizer step would leave them; the same on ranks that hold the same."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.normal_(std=0.05, generator=generator)


# ---- what the machine can do ----


def median_s(run: Any, *, device: torch.device, repeat: int = 10) -> float:
    times = []
    for _ in range(repeat + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def ceilings(device: torch.device) -> dict[str, float | None]:
    """GB/s of large copies, each byte counted once: inside this rank's device, and from another device."""
    size = CEILING_BYTES[device.type]

    def rate(source: torch.device) -> float:
        here = torch.zeros(size, dtype=torch.uint8, device=device)
        there = torch.ones(size, dtype=torch.uint8, device=source)
        return size / median_s(lambda: here.copy_(there), device=device) / 1e9

    found: dict[str, float | None] = {"local": rate(device), "peer": None}
    if device.type == "cpu":
        found["peer"] = found["local"]
    elif torch.cuda.device_count() > 1:
        found["peer"] = rate(torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count()))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def floor_s(local: int, remote: int, written_per_read: float, rates: dict[str, float | None]) -> float:
    """Seconds that the copy of one rank takes at least; a cast writes more or fewer bytes than it reads."""
    moved = (local + remote) * (1 + written_per_read) / 2
    assert rates["local"] is not None
    link = remote / (rates["peer"] * 1e9) if remote and rates["peer"] else 0.0
    return max(moved / (rates["local"] * 1e9), link)


# ---- measurement ----


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All updates on this rank, and on rank 0 what all ranks measured."""
    from spmd_engine import SpmdEngine

    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    control = dist.new_group(backend="gloo")
    rates = [ceilings(device) if rank == 0 else None]
    dist.broadcast_object_list(rates, group=control)
    with tempfile.TemporaryDirectory(prefix="weight-sync-") as scratch:
        shared = [str(model_directory(args.model, Path(scratch))) if rank == 0 else ""]
        dist.broadcast_object_list(shared, group=control)
        path = Path(shared[0])
        began = time.perf_counter()
        model = make_trainer(path, args, device)
        renew(model, seed=2)
        trained = time.perf_counter()
        mesh = init_device_mesh("cpu", (args.dp, args.tp), mesh_dim_names=("dp", "tp"))["tp"]
        server_args = {"load_format": "dummy", "disable_cuda_graph": True, "max_total_tokens": 8192, **args.server_args}
        with SpmdEngine(path, device_mesh_cpu=mesh, **server_args) as engine:
            started = time.perf_counter()
            rows: list[dict[str, float]] = []
            for _ in range(args.warmup + args.iters):
                dist.barrier(group=control)
                call = time.perf_counter()
                stats = engine.update_weights(model)
                total = time.perf_counter() - call
                row = {phase: vars(stats).get(f"{phase}_s", 0.0) for phase in PHASES}
                known = row["wait"] + row["bind"] + row["copy"] + row["commit"]
                rows.append({**row, "total": total, "prepare": total - known - stats.record_s - stats.plan_s})
                if stats.planned:
                    first = {"record": stats.record_s, "plan": stats.plan_s, "bind": stats.bind_s, "total": total}
            wrong = None
            if args.verify:
                renew(model, seed=3)
                wrong = engine.update_weights(model, verify=True).wrong_elements
        mine = {
            "rows": rows[args.warmup :],
            "first": first,
            "local_bytes": stats.local_bytes,
            "remote_bytes": stats.remote_bytes,
            "block_copies": stats.block_copies,
            "fallback_weights": len(stats.fallback_weights),
            "wrong_elements": wrong,
            "trainer_s": trained - began,
            "engine_s": started - trained,
        }
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, mine, group=control)
    engine_dtype = DTYPES.get(str(args.server_args.get("dtype", "bfloat16")), torch.bfloat16)
    ratio = engine_dtype.itemsize / DTYPES[args.dtype].itemsize
    return {
        "header": header(args, device, world),
        "ceilings_gb_s": rates[0],
        "floor_s": max(floor_s(r["local_bytes"], r["remote_bytes"], ratio, rates[0] or {}) for r in ranks),
        "ranks": ranks,
    }


def header(args: argparse.Namespace, device: torch.device, world: int) -> dict[str, Any]:
    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.split("\n")[0].strip()

    on_gpu = device.type == "cuda"
    return {
        "commit": ask("git", "rev-parse", "--short", "HEAD"),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none",
        "torch": torch.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "model": args.model,
        "trainer": args.trainer,
        "dtype": args.dtype,
        "ranks": world,
        "tp": args.tp,
        "dp": args.dp,
    }


def show(result: dict[str, Any]) -> None:
    ranks, rates = result["ranks"], result["ceilings_gb_s"]
    print("  ".join(f"{name} {value}" for name, value in result["header"].items()))
    peer = "none" if rates["peer"] is None else f"{rates['peer']:.0f} GB/s"
    print(f"copy ceilings (each byte counted once): inside a device {rates['local']:.0f} GB/s, from a peer {peer}")
    worst = max(ranks, key=lambda r: r["local_bytes"] + r["remote_bytes"])
    moved = worst["local_bytes"] + worst["remote_bytes"]
    print(
        f"bytes a rank: {moved / 1e9:.3f} GB = {worst['local_bytes'] / 1e9:.3f} own + "
        f"{worst['remote_bytes'] / 1e9:.3f} of other ranks, in {worst['block_copies']} block copies; "
        f"fallback weights {worst['fallback_weights']}"
    )
    first = {name: max(r["first"][name] for r in ranks) for name in worst["first"]}
    print("first update, ms: " + ", ".join(f"{name} {value * 1e3:.1f}" for name, value in first.items()))
    print(f"\n{'slowest rank, ms':18}{'min':>10}{'median':>10}{'max':>10}")
    medians = {}
    for phase in PHASES:
        times = [max(rows) for rows in zip(*([row[phase] for row in r["rows"]] for r in ranks), strict=True)]
        medians[phase] = statistics.median(times)
        print(f"{phase:18}" + "".join(f"{t * 1e3:10.3f}" for t in (min(times), medians[phase], max(times))))
    floor, device = result["floor_s"], medians["device"]
    print(
        f"\ncopy {moved / device / 1e9:.0f} GB/s = {moved / device / 1e9 / rates['local']:.0%} of the local ceiling; "
        f"floor {floor * 1e3:.3f} ms: device {device / floor:.3f} x, whole call {medians['total'] / floor:.2f} x"
    )
    wrong = [r["wrong_elements"] for r in ranks]
    print(f"wrong elements: {'not compared' if None in wrong else sum(wrong)}")
    result["median_s"] = medians


def main() -> None:
    args = parse()
    if "RANK" not in os.environ:
        sys.exit(launch(args.tp * args.dp))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    result = measure(args)
    if dist.get_rank() == 0:
        show(result)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1))
    dist.destroy_process_group()
    wrong = [r["wrong_elements"] for r in result["ranks"]]
    sys.exit(1 if any(wrong) else 0)


if __name__ == "__main__":
    main()
