"""What several scenarios use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 100, 200], list(range(20, 60))]
GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}


def assert_close(found: Any, expected: Any) -> None:
    """Equal, but for the last digits of log-probabilities: another batch may add them up in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


def greedy(engine: Any) -> list[list[int]]:
    return [output["output_ids"] for output in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def shard(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """FSDP2 over the whole world, a group a layer, as trainers do it."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
