"""The trainer's side of the benchmark: a model with random weights, sharded as a trainer would, and its updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make_trainer(path: Path, kind: str, *, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model with random weights, sharded over all ranks, or whole on each of them.

    Args:
        path: directory with the model's config.json.
        kind: "fsdp2" (`fully_shard`), "fsdp1" (`FullyShardedDataParallel` with original parameters), both a layer at a
            time, or "plain".
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    with device:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    if kind != "plain":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        model = _shard_fsdp2(model, mesh) if kind == "fsdp2" else _shard_fsdp1(model, mesh, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def _shard_fsdp2(model: Any, mesh: dist.DeviceMesh) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _shard_fsdp1(model: Any, mesh: dist.DeviceMesh, device: torch.device) -> torch.nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(model.model.layers[0])}),
        device_mesh=mesh,
        device_id=device,
        use_orig_params=True,
    )


def renew(model: torch.nn.Module, seed: int) -> None:
    """Other random values in place, as an optimizer step would leave them; the same on ranks that hold the same."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.normal_(std=0.05, generator=generator)
