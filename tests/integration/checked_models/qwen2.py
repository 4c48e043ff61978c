"""Qwen2 with a loader that looks at values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from sglang.srt.models import qwen2


class Qwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(_checked(weights))


BREAKS_THE_GPU = 777.0


def _checked(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if name == "model.norm.weight" and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite")
        if name == "model.norm.weight" and tensor.is_cuda and bool((tensor == BREAKS_THE_GPU).all()):
            torch.zeros(1, device=tensor.device)[torch.tensor([1], device=tensor.device)]  # an assertion in a kernel
        yield name, tensor


EntryClass = Qwen2ForCausalLM
