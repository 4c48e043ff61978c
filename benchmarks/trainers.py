"""The trainer's side of the benchmark: a model with random weights, sharded as a trainer would, and its updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


def make_trainer(
    path: Path, kind: str, *, dtype: torch.dtype, device: torch.device, offload: str = "none", match_tp: bool = False
) -> torch.nn.Module:
    """The model with random weights, sharded over all ranks, or whole on each of them.

    Args:
        path: directory with the model's config.json.
        kind: "fsdp2" (`fully_shard`), "fsdp1" (`FullyShardedDataParallel` with original parameters), both a layer at a
            time, or "plain".
        offload: "pinned" or "pageable" for weights in CPU memory; not with "fsdp1".
        match_tp: "fsdp2" cuts row-parallel weights along the dimension along which tensor parallelism cuts them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    with device:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    if kind != "plain":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        model = _shard_fsdp2(model, mesh, offload, match_tp) if kind == "fsdp2" else _shard_fsdp1(model, mesh, device)
    elif offload != "none":
        model.cpu()
        for parameter in model.parameters():
            parameter.data = parameter.data.pin_memory() if offload == "pinned" else parameter.data
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def _shard_fsdp2(model: Any, mesh: dist.DeviceMesh, offload: str, match_tp: bool) -> torch.nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor import Shard

    options: dict[str, Any] = {"mesh": mesh}
    if offload != "none":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=offload == "pinned")
    if match_tp:
        row_parallel = {p for name, p in model.named_parameters() if name.endswith(ROW_PARALLEL)}
        options["shard_placement_fn"] = lambda parameter: Shard(1) if parameter in row_parallel else None
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # off-loaded weights, too, are made there
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            values = local if local.device.type == device.type else torch.empty_like(local, device=device)
            values.normal_(std=0.05, generator=generator)
            if values is not local:
                local.copy_(values)
