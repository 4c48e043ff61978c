"""verl 0.5's `ActorRolloutRefWorker` on a machine without an accelerator, beside the transformers of this SGLang.

verl 0.5 was written for CUDA and transformers 4. What it needs to run here is made up around it, and nothing in it is
replaced: all of this is below "bends". The rollout, the sharding manager and the engine are as a user has them.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from fsdp1_on_cpu import Cpu

# ---- bends ----
# verl asks `torch.<device>` for the functions of torch.cuda; torch.cpu lacks a few.
_MEMORY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
_LACKING = {"empty_cache": None, "get_device_name": "CPU", "mem_get_info": (0, 0), **dict.fromkeys(_MEMORY, 0)}
for _name, _value in _LACKING.items():
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, lambda *_, value=_value, **__: value)
torch.cpu.current_device = lambda: Cpu("cpu")
from verl.single_controller.base.decorator import Dispatch, register  # noqa: E402
from verl.tools.base_tool import BaseTool  # noqa: E402
from verl.workers.fsdp_workers import ActorRolloutRefWorker  # noqa: E402


class Adder(BaseTool):
    """Adds, and counts how often it was asked to as the reward."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._calls = {}

    async def execute(self, instance_id, parameters, **kwargs):
        self._calls[instance_id] = self._calls.get(instance_id, 0) + 1
        return str(parameters["a"] + parameters["b"]), 0.0, {}

    async def calc_reward(self, instance_id, **kwargs) -> float:
        return float(self._calls.get(instance_id, 0))


class Worker(ActorRolloutRefWorker):
    """With gloo in the place of NCCL, and two methods for the test."""

    def __init__(self, *args, **kwargs) -> None:
        dist.init_process_group("gloo")  # verl makes the process group with NCCL, if there is none
        super().__init__(*args, **kwargs)
        import transformers

        # transformers 5 has dropped this class; verl looks up in it whether the model is one for images.
        if not hasattr(transformers, "AutoModelForVision2Seq"):
            transformers.AutoModelForVision2Seq = transformers.AutoModelForImageTextToText

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_weights(self, path: str) -> None:
        """The trainer's weights as a checkpoint."""
        import transformers
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        weights = get_model_state_dict(self.actor_module_fsdp, options=options)
        if dist.get_rank() == 0:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(self.actor_model_config, dtype=torch.float32)
            model.to_empty(device="cpu").load_state_dict(weights)
            model.save_pretrained(path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def facts(self) -> dict:
        """What the test wants to know of this rank."""
        import sys

        import ray

        engine = self.rollout._engine
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "engine": type(engine).__module__,
            "weight_version": engine.weight_version,
            "updates": engine.stats().updates,
            "sleeping": engine.sleeping,
            "sglang_imported": "sglang" in sys.modules,
        }
