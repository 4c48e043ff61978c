"""The rollout of one rank of a verl 0.9 worker: its SpmdEngine, fed with the shards of the trainer beside it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from verl.workers.rollout.base import BaseRollout

from spmd_engine import SpmdEngine
from spmd_engine.control import timeouts
from spmd_engine.errors import ConfigError, InvalidRequestError, SpmdEngineError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_FSDP = "verl.workers.engine.fsdp."
_TAGS = {"weights": ("weights",), "kv_cache": ("kv_cache", "cuda_graph")}


class SpmdRollout(BaseRollout):
    """verl's rollout interface over one `SpmdEngine`, which is made with it.

    All ranks of a replica make it, and call `resume`, `update_weights` and `release` together, which is what verl's
    workers do. Requests come through the replica's server, to the first rank.

    Args:
        config: `actor_rollout_ref.rollout`. `engine_kwargs.spmd` may have any field of `sglang.ServerArgs`.
        model_config: `actor_rollout_ref.model`.
        device_mesh: verl's mesh over all ranks; None outside of a hybrid worker.

    Raises:
        ConfigError: an option that this rollout does not have, or SGLang cannot start.
    """

    # Of a release: 2 for the weights, too. verl sets 1 for LoRA adapters, which are refused here.
    sleep_level = 2

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, model_config, device_mesh, *args, **kwargs)
        _check(self.config, self.model_config, device_mesh)
        tp_size = self.config.tensor_model_parallel_size
        # verl's own mesh is one of GPUs.
        mesh = init_device_mesh("cpu", (dist.get_world_size() // tp_size, tp_size), mesh_dim_names=("dp", "tp"))["tp"]
        self.global_steps: int | None = None
        self._trainer: Any = None
        self._said: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: dict[str, dict[int, asyncio.Task[None]]] = {}  # by request id and ticket
        self.engine = SpmdEngine(
            self.model_config.local_path, device_mesh_cpu=mesh, **_server_args(self.config, self.model_config)
        )

    # ---- what verl's worker calls ----

    async def resume(self, tags: list[str]) -> None:
        """Resume "weights" or "kv_cache", which has the CUDA graphs with it, as far as they sleep."""
        wanted = {part for tag in tags for part in _TAGS.get(tag, (tag,))}
        if asleep := sorted(wanted & set(self.engine.sleeping)):
            self.engine.resume_memory_occupation(asleep)

    async def release(self) -> None:
        """Release all memory of the engine, once its requests have finished."""
        self.sleep()

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        """Move the trainer's weights into the engine.

        They come from the shards of the FSDP module where that has them as they are, and verl's generator, which
        gathers one full tensor after the other, is left alone. Otherwise it is run, and a log record says why: every
        rank then holds the whole model for a moment.

        Args:
            weights: verl's generator of names and full tensors.
            wire_format: "named_tensors".
            global_steps: the trainer's step, which outputs are marked with.
            peft_config: of an adapter that is not merged; refused.

        Raises:
            ConfigError: the weights come as a delta or as an adapter.
            SpmdEngineError: as from `SpmdEngine.update_weights`.
        """
        if wire_format != "named_tensors":
            raise ConfigError(f"wire_format={wire_format!r}: set rollout.checkpoint_engine.backend=naive")
        if peft_config is not None:
            raise ConfigError("the engine runs whole weights, no LoRA adapters: set model.lora.merge=True")
        reason = self._why_not_the_shards()
        if reason != self._said:
            how = "the trainer's shards" if reason is None else f"verl's generator of full tensors, because {reason}"
            logger.log(logging.INFO if reason is None else logging.WARNING, "weights come from %s", how)
            self._said = reason
        if reason is None:
            if isinstance(weights, Iterable) and hasattr(weights, "close"):
                weights.close()
            if self._trainer.is_param_offload_enabled and torch.cuda.is_available():
                # verl itself takes them off again after this call.
                self._trainer.to("cuda", model=True, optimizer=False, grad=False)
            self.engine.update_weights(self._trainer.module)
        else:
            self.engine.update_weights({name: tensor async for name, tensor in _each(weights)})
        self.global_steps = global_steps

    def _why_not_the_shards(self) -> str | None:
        trainer = self._trainer
        if trainer is None:
            return "no SpmdReplica has been launched over these workers, so the trainer is unknown"
        if not type(trainer).__module__.startswith(_FSDP):
            return f"{type(trainer).__name__} is not verl's FSDP engine"
        module = getattr(trainer.module, "_fsdp_wrapped_module", trainer.module)
        if hasattr(module, "peft_config"):
            return "LoRA weights are merged on the way"
        if getattr(trainer, "_qat_enabled", False):
            return "quantisation-aware training quantises them on the way"
        return None

    # ---- what the replica and its server call, by `on_rollout`; each returns at once or is collective ----

    def attach(self, worker: Any) -> dict[str, Any]:
        """Learn who trains. Returns what the replica must know of this rank."""
        import ray

        self._trainer = getattr(getattr(worker, "actor", None), "engine", None)
        return {"node": ray.get_runtime_context().get_node_id(), "is_leader": self.engine.is_leader}

    def sleep(self) -> None:
        """Release what is awake."""
        if not {"weights", "kv_cache"} <= set(self.engine.sleeping):
            self.engine.release_memory_occupation()

    def wake_up(self) -> None:
        """Resume what sleeps."""
        if self.engine.sleeping:
            self.engine.resume_memory_occupation()

    def release_kv_cache(self) -> None:
        """Release the KV cache, unless it sleeps."""
        if "kv_cache" not in self.engine.sleeping:
            self.engine.release_memory_occupation(["kv_cache"])

    def resume_kv_cache(self) -> None:
        """Resume the KV cache, if it sleeps."""
        if "kv_cache" in self.engine.sleeping:
            self.engine.resume_memory_occupation(["kv_cache"])

    def clear_kv_cache(self) -> None:
        """Drop the prefix cache."""
        self.engine.flush_cache()

    def abort_all_requests(self) -> None:
        """End all requests with the tokens that they have, and let those that come wait. On the first rank."""
        self.engine.pause()
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._abort(), self._loop).result(timeouts.VERL_ABORT_S)

    async def _abort(self) -> None:
        self.engine.abort()

    def abort_request(self, request_id: str, ticket: int) -> None:
        """End a request that nobody waits for any more. On the first rank."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._give_up, request_id, ticket)

    def _give_up(self, request_id: str, ticket: int) -> None:
        if (task := self._serving.get(request_id, {}).get(ticket)) is not None:
            task.cancel()

    def resume_generation(self) -> None:
        """Let requests go on. On the first rank."""
        self.engine.resume()

    def is_alive(self) -> bool:
        """Whether this process answers."""
        return True

    def submit(self, ticket: int, request: dict[str, Any], server: ActorHandle) -> None:
        """Begin a request; `server.deliver` gets what comes of it. On the first rank."""
        if self._loop is None:
            # A loop of its own: that of verl's worker stands still while the worker trains.
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="spmd-rollout", daemon=True).start()
        self._loop.call_soon_threadsafe(self._begin, ticket, request, server)

    def _begin(self, ticket: int, request: dict[str, Any], server: ActorHandle) -> None:
        request_id = request["request_id"]
        namesakes = self._serving.setdefault(request_id, {})
        given_up = [task for task in namesakes.values() if task.cancelling()]
        task = asyncio.get_running_loop().create_task(self._serve(ticket, request, server, after=given_up))
        namesakes[ticket] = task

        def ended(_: object) -> None:
            del namesakes[ticket]
            if not namesakes:
                del self._serving[request_id]

        task.add_done_callback(ended)

    async def _serve(
        self, ticket: int, request: dict[str, Any], server: ActorHandle, *, after: list[asyncio.Task[None]]
    ) -> None:
        """Serve it, once those that had its id and were given up have ended. If it is given up, nobody is answered."""
        if after:
            await asyncio.wait(after)
        answer: dict[str, Any] | Exception
        try:
            output = await self.engine.async_generate(**request)
            assert isinstance(output, dict)
            answer = {**output, "global_steps": self.global_steps}
        except SpmdEngineError as error:
            answer = error
        except Exception as error:  # whoever asked waits for an answer
            answer = InvalidRequestError(f"{type(error).__name__}: {error}")
        server.deliver.remote(ticket, answer)


def on_rollout(worker: Any, method: str, *args: Any) -> Any:
    """Call a method of the SpmdRollout in a worker's process: for `ActorHandle.__ray_call__`.

    Args:
        worker: the Ray actor: verl's ActorRolloutRefWorker, or one that holds several workers of which one is it.

    Raises:
        ConfigError: there is no SpmdRollout.
    """
    inner = getattr(worker, "fused_worker_dict", None) or getattr(worker, "worker_dict", None) or {}
    for part in (worker, *inner.values()):
        rollout = getattr(part, "rollout", None)
        if isinstance(rollout, SpmdRollout):
            call: Callable[..., Any] = getattr(rollout, method)
            return call(part, *args) if method == "attach" else call(*args)
    raise ConfigError("this worker has no rollout `spmd`: set actor_rollout_ref.rollout.name=spmd and call init_model")


async def _each(weights: Any) -> Any:
    if isinstance(weights, AsyncIterable):
        async for item in weights:
            yield item
    else:
        for item in weights:
            yield item


def _check(config: Any, model_config: Any, device_mesh: Any) -> None:
    """Refuse what is not there, before SGLang starts.

    Raises:
        ConfigError: with what to do.
    """
    if device_mesh is None or not dist.is_initialized():
        raise ConfigError("rollout.name=spmd lives inside the trainer's workers: use hybrid mode (rollout.nnodes=0)")
    for name in ("data_parallel_size", "pipeline_model_parallel_size"):
        if getattr(config, name, 1) != 1:
            raise ConfigError(f"rollout.{name} must be 1: the ranks beyond tensor_model_parallel_size are replicas")
    if getattr(config, "quantization", None) is not None:
        raise ConfigError(
            f"rollout.quantization={config.quantization}: the engine takes the trainer's weights as they are"
        )
    if getattr(config, "enable_rollout_routing_replay", False):
        raise ConfigError("rollout.enable_rollout_routing_replay is not supported by rollout.name=spmd")
    lora = getattr(model_config, "lora", None) or {}
    if (getattr(model_config, "lora_rank", 0) or lora.get("rank", 0)) and not lora.get("merge", False):
        raise ConfigError("the engine runs whole weights, no LoRA adapters: set model.lora.merge=True")


def _server_args(config: Any, model_config: Any) -> dict[str, Any]:
    """SGLang's arguments for a rollout configuration of verl."""
    given = (config.engine_kwargs or {}).get("spmd") or {}
    args: dict[str, Any] = {
        "dtype": config.dtype,
        "mem_fraction_static": config.gpu_memory_utilization,
        "load_format": config.load_format,
        "max_running_requests": config.max_num_seqs,
        "enable_memory_saver": config.free_cache_engine,
        "disable_radix_cache": not config.enable_prefix_caching,
        "trust_remote_code": model_config.trust_remote_code,
        "skip_tokenizer_init": config.skip_tokenizer_init,
    }
    if config.enforce_eager:
        args["disable_cuda_graph"] = True
    if config.expert_parallel_size > 1:
        args["ep_size"] = config.expert_parallel_size
    return {**args, **{str(name): value for name, value in given.items() if value is not None}}
