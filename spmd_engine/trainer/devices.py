"""Which GPUs a replica uses, and how its scheduler processes come to see exactly those, in TP order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from spmd_engine.errors import ConfigError

logger = logging.getLogger(__name__)


def own_gpu(index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """A GPU of this trainer rank, in words that hold in other processes of this node.

    Args:
        index: its CUDA ordinal in this process.
        environ: the environment with which CUDA started in this process.

    Returns:
        "uuid", and "name" for CUDA_VISIBLE_DEVICES: an ordinal, unless this process's own variable has something else.
    """
    import torch

    if index == 0 and environ.get("LOCAL_RANK", "0") != "0" and torch.cuda.device_count() > 1:
        logger.warning(
            "local rank %s makes its SpmdEngine on the first of %d GPUs: call torch.cuda.set_device(local_rank) before "
            "it, in the same thread", environ["LOCAL_RANK"], torch.cuda.device_count(),
        )  # fmt: skip
    names = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return {
        "uuid": f"GPU-{torch.cuda.get_device_properties(index).uuid}",
        "name": names[index] if index < len(names) else str(index),
    }


def visible_gpus(ranks: Sequence[int], gpus: Sequence[Mapping[str, str] | None]) -> str:
    """CUDA_VISIBLE_DEVICES for the scheduler processes of a replica: the GPU of TP rank i becomes device i.

    Args:
        ranks: global ranks in TP order.
        gpus: `own_gpu` of each of them; None for a rank whose engine runs on the CPU.

    Raises:
        ConfigError: a rank has none, or two have the same.
    """
    if not any(gpus):
        return ""
    names: dict[str, str] = {}
    owners: dict[str, int] = {}
    for rank, gpu in zip(ranks, gpus, strict=True):
        if gpu is None:
            raise ConfigError(f"rank {rank} has no GPU, but other ranks of its replica have; pass device='cpu' on all")
        uuid = gpu["uuid"]
        if uuid in owners:
            raise ConfigError(
                f"ranks {owners[uuid]} and {rank} of one replica both use {uuid}: call "
                "torch.cuda.set_device(local_rank) before SpmdEngine"
            )
        owners[uuid] = rank
        names[uuid] = gpu["name"]
    return ",".join(names.values())
