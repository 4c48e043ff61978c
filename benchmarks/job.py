"""What a rank of a benchmark knows about its run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stock import CPU_ARGS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_engine.on_paper.model_shapes import model_directory

LEAST_KV_TOKENS = 8192
CPU_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Job:
    """Arguments, device, a gloo group of all ranks, this replica's mesh, the model, a directory that all ranks see."""

    args: argparse.Namespace
    device: torch.device
    control: dist.ProcessGroup
    mesh: DeviceMesh
    path: Path
    scratch: Path
    server_args: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def leads(self) -> bool:
        return dist.get_rank() == 0

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(json.loads((self.path / "config.json").read_text())["vocab_size"])

    def gather(self, mine: Any) -> list[Any]:
        """What each rank passes, on all ranks."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self.control)
        return found

    def align(self) -> None:
        """Let no rank go on before all are here and their devices are idle."""
        if self.on_gpu:
            torch.cuda.synchronize()
        dist.barrier(group=self.control)

    def watched(self, pids: list[int]) -> list[int]:
        """The processes whose memory this rank samples on the CPU: all for rank 0, since they share one memory."""
        every = [pid for of_rank in self.gather(pids) for pid in of_rank]
        return every if self.leads else []


def args_of_both_engines(kv_tokens: int) -> dict[str, Any]:
    """Server arguments with which both engines have a KV cache of the same size, for at least so many tokens."""
    made: dict[str, Any] = {
        "max_total_tokens": max(LEAST_KV_TOKENS, kv_tokens * 21 // 20),
        "random_seed": 1,
        "skip_tokenizer_init": True,
    }
    if not torch.cuda.is_available():
        made.update(CPU_ARGS, chunked_prefill_size=CPU_PREFILL_TOKENS)
    return made


@contextlib.contextmanager
def joined(
    args: argparse.Namespace, *, name: str, server_args: dict[str, Any], backend: str = "cpu:gloo,cuda:nccl"
) -> Iterator[Job]:
    """Join the other ranks, tp x dp in all, for the time of a run.

    Args:
        args: with `model`, `tp`, `dp` and `timeout`.
        name: of the benchmark, for its temporary directory.
        server_args: of the engines.
        backend: of the default group on GPUs.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=args.timeout)
    dist.init_process_group(backend if on_gpu else "gloo", timeout=timeout)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    control = dist.new_group(backend="gloo", timeout=timeout)
    mesh = init_device_mesh("cpu", (args.dp, args.tp), mesh_dim_names=("dp", "tp"))["tp"]
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as own:
        shared = [own if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(shared, group=control)
        scratch = Path(shared[0])
        if dist.get_rank() == 0:
            model_directory(args.model, scratch)
        dist.barrier(group=control)
        path = model_directory(args.model, scratch)
        yield Job(args, device, control, mesh, path, scratch, server_args)
        dist.barrier(group=control)
    dist.destroy_process_group()
