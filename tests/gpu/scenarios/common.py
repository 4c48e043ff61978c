"""Gives scenarios the trainer side of a job: its engine, its models, and where memory is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import models
import torch
import torch.distributed as dist
from integration.scenarios.common import greedy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spmd_engine import SpmdEngine

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # the CPU is for tests of these tests
BACKEND = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
GPU_ARGS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_prefill_cuda_graph": True,
    "enforce_disable_flashinfer_allreduce_fusion": True,  # its kernels take minutes to compile at the first start
    "max_total_tokens": 8192,
    "mem_fraction_static": 0.5,
}
SERVER_ARGS = {
    "random_seed": 7,
    "timeout_s": 240.0,  # several jobs share the machine, and compile kernels at the first start
    "log_dir": ".",  # the directory of the job
}
# Large enough for SGLang's GPU kernels.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512, "head_dim": 64}
SAVED, OTHER = 2, 3  # seeds of the weights: in the checkpoint, and others that scenarios move in


class Trainer:
    """A rank of a job.

    Attributes:
        engine: of this rank's replica; it has started from a checkpoint with the weights of seed `SAVED`.
        saved_checksums, saved_tokens: what SGLang has and generates with these weights, loaded by itself.
        has_plan: some scenario has updated from shards of the whole world already.
    """

    engine: SpmdEngine
    saved_checksums: dict[str, str]
    saved_tokens: list[list[int]]

    def __init__(self, path: str, model: str | None, tp: int, server_args: dict[str, Any]) -> None:
        self.path, self.model, self.tp = path, model, tp
        self.has_plan = False
        self._server_args = {**SERVER_ARGS, **(GPU_ARGS if ON_GPU else {}), **server_args}

    @property
    def replicas(self) -> int:
        return dist.get_world_size() // self.tp

    def start(self) -> None:
        if self.model is None:
            return
        mesh = init_device_mesh("cpu", (self.replicas, self.tp), mesh_dim_names=("dp", "tp"))["tp"]
        self.engine = SpmdEngine(self.path, device_mesh_cpu=mesh, **self._server_args)
        self.saved_checksums, self.saved_tokens = self.engine.weight_checksums(), greedy(self.engine)

    def shutdown(self) -> None:
        if self.model is not None:
            self.engine.shutdown()

    def make_model(self, seed: int) -> torch.nn.Module:
        """A whole model on this rank's device."""
        assert self.model is not None
        return models.make_model(self.model, seed=seed, **SHAPE).to(DEVICE)

    def make_sharded(self, seed: int) -> torch.nn.Module:
        """FSDP2 over the whole world."""
        model = self.make_model(seed)
        mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def expandable_segments() -> Iterator[None]:
    """Torch takes new memory in expandable segments meanwhile."""
    torch.cuda.empty_cache()  # what it has at hand would serve first
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def share_in_expandable_segments(tensors: list[torch.Tensor]) -> float:
    """How much of their bytes, from 0 to 1, lies in expandable segments."""
    spans = [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if segment["is_expandable"]
    ]
    inside = sum(t.nbytes for t in tensors if any(low <= t.data_ptr() < high for low, high in spans))
    return inside / sum(t.nbytes for t in tensors)


def in_expandable_segments(weights: dict[str, torch.Tensor], factor: int) -> dict[str, torch.Tensor]:
    """The weights times `factor`; every second one is in an expandable segment, the others in cudaMalloc's memory."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    block = torch.empty(256 << 20, dtype=torch.bfloat16, device="cuda")  # larger than what the allocator has cached
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    sizes = [tensor.numel() for tensor in weights.values()]
    made = {name: tensor * factor for name, tensor in weights.items()}
    for name, part in list(zip(weights, block[: sum(sizes)].split(sizes), strict=True))[::2]:
        made[name] = part.view_as(made[name]).copy_(made[name])
    return made


def free_bytes() -> int:
    """Free memory of this rank's GPU, whoever has the rest."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def take_all_memory(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Take blocks of these sizes, one size after the other, while there are any."""
    taken = []
    for size in sizes:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    return taken
