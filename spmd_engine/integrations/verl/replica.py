"""One replica of the rollout `spmd` as verl 0.9's driver sees it, and the actor that takes its requests."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput

from spmd_engine.control import timeouts
from spmd_engine.errors import ConfigError, InvalidRequestError
from spmd_engine.integrations.verl.rollout import on_rollout

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_MAX_CONCURRENCY = 1 << 20


class SpmdReplica(RolloutReplica):
    """The engines in the workers of one replica. Nothing is launched but an actor without a GPU, the server."""

    async def launch_servers(self) -> None:
        """Tell the rollouts of their trainers, and start the server next to the first of them.

        Raises:
            ConfigError: not in hybrid mode, or the workers have no rollout `spmd`.
        """
        if self.rollout_mode is not RolloutMode.HYBRID:
            raise ConfigError(f"rollout.name=spmd has the mode hybrid alone, not {self.rollout_mode}")
        if len(self.workers) != self.world_size:
            raise ConfigError(f"replica {self.replica_rank} needs {self.world_size} workers, got {len(self.workers)}")
        facts = await asyncio.gather(*(worker.__ray_call__.remote(on_rollout, "attach") for worker in self.workers))
        if [fact["is_leader"] for fact in facts] != [True, *[False] * (self.world_size - 1)]:
            raise ConfigError(f"the workers of replica {self.replica_rank} are not the ranks of one engine, in order")
        name = f"spmd_server_{self.replica_rank}{self.name_suffix}"
        options = {
            "name": name,
            "num_cpus": 0,
            # `deliver` must get in however many requests wait, or they would wait for ever; the engine queues them.
            "max_concurrency": max(self.max_concurrency, _MAX_CONCURRENCY),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=facts[0]["node"], soft=False),
        }
        actor: Any = ray.remote(SpmdServer)  # what the decorator adds is not in its types
        server = actor.options(**options).remote(self.config, list(self.workers))
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        # verl's name for it in the load balancer; nothing listens there.
        self._server_address = name


class SpmdServer:
    """Takes the requests of a replica and hands them to its first rank; a Ray actor.

    Args:
        config: `actor_rollout_ref.rollout`.
        workers: the actors of the replica's ranks, in order.
    """

    def __init__(self, config: Any, workers: list[ActorHandle]) -> None:
        self._config, self._workers, self._leader = config, workers, workers[0]
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._watching: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Return once the actor has started."""

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        **others: Any,
    ) -> TokenOutput:
        """Generate for one prompt.

        Args:
            prompt_ids: its token ids.
            sampling_params: SGLang's, with verl's "max_tokens" and "logprobs".
            request_id: unique.
            image_data, video_data, others: must be empty.

        Raises:
            InvalidRequestError: SGLang cannot serve this request.
            SpmdEngineError, ray.exceptions.RayActorError: the engine or its worker is gone.
        """
        given = {"image_data": image_data, "video_data": video_data, **others}
        if unknown := [name for name, value in given.items() if value]:
            raise InvalidRequestError(f"rollout.name=spmd takes token ids only, not {', '.join(unknown)}")
        ids = [int(token) for token in prompt_ids]
        request = _request(self._config, ids, dict(sampling_params), request_id)
        ticket = next(self._tickets)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answer
        try:
            me = ray.get_runtime_context().current_actor
            await self._leader.__ray_call__.remote(on_rollout, "submit", ticket, request, me)
            if self._watching is None or self._watching.done():
                # Not in the context of this request: Ray would cancel it, and what it calls, together with the request.
                self._watching = asyncio.create_task(self._watch(), context=contextvars.Context())
            output = await answer
        except (asyncio.CancelledError, ray.exceptions.TaskCancelledError):  # the latter from a call that was under way
            abort: Any = self._leader.__ray_call__.remote
            contextvars.Context().run(abort, on_rollout, "abort_request", request_id, ticket)
            raise
        finally:
            self._waiting.pop(ticket, None)
        meta = output["meta_info"]
        logprobs = meta.get("output_token_logprobs")
        return TokenOutput(
            token_ids=output["output_ids"],
            log_probs=None if logprobs is None else [float(entry[0]) for entry in logprobs],
            stop_reason=meta["finish_reason"]["type"],
            extra_fields={"global_steps": output["global_steps"], "num_cached_tokens": meta["cached_tokens"]},
        )

    async def deliver(self, ticket: int, answer: dict[str, Any] | Exception) -> None:
        """What has come of a request, from the first rank."""
        waiting = self._waiting.get(ticket)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, Exception):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    async def _watch(self) -> None:
        """While requests wait, see whether the process of the first rank is still there."""
        while self._waiting:
            try:
                await self._leader.__ray_call__.remote(on_rollout, "is_alive")
            except Exception as error:  # of whatever kind: nothing will come any more
                for waiting in self._waiting.values():
                    if not waiting.done():
                        waiting.set_exception(error)
                return
            await asyncio.sleep(timeouts.VERL_LIVENESS_S)

    async def _on_all(self, method: str) -> None:
        await asyncio.gather(*(worker.__ray_call__.remote(on_rollout, method) for worker in self._workers))

    async def sleep(self) -> None:
        """Release the engine's memory on all ranks, if `free_cache_engine`."""
        if self._config.free_cache_engine:
            await self._on_all("sleep")

    async def wake_up(self) -> None:
        """Resume it."""
        await self._on_all("wake_up")

    async def release_kv_cache(self) -> None:
        """Release the KV cache on all ranks, if `free_cache_engine`."""
        if self._config.free_cache_engine:
            await self._on_all("release_kv_cache")

    async def resume_kv_cache(self) -> None:
        """Resume it."""
        await self._on_all("resume_kv_cache")

    async def clear_kv_cache(self) -> None:
        """Drop the prefix cache on all ranks."""
        await self._on_all("clear_kv_cache")

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """End all requests with the tokens that they have; those that come wait for `resume_generation`."""
        if reject_request:
            logger.warning("reject_request is ignored: requests wait until resume_generation")
        await self._leader.__ray_call__.remote(on_rollout, "abort_all_requests")

    async def resume_generation(self) -> None:
        """Let requests go on."""
        await self._leader.__ray_call__.remote(on_rollout, "resume_generation")

    async def start_profile(self, **_: Any) -> None:
        """Nothing: the calls of the engine show in the trace of the trainer's own profiler."""

    async def stop_profile(self) -> None:
        """Nothing, see `start_profile`."""


def _request(config: Any, ids: list[int], params: dict[str, Any], request_id: str) -> dict[str, Any]:
    """The arguments of `async_generate` for verl's sampling parameters.

    Raises:
        InvalidRequestError: no room for an answer, or parameters that the engine has not.
    """
    limit = config.max_model_len or config.prompt_length + config.response_length
    room = limit - len(ids)
    if room <= 0:
        raise InvalidRequestError(f"the prompt has {len(ids)} tokens, and the whole may have {limit}")
    if params.pop("prompt_logprobs", None) is not None:
        raise InvalidRequestError("prompt_logprobs is not supported by rollout.name=spmd")
    wanted = [params.pop(name, None) for name in ("max_new_tokens", "max_tokens")]
    length = next((value for value in wanted if value is not None), config.response_length)
    with_logprobs = bool(params.pop("logprobs", False))
    params = {**params, "n": 1, "max_new_tokens": max(1, min(length, room))}
    return {"input_ids": ids, "sampling_params": params, "return_logprob": with_logprobs, "request_id": request_id}
