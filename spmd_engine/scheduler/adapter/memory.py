"""Names of SGLang's memory: how much each kind takes, how it is released and resumed, and the prefix cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from spmd_engine.scheduler.adapter.model import model_of, tensors_of, unregistered

# A larger tensor that a module keeps beside its parameters is one that it derives from them.
_MAX_KEPT_BYTES = 1 << 20


@contextlib.contextmanager
def _apart_from_paused(scheduler: Any) -> Iterator[None]:
    """SGLang 0.5.17 wants an idle scheduler where one is enough whose requests are paused: they hold no memory."""
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    try:
        yield
    finally:
        scheduler.waiting_queue = waiting


def memory_bytes(scheduler: Any, device: torch.device) -> dict[str, int]:
    """Bytes of the weights, of the KV cache, and of what CUDA graphs keep, on the device of the parameters."""
    tensors = [tensor for _, tensor in tensors_of(model_of(scheduler)) if tensor.device == device]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    cache = getattr(scheduler.token_to_kv_pool_allocator.get_kvcache(), "get_kv_size_bytes", lambda: 0)()
    graphs = 0
    if device.type == "cuda":
        # Graphs are captured into pools of their own; pool (0, 0) is the allocator's default.
        segments = torch.cuda.memory_snapshot()
        graphs = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))
    return {
        "weights": sum(storages.values()),
        "kv_cache": sum(cache) if isinstance(cache, tuple) else int(cache),
        "cuda_graph": graphs,
    }


def flush_cache(scheduler: Any) -> None:
    """Drop the prefix cache. The scheduler is idle when this is called, or paused."""
    with _apart_from_paused(scheduler):
        if not scheduler.flush_cache(empty_cache=False):
            raise RuntimeError("SGLang did not flush its cache although no request runs")


def release_memory(scheduler: Any, tag: str) -> None:
    """Give the memory of an awake tag back, by SGLang's own handler. No request runs, and no kernel."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    with _apart_from_paused(scheduler):
        scheduler.weight_updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=[tag]))


def resume_memory(scheduler: Any, tag: str) -> None:
    """Take the memory of a sleeping tag again, at the same addresses. It must be there, or the process ends."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    scheduler.weight_updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=[tag]))


def unregistered_constants(scheduler: Any) -> list[torch.Tensor]:
    """Small tensors that modules keep beside parameters and buffers: no update writes them, and SGLang restores only
    buffers. Which experts are local is one, for example."""
    return [tensor for _, tensor in unregistered(model_of(scheduler)) if 0 < tensor.nbytes <= _MAX_KEPT_BYTES]
