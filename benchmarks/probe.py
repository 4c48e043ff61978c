"""Runs inside SGLang's own schedulers, as a `custom_weight_loader`: tells what their parameters hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist

SMALL_BYTES = 1 << 20
CHUNK_BYTES = 1 << 26


def write_digests(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Write a digest of every parameter into the directory that the first name gives, in a file a TP rank.

    A directory named "exact" gets the digests of `SpmdEngine.weight_checksums`, another one `fast_digest`.
    """
    directory = Path(named_tensors[0][0])
    digest = exact_digest if directory.name == "exact" else fast_digest
    found = {name: digest(parameter.detach()) for name, parameter in model.named_parameters()}
    # sglang.Engine has one process group of all its TP ranks.
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def exact_digest(tensor: torch.Tensor) -> str:
    data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()


def fast_digest(tensor: torch.Tensor) -> str:
    """The sum of all bytes, made on the device; of a small tensor, where sums may meet by chance, the exact digest."""
    if tensor.nbytes <= SMALL_BYTES:
        return exact_digest(tensor)
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return str(sum(int(chunk.sum(dtype=torch.int64)) for chunk in flat.split(CHUNK_BYTES)))
