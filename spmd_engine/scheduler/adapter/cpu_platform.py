"""SGLang platform plug-in for a machine without an accelerator.

Registered under the entry-point group `sglang.srt.platforms`, which every SGLang program of the environment reads:
`activate` therefore answers None unless a scheduler process of ours asks by name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

NAME = "spmd_engine"


def activate() -> str | None:
    """Entry point: the class for `SGLANG_PLATFORM=spmd_engine`, None for everyone else."""
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    return "spmd_engine.scheduler.adapter.cpu_platform.PlainCpuPlatform"


if not TYPE_CHECKING and os.environ.get("SGLANG_PLATFORM") == NAME:
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
        """Torch-native kernels on any CPU; SGLang's own CPU platform wants kernels that no wheel has."""

        _enum = PlatformEnum.OOT

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_mla_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

            class PlainMlaPool(MLATokenToKVPool):
                """SGLang passes a plug-in platform's pool one argument more than its own pool takes."""

                def __init__(self, *args: object, index_head_dim: int | None = None, **kwargs: object) -> None:
                    super().__init__(*args, **kwargs)

            return PlainMlaPool

        def get_paged_allocator_cls(self) -> type:
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator
