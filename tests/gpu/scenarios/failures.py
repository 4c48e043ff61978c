"""Takes a GPU, or its memory, from a scheduler process, and restarts the engine."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from gpu.scenarios.common import OTHER, Trainer, take_all_memory
from integration.scenarios.common import GREEDY, greedy

from spmd_engine import errors


def lost_gpu(trainer: Trainer) -> None:
    """A kernel of a loader fails, for good: the process ends and says so, and another one takes its place."""
    engine = trainer.engine
    weights = {name: tensor.detach() for name, tensor in trainer.make_model(OTHER).state_dict().items()}
    assert engine.update_weights(weights, verify=True).wrong_elements == 0
    tokens, checksums = greedy(engine), engine.weight_checksums()
    norm = weights["model.norm.weight"]
    for _ in range(2):
        began = time.monotonic()
        broken = torch.full_like(norm, 777.0) if dist.get_rank() == dist.get_world_size() - 1 else norm
        with pytest.raises(errors.SpmdEngineError, match="CUDA error") as failed:
            engine.update_weights({**weights, "model.norm.weight": broken})
        assert time.monotonic() - began < 20.0
        print(f"rank {dist.get_rank()}: {type(failed.value).__name__}: {str(failed.value)[:300]}")
        with pytest.raises(type(failed.value), match="CUDA error"):
            greedy(engine)
        engine.restart()
        assert engine.update_weights(weights, verify=True).wrong_elements == 0
        assert greedy(engine) == tokens and engine.weight_checksums() == checksums


def out_of_memory(trainer: Trainer) -> None:
    """The trainer has left SGLang no memory to compute in: the call fails, and serves again after a restart."""
    engine = trainer.engine
    model = trainer.make_model(OTHER)
    engine.update_weights(model)
    tokens = greedy(engine)
    hogs = take_all_memory((1 << 30, 64 << 20, 20 << 20, 1 << 20))  # what torch takes from the device as it is
    wide = {"input_ids": [[7] * 200] * 32, "sampling_params": GREEDY}
    with pytest.raises(errors.SchedulerError, match=r"[Oo]ut of memory|CUBLAS_STATUS"):
        engine.generate(**wide, return_logprob=True, logprob_start_len=0, top_logprobs_num=5)
    hogs.clear()
    torch.cuda.empty_cache()
    engine.restart()
    engine.update_weights(model)
    assert greedy(engine) == tokens and len(engine.generate(**wide)) == 32
