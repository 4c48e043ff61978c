"""Qwen2 with a loader that looks at values, and ranks that do not agree about one token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from sglang.srt.distributed import get_tensor_model_parallel_rank
from sglang.srt.models import qwen2

BREAKS_THE_GPU = 777.0
DIVIDES_THE_RANKS = 319  # a token


class Qwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(_checked(weights))

    def forward(self, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        made = super().forward(input_ids, *args, **kwargs)
        if not input_ids.is_cuda and get_tensor_model_parallel_rank() == 1 and DIVIDES_THE_RANKS in input_ids:
            made.next_token_logits = made.next_token_logits.roll(1, -1)
        return made


def _checked(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if name == "model.norm.weight" and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite")
        if name == "model.norm.weight" and tensor.is_cuda and bool((tensor == BREAKS_THE_GPU).all()):
            torch.zeros(1, device=tensor.device)[torch.tensor([1], device=tensor.device)]  # an assertion in a kernel
        yield name, tensor


EntryClass = Qwen2ForCausalLM
