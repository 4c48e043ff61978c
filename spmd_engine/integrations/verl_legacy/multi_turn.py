"""Multi-turn rollouts of verl 0.5: conversations with tools and interactions, many at a time.

verl's own `AsyncRolloutRequest` keeps the tokens and masks of a conversation, and its registries make the tools and
interactions. What is here is the order of turns: generate, then call the tools that the model asked for, or hear what
the other side of the interaction says, and again. It runs on the first rank of a replica, through `async_generate`;
the others wait for the result.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl import DataProto
from verl.tools.schemas import OpenAIFunctionCallSchema, OpenAIFunctionToolCall
from verl.workers.rollout.schemas import AsyncRolloutRequest, AsyncRolloutRequestStateEnum, FinishReasonTypeEnum

import spmd_engine
from spmd_engine.errors import ConfigError, ErrorReport, InvalidRequestError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from spmd_engine import SpmdEngine

logger = logging.getLogger(__name__)

_TYPED = frozenset(spmd_engine.__all__)
# How Qwen and Hermes models ask for a tool.
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
# Parts of a finished conversation: its field, the side that is padded, and the value that it is padded with.
_PARTS = (("ids", None), ("attention_mask", 0), ("position_ids", 0), ("loss_mask", 0))


class Conversations:
    """Runs the conversations of a batch.

    Args:
        multi_turn: `actor_rollout_ref.rollout.multi_turn`.
        config: `actor_rollout_ref.rollout`.
        max_model_len: tokens of a whole conversation, at most.
        processing_class: the tokenizer.

    Raises:
        ConfigError: a tool-call format other than "hermes", or a verl before 0.5.
    """

    def __init__(self, multi_turn: Any, config: Any, max_model_len: int, processing_class: Any) -> None:
        if AsyncRolloutRequest.model_fields["response_ids"].is_required():
            raise ConfigError(
                "rollout.multi_turn needs verl 0.5, whose requests are others: set multi_turn.enable=False"
            )
        self._turns, self._config, self._max_len = multi_turn, config, max_model_len
        self._processing_class = processing_class
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._tools: dict[str, Any] = {}
        self._interactions: dict[str, Any] = {}
        if (path := multi_turn.get("tool_config_path", None)) is not None:
            if (form := multi_turn.get("format", None) or "hermes") != "hermes":
                raise ConfigError(f"multi_turn.format={form!r}: of the forms of tool calls only 'hermes' is known here")
            from verl.tools.utils.tool_registry import initialize_tools_from_config

            self._tools = {tool.name: tool for tool in initialize_tools_from_config(path)}
        if (path := multi_turn.get("interaction_config_path", None)) is not None:
            from verl.interactions.utils.interaction_registry import initialize_interactions_from_config

            self._interactions = initialize_interactions_from_config(path)
        many = max_model_len // 3  # verl's meaning of "no limit"
        self._max_turns = multi_turn.get("max_assistant_turns", None) or many
        self._max_user_turns = multi_turn.get("max_user_turns", None) or many
        # One for all rollouts: tools keep connections that belong to the loop in which they were made.
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, prompts: DataProto, params: dict[str, Any], *, engine: SpmdEngine, mesh: DeviceMesh) -> DataProto:
        """All conversations of a batch. Collective over the TP ranks.

        Raises:
            InvalidRequestError: the batch has no "raw_prompt", or a tool or an interaction that there is none of.
            SpmdEngineError: what the first rank of the replica met, on all of them.
            RuntimeError: the same, on the others, of any other error, such as that of a tool.
        """
        done: list[Any] = [None]
        error: Exception | None = None
        if engine.is_leader:
            try:
                if self._loop is None:
                    self._loop = asyncio.new_event_loop()
                done = [self._batch(self._loop.run_until_complete(self._all(prompts, params, engine)))]
            except Exception as caught:  # the other ranks wait
                error = _first(caught)
                done = [ErrorReport(type(error).__name__, str(error))]
        first = int(mesh.mesh.flatten()[0])
        if mesh.size() > 1:
            dist.broadcast_object_list(done, src=first, group=mesh.get_group())
        if error is not None:
            raise error
        if isinstance(done[0], ErrorReport):
            kind, message = done[0].kind, f"rank {first}, the leader of this replica: {done[0].message}"
            raise ErrorReport(kind, message).to_exception() if kind in _TYPED else RuntimeError(f"{kind}: {message}")
        tensors, others = done[0]
        device = prompts.batch["input_ids"].device
        tensors = {name: value.to(device) for name, value in tensors.items()}
        return DataProto(TensorDict(tensors, batch_size=len(tensors["prompts"])), non_tensor_batch=others)

    async def _all(self, prompts: DataProto, params: dict[str, Any], engine: SpmdEngine) -> list[AsyncRolloutRequest]:
        others = prompts.non_tensor_batch
        if "raw_prompt" not in others:
            raise InvalidRequestError("conversations need the messages of the prompts: set data.return_raw_chat=True")
        requests = []
        for i, messages in enumerate(others["raw_prompt"]):
            tools = others["tools_kwargs"][i] if self._tools else {}
            if not tools.keys() <= self._tools.keys():
                raise InvalidRequestError(f"sample {i} wants tools {sorted(tools)}; there are {sorted(self._tools)}")
            requests.append(
                AsyncRolloutRequest(
                    batch_data_id=i,
                    request_id=str(uuid4()),
                    state=AsyncRolloutRequestStateEnum.PENDING,
                    messages=list(messages),
                    tool_schemas=[self._tools[name].get_openai_tool_schema() for name in tools] or None,
                    tools_kwargs=tools,
                    interaction_kwargs=others["interaction_kwargs"][i] if self._interactions else {},
                    reward_scores={},
                    max_prompt_len=self._config.prompt_length,
                    max_response_len=self._config.response_length,
                    max_model_len=min(self._max_len, self._config.prompt_length + self._config.response_length),
                    use_inference_chat_template=self._turns.get("use_inference_chat_template", False),
                    tokenization_sanity_check_mode=self._turns.get("tokenization_sanity_check_mode", "strict"),
                    processing_class=self._processing_class,
                )
            )
        async with asyncio.TaskGroup() as group:  # one that fails ends the others, and their requests
            for request in requests:
                group.create_task(self._converse(request, params, engine))
        return requests

    async def _converse(self, request: AsyncRolloutRequest, params: dict[str, Any], engine: SpmdEngine) -> None:
        """One conversation, from its prompt to its end."""
        tools = {name: self._tools[name] for name in request.tools_kwargs}
        interaction = self._interaction_of(request)
        for name, tool in tools.items():
            await tool.create(request.request_id, **request.tools_kwargs[name].get("create_kwargs", {}))
        if interaction is not None:
            await interaction.start_interaction(request.request_id, **request.interaction_kwargs)
        user_rewards: list[float] = []
        end = FinishReasonTypeEnum.STOP
        for _ in range(self._max_turns):
            ids = request.get_generation_prompt_ids(self._processing_class)
            room = self._max_len - len(ids) - 1
            if room <= 0:
                end = FinishReasonTypeEnum.LENGTH
                break
            length = min(self._config.response_length, room)
            output = await engine.async_generate(
                input_ids=ids, sampling_params={**params, "n": 1, "max_new_tokens": length}
            )
            assert isinstance(output, dict)
            if output["meta_info"]["finish_reason"]["type"] == "length":
                request.add_assistant_message(self._processing_class, output["text"])
                end = FinishReasonTypeEnum.LENGTH
                break
            text, calls = _tool_calls(output["text"], tools)
            if calls:
                request.add_assistant_message(self._processing_class, text, tool_calls=calls)
                await self._call(request, calls)
            else:
                request.add_assistant_message(self._processing_class, output["text"])
                if interaction is None or len(user_rewards) == self._max_user_turns:
                    break
                said = [{"role": message.role, "content": message.content} for message in request.messages]
                is_over, reply, reward, _ = await interaction.generate_response(
                    request.request_id, said, **request.interaction_kwargs
                )
                user_rewards.append(reward)
                if is_over:
                    break
                request.add_user_message(self._processing_class, reply)
            if request.input_ids.shape[-1] >= self._max_len:
                break
        rewards: dict[str, Any] = {"user_turn_rewards": user_rewards}
        for name, tool in tools.items():
            given = request.tools_kwargs[name]
            rewards[name] = await tool.calc_reward(request.request_id, **given.get("calc_reward_kwargs", {}))
            await tool.release(request.request_id, **given.get("release_kwargs", {}))
        request.finalize(self._processing_class, rewards, end)

    def _interaction_of(self, request: AsyncRolloutRequest) -> Any:
        if not request.interaction_kwargs or not self._interactions:
            return None
        name = request.interaction_kwargs.get("name", "gsm8k")  # verl's default
        if name not in self._interactions:
            raise InvalidRequestError(f"interaction {name!r} is unknown; there are {sorted(self._interactions)}")
        return self._interactions[name]

    async def _call(self, request: AsyncRolloutRequest, calls: list[OpenAIFunctionToolCall]) -> None:
        results = await asyncio.gather(
            *(
                self._tools[call.function.name].execute(
                    request.request_id,
                    call.function.arguments,
                    **request.tools_kwargs[call.function.name].get("execute_kwargs", {}),
                )
                for call in calls
            )
        )
        request.add_tool_response_messages(self._processing_class, [answer for answer, _, _ in results])
        for call, (_, _, metrics) in zip(calls, results, strict=True):
            request.update_metrics(metrics, call.function.name)

    def _batch(self, requests: list[AsyncRolloutRequest]) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
        """What verl trains with: prompts padded on the left, responses on the right."""
        made: dict[str, dict[str, torch.Tensor]] = {"prompt": {}, "response": {}}
        widths = {"prompt": self._config.prompt_length, "response": self._config.response_length}
        for side, parts in made.items():
            for part, fill in _PARTS:
                rows = [getattr(request, f"{side}_{part}").squeeze(0).long() for request in requests]
                width = max([widths[side], *(row.shape[-1] for row in rows)])
                parts[part] = torch.stack([
                    _pad(row, width, self._pad if fill is None else fill, on_the_left=side == "prompt") for row in rows
                ])  # fmt: skip
        prompt, response = made["prompt"], made["response"]
        tensors = {
            "prompts": prompt["ids"],
            "responses": response["ids"],
            "response_mask": response["loss_mask"],
            "input_ids": torch.cat([prompt["ids"], response["ids"]], -1),
            "attention_mask": torch.cat([prompt["attention_mask"], response["attention_mask"]], -1),
            "position_ids": torch.cat([prompt["position_ids"], response["position_ids"]], -1),
        }
        others = {
            "messages": np.array([{"messages": request.messages} for request in requests], dtype=object),
            "reward_scores": np.array([request.reward_scores for request in requests], dtype=object),
            "request_id": np.array([request.request_id for request in requests], dtype=object),
        }
        return tensors, others


def _first(error: Exception) -> Exception:
    """The error itself, or the first of a group."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _tool_calls(text: str, tools: dict[str, Any]) -> tuple[str, list[OpenAIFunctionToolCall]]:
    """What a message says beside its calls of tools, and the calls; those that cannot be made are dropped."""
    calls: list[OpenAIFunctionToolCall] = []
    for found in _CALL.findall(text) if tools else ():
        try:
            asked = json.loads(found)
            name, arguments = asked["name"], asked["arguments"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            logger.info("a tool call cannot be read: %s", error)
            continue
        if name in tools and isinstance(arguments, dict):
            function = OpenAIFunctionCallSchema(name=name, arguments=arguments)
            calls.append(OpenAIFunctionToolCall(id=str(len(calls)), function=function))
    return _CALL.sub("", text) if calls else text, calls


def _pad(row: torch.Tensor, width: int, value: int, *, on_the_left: bool) -> torch.Tensor:
    missing = width - row.shape[-1]
    return torch.nn.functional.pad(row, (missing, 0) if on_the_left else (0, missing), value=value)
