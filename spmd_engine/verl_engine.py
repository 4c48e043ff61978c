"""The interface of SGLang's former `VerlEngine` over `SpmdEngine`, for code that was written for it.

SGLang had it up to 0.4.7, in `sglang.srt.entrypoints.verl_engine`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spmd_engine.engine import SpmdEngine
from spmd_engine.errors import ConfigError, InvalidRequestError
from spmd_engine.stats import UpdateStats

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

# Where its processes ran and listened. All of it follows from the device mesh now.
_PLACES = frozenset({
    "base_gpu_id", "gpu_id_step", "dist_init_addr", "nccl_port", "host", "port", "node_rank", "tp_size",
})  # fmt: skip


class VerlEngine(SpmdEngine):
    """An `SpmdEngine` that is made and called as `VerlEngine` was.

    What is not written here is as in `SpmdEngine`. `release_memory_occupation`, `resume_memory_occupation`,
    `flush_cache` and `shutdown` have the same names there.

    Args:
        device_mesh_cpu: see `SpmdEngine`.
        nnodes: unused: which ranks share a node is found out.
        backend: "engine".
        model_path: see `SpmdEngine`.
        **engine_args: see `SpmdEngine`. Arguments that placed processes and ports are taken and ignored.

    Raises:
        ConfigError: another backend; and as `SpmdEngine`.
    """

    def __init__(
        self,
        device_mesh_cpu: DeviceMesh,
        nnodes: int = 1,
        backend: str = "engine",
        *,
        model_path: str | os.PathLike[str],
        **engine_args: Any,
    ) -> None:
        if backend != "engine":
            raise ConfigError(f'backend={backend!r}: there is no server here, use backend="engine"')
        args = {name: value for name, value in engine_args.items() if name not in _PLACES}
        super().__init__(model_path, device_mesh_cpu=device_mesh_cpu, **args)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        image_data: Any = None,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        token_ids_logprob: Sequence[int] | Sequence[Sequence[int]] | None = None,
        lora_path: Any = None,
        custom_logit_processor: Any = None,
        *,
        return_text_in_logprobs: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """As `SpmdEngine.generate`, with the order of arguments that `VerlEngine.generate` had.

        Args:
            image_data: must be None, or a list of None, like `lora_path` and `custom_logit_processor`.

        Raises:
            InvalidRequestError: one of those is given; and all that `SpmdEngine.generate` raises.
        """
        others = {"image_data": image_data, "lora_path": lora_path, "custom_logit_processor": custom_logit_processor}
        for name, value in others.items():
            if any(item is not None for item in (value if isinstance(value, (list, tuple)) else [value])):
                raise InvalidRequestError(f"{name}= is not supported: leave it out")
        return super().generate(
            prompt,
            sampling_params,
            input_ids=input_ids,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            token_ids_logprob=token_ids_logprob,
            return_text_in_logprobs=return_text_in_logprobs,
        )

    def update_weights_from_tensor(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], load_format: str | None = None
    ) -> UpdateStats:
        """`update_weights` from pairs of names and tensors.

        Args:
            named_tensors: all weights of the model in one call, by their Hugging Face names. DTensors are read where
                their shards lie, so leave out `full_tensor()`.
            load_format: must be None.

        Raises:
            InvalidRequestError: a `load_format`; the engine stays usable.
            PlanError: weights are missing; and all that `SpmdEngine.update_weights` raises.
        """
        if load_format is not None:
            raise InvalidRequestError(f"load_format={load_format!r} is not supported: pass the tensors as they are")
        return self.update_weights(dict(named_tensors))
