"""SGLangRollout of verl 0.3 to 0.5: one SpmdEngine on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from verl import DataProto
from verl.workers.rollout.base import BaseRollout

from spmd_engine import SpmdEngine
from spmd_engine.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from spmd_engine.integrations.verl_legacy.multi_turn import Conversations

# Keys of verl's rollout configuration that are sampling parameters of SGLang.
_SAMPLING = frozenset({
    "ebnf", "frequency_penalty", "ignore_eos", "json_schema", "max_new_tokens", "min_new_tokens", "min_p",
    "no_stop_trim", "presence_penalty", "regex", "repetition_penalty", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_regex", "stop_token_ids", "temperature", "top_k", "top_p",
})  # fmt: skip
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "ignore_eos": False, "min_new_tokens": 0}
_NO_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
_PADDED_LOGPROB = -1.0  # as verl's vLLM rollout pads; masked wherever it is used


class SGLangRollout(BaseRollout):
    """Generates on all ranks of a replica with their own schedulers.

    The constructor takes what those of verl 0.3, 0.4 and 0.5 take.

    Args:
        actor_module: path of the model.
        config: `actor_rollout_ref.rollout`. `engine_kwargs.sglang` may have any field of `sglang.ServerArgs`.
        processing_class: the tokenizer, or a processor that has one; 0.3 calls it `tokenizer`.
        model_hf_config: the model's Hugging Face configuration.
        port: unused; there is no server.
        trust_remote_code: whether the model may bring code of its own.
        device_mesh: dims "dp" and "tp" on the CPU, over all ranks; made if it is not given.

    Raises:
        ConfigError: an option that this rollout does not have, or SGLang cannot start.
    """

    def __init__(
        self,
        actor_module: str,
        config: Any,
        processing_class: Any = None,
        model_hf_config: Any = None,
        port: int | None = None,
        trust_remote_code: bool = False,
        device_mesh: DeviceMesh | None = None,
        *,
        tokenizer: Any = None,
        train_tp: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.processing_class = tokenizer if processing_class is None else processing_class
        self._tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.pad_token_id = self._tokenizer.pad_token_id
        if self.pad_token_id is None:
            self.pad_token_id = self._tokenizer.eos_token_id
        if train_tp is not None:
            raise ConfigError("verl_legacy works with FSDP actors, not with Megatron: set actor.strategy=fsdp or fsdp2")
        if config.get("mode", "sync") != "sync":
            raise ConfigError(
                f"rollout.mode={config.mode} starts SGLang servers of verl's own: set rollout.mode=sync, where "
                "rollout.multi_turn.enable=True runs conversations through the asynchronous engine"
            )
        limit = _context_length(model_hf_config)
        needed = config.prompt_length + config.response_length
        self._max_model_len = config.get("max_model_len", None) or needed
        if limit is not None and needed > limit:
            raise ConfigError(f"prompt_length + response_length is {needed}, more than the {limit} that the model has")
        if self._max_model_len < needed:
            raise ConfigError(f"max_model_len={self._max_model_len} is less than the {needed} of prompt and response")
        self._conversations: Conversations | None = None
        multi_turn = config.get("multi_turn", None)
        if multi_turn is not None and multi_turn.get("enable", False):
            try:
                from spmd_engine.integrations.verl_legacy.multi_turn import Conversations
            except ImportError as error:
                raise ConfigError(
                    f"rollout.multi_turn needs verl 0.5 ({error}): set multi_turn.enable=False"
                ) from error

            self._conversations = Conversations(multi_turn, config, self._max_model_len, self.processing_class)
        tp_size = config.get("tensor_model_parallel_size", 1)
        if device_mesh is None:
            device_mesh = init_device_mesh(
                "cpu", (dist.get_world_size() // tp_size, tp_size), mesh_dim_names=("dp", "tp")
            )
        self._mesh = device_mesh["tp"]
        self.sampling_params = _sampling_params(config)
        load_format = str(config.get("load_format", "auto"))
        server_args = {
            "dtype": config.dtype,
            "mem_fraction_static": config.gpu_memory_utilization,
            # verl's dummy_dtensor and dummy_hf: the weights come with the first update.
            "load_format": "dummy" if load_format.startswith("dummy") else load_format,
            "enable_memory_saver": True,
            "trust_remote_code": trust_remote_code,
            **_engine_kwargs(config),
        }
        self._engine = SpmdEngine(actor_module, device_mesh_cpu=self._mesh, **server_args)
        if config.free_cache_engine:
            self._engine.release_memory_occupation()  # the trainer comes first

    @property
    def inference_engine(self) -> SpmdEngine:
        """The engine, under the name that verl 0.3 uses."""
        return self._engine

    @torch.no_grad()
    def generate_sequences(self, prompts: DataProto, **kwargs: Any) -> DataProto:
        """Generate for a batch of prompts. Collective over the TP ranks, with the same prompts.

        Args:
            prompts: `batch` has "input_ids", "attention_mask" [samples, prompt length] and "position_ids", padded on
                the left; `non_tensor_batch` may have "raw_prompt_ids", and for conversations has "raw_prompt";
                `meta_info` may have "do_sample" and "validate".
            kwargs: sampling parameters that replace those of the configuration.

        Returns:
            DataProto with "prompts", "responses" [samples, response_length], "input_ids", "attention_mask",
            "position_ids" and, with `calculate_log_probs`, "rollout_log_probs"; conversations also have
            "response_mask", 1 where the model wrote, and in `non_tensor_batch` "messages" and "reward_scores".

        Raises:
            InvalidRequestError: images or video.
            SpmdEngineError: as from `SpmdEngine.generate`.
        """
        media = prompts.non_tensor_batch.get("multi_modal_data")
        if media is not None and any(bool(item) for item in media):
            raise InvalidRequestError("images and video are not supported: the engine takes token ids only")
        params = {**self._params_for(prompts.meta_info), **kwargs}
        if self._conversations is not None:
            return self._conversations.run(prompts, params, engine=self._engine, mesh=self._mesh)
        return self._generate(prompts, params)

    def _params_for(self, meta_info: Mapping[str, Any]) -> dict[str, Any]:
        params = dict(self.sampling_params)
        if not meta_info.get("do_sample", True):
            params.update({**_GREEDY, **_NO_PENALTIES, "max_new_tokens": self.config.response_length})
        elif meta_info.get("validate", False):
            given = self.config.val_kwargs
            params.update(top_k=given.top_k, top_p=given.top_p, temperature=given.temperature)
        return params

    def _generate(self, prompts: DataProto, params: dict[str, Any]) -> DataProto:
        ids, mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        given = prompts.non_tensor_batch.pop("raw_prompt_ids", None)
        prompts.non_tensor_batch.pop("multi_modal_data", None)
        if given is None:
            given = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        with_logprobs = bool(self.config.get("calculate_log_probs", False))
        outputs = self._engine.generate(
            input_ids=[list(map(int, row)) for row in given], sampling_params=params, return_logprob=with_logprobs
        )
        assert isinstance(outputs, list)
        rows = [output["output_ids"] for output in outputs]
        width = max([self.config.response_length, *map(len, rows)])
        responses = _padded(rows, width, self.pad_token_id, like=ids)
        answered = _padded([[1] * len(row) for row in rows], width, 0, like=mask)
        positions = prompts.batch["position_ids"]
        after = torch.arange(1, width + 1, device=positions.device)
        batch = {
            "prompts": ids,
            "responses": responses,
            "input_ids": torch.cat([ids, responses], -1),
            "attention_mask": torch.cat([mask, answered], -1),
            "position_ids": torch.cat([positions, positions[..., -1:] + after], -1),
        }
        if with_logprobs:
            values = [[entry[0] for entry in output["meta_info"]["output_token_logprobs"]] for output in outputs]
            batch["rollout_log_probs"] = _padded(values, width, _PADDED_LOGPROB, like=ids, dtype=torch.float32)
        return DataProto(batch=TensorDict(batch, batch_size=len(ids)), non_tensor_batch=prompts.non_tensor_batch)


def _padded(
    rows: list[list[Any]], width: int, fill: float, *, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    table = np.full((len(rows), width), fill)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(table).to(device=like.device, dtype=dtype or like.dtype)


def _sampling_params(config: Any) -> dict[str, Any]:
    """SGLang's sampling parameters of a rollout configuration. verl repeats the prompts by itself, so n is 1."""
    given = {str(key): config.get(key) for key in config if str(key) in _SAMPLING and config.get(key) is not None}
    as_plain = {key: list(value) if key.startswith("stop") and not isinstance(value, str) else value
                for key, value in given.items()}  # fmt: skip
    return {"max_new_tokens": config.response_length, **_NO_PENALTIES, **as_plain, "n": 1}


def _engine_kwargs(config: Any) -> dict[str, Any]:
    """What the user says of SGLang's own arguments, without those that are null."""
    given = (config.get("engine_kwargs", None) or {}).get("sglang", None) or {}
    return {str(key): value for key, value in given.items() if value is not None}


def _context_length(hf_config: Any) -> int | None:
    """Tokens that the model can take, rope scaling included; None if its configuration does not say."""
    for part in (hf_config, getattr(hf_config, "llm_config", None), getattr(hf_config, "text_config", None)):
        length = getattr(part, "max_position_embeddings", None)
        if length is not None:
            scaling = getattr(part, "rope_scaling", None) or {}
            return int(length * (scaling.get("factor") or 1.0))
    return None
