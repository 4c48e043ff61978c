"""A platform for verl 0.9 on a machine without an accelerator, by verl's own registry of platforms.

Named in VERL_USE_EXTERNAL_MODULES, and chosen by VERL_PLATFORM=cpu. verl's FSDP engine is registered for "cuda" and
"npu" only: VERL_ENGINE_DEVICE=cuda takes it all the same.
"""

from __future__ import annotations

import contextlib
import types

import torch
from fsdp1_on_cpu import Cpu
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_MEMORY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
_LACKING = {"empty_cache": None, "ipc_collect": None, "get_device_name": "CPU", "mem_get_info": (0, 0)}
_LACKING |= dict.fromkeys(_MEMORY, 0)


def _constant(value):
    return lambda *_, **__: value


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = types.SimpleNamespace(**{
        **{name: _constant(value) for name, value in _LACKING.items()},
        **{name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("_")},
    })  # fmt: skip

    def is_available(self):
        return True

    def current_device(self):
        return Cpu("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def cudart(self):
        return None

    def is_ipc_supported(self):
        return False
