"""What several scenarios use."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 100, 200], list(range(20, 60))]
GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}


def greedy(engine: Any) -> list[list[int]]:
    return [output["output_ids"] for output in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def shard(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """FSDP2 over the whole world, a group a layer, as trainers do it."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
