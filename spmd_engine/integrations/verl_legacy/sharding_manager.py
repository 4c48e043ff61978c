"""FSDPSGLangShardingManager of verl 0.3 to 0.5: between a training step and the rollout that follows it."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from verl.protocol import all_gather_data_proto
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.workers.sharding_manager.base import BaseShardingManager

from spmd_engine.errors import ConfigError, SpmdEngineError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from verl import DataProto

    from spmd_engine import SpmdEngine

# verl's: the ranks of one replica draw the same numbers during a rollout, different replicas different ones.
_SEED_OF_FIRST_REPLICA = 1000


class FSDPSGLangShardingManager(BaseShardingManager):
    """Wakes the engine with the trainer's weights on entry, and puts it to sleep on exit.

    The constructor takes what those of verl 0.3, 0.4 and 0.5 take, by keyword.

    Args:
        module: the actor, sharded by FSDP1 or FSDP2.
        inference_engine: `SGLangRollout._engine`, which is one `SpmdEngine` on every rank.
        model_config: unused; the engine knows the model.
        rollout_config: verl 0.5's `actor_rollout_ref.rollout`, for `free_cache_engine`. Without it the engine sleeps
            between rollouts.
        full_params: unused; nothing is gathered either way.
        device_mesh: dims "dp" and "infer_tp" over all ranks.
        offload_param: the weights are in CPU memory between training steps, and are on the GPU for the update.
        multi_stage_wake_up: the KV cache comes back after the update, for a lower peak. With `offload_param` it
            always does.

    Attributes:
        timing: seconds by phase of the last entry: "reshard".

    Raises:
        ConfigError: no device mesh.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        inference_engine: SpmdEngine,
        model_config: Any,
        rollout_config: Any = None,
        full_params: bool = False,
        device_mesh: DeviceMesh | None = None,
        offload_param: bool = False,
        multi_stage_wake_up: bool = False,
    ) -> None:
        super().__init__()
        if device_mesh is None:
            raise ConfigError("FSDPSGLangShardingManager needs device_mesh=, with dims 'dp' and 'infer_tp'")
        self.module, self.inference_engine = module, inference_engine
        self.model_config, self.rollout_config = model_config, rollout_config
        self.full_params, self.device_mesh, self.offload_param = full_params, device_mesh, offload_param
        self.multi_stage_wake_up = multi_stage_wake_up
        self.tp_size = device_mesh["infer_tp"].size()
        self.tp_rank = device_mesh["infer_tp"].get_local_rank()
        self.timing: dict[str, float] = {}
        self._sleeps = rollout_config is None or bool(rollout_config.free_cache_engine)
        # The state of the trainer's random numbers, and of those during rollouts, whichever are not in use.
        self.torch_random_states = _rng_state()
        _seed(_SEED_OF_FIRST_REPLICA + device_mesh["dp"].get_local_rank())
        self.gen_random_states = _rng_state()
        _set_rng_state(self.torch_random_states)

    # ---- as verl's workers use it ----

    def __enter__(self) -> None:
        started = time.perf_counter()
        self._wake_up()
        self.timing = {"reshard": time.perf_counter() - started}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What went wrong in the rollout is what the user must see, not that the engine is closed since.
        with contextlib.suppress(*([SpmdEngineError] if error is not None else [])):
            self._sleep()

    async def wake_up(self) -> None:
        """Resume the engine's memory and move the trainer's weights into it. Collective, like all that it calls."""
        self._wake_up()

    async def sleep(self) -> None:
        """Release the engine's memory."""
        self._sleep()

    def preprocess_data(self, data: DataProto) -> DataProto:
        """The data of all TP ranks, on each of them: `generate` is collective."""
        if self.tp_size > 1:
            all_gather_data_proto(data=data, process_group=self.device_mesh["infer_tp"].get_group())
        return data

    def postprocess_data(self, data: DataProto) -> DataProto:
        """This rank's part again."""
        return data if self.tp_size == 1 else data.chunk(chunks=self.tp_size)[self.tp_rank]

    # ----

    def _wake_up(self) -> None:
        engine = self.inference_engine
        _empty_cache()
        if engine.sleeping:
            in_stages = self.multi_stage_wake_up or self.offload_param
            engine.resume_memory_occupation(["weights"] if in_stages else None)
        if self.offload_param:
            load_fsdp_model_to_gpu(self.module)
        engine.update_weights(self.module)
        if self.offload_param:
            offload_fsdp_model_to_cpu(self.module)
        _empty_cache()
        if engine.sleeping:  # to resume closes what the engine has mapped of the weights, which then are free, too
            engine.resume_memory_occupation()
        self.torch_random_states = _rng_state()
        _set_rng_state(self.gen_random_states)

    def _sleep(self) -> None:
        self.gen_random_states = _rng_state()
        _set_rng_state(self.torch_random_states)
        self.module.train()
        if self._sleeps:
            self.inference_engine.release_memory_occupation()
        _empty_cache()


def _rng_state() -> torch.Tensor:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_rng_state(state: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _seed(seed: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
