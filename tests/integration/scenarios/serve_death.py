"""Requests of async_generate when a scheduler process dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist

from integration.scenarios.common import GREEDY, PROMPTS
from integration.scenarios.serve import LONG, collect
from spmd_engine import errors


def death(context: Any, path: str) -> dict[str, Any]:
    """All requests end with the cause."""
    engine = context.engine(path, context.world)
    long = {"input_ids": PROMPTS[0], "sampling_params": {**GREEDY, "max_new_tokens": LONG}}

    async def program() -> None:
        tasks = [asyncio.ensure_future(engine.async_generate(**long)) for _ in range(3)]
        stream = await engine.async_generate(**long, stream=True)
        await anext(stream)
        dist.barrier()
        began = time.monotonic()
        for error in await asyncio.gather(*tasks, collect(stream), return_exceptions=True):
            assert isinstance(error, errors.SchedulerDiedError) and error.rank == 1
        assert time.monotonic() - began < 10.0
        with pytest.raises(errors.SchedulerDiedError):
            await engine.async_generate(**long)

    if engine.is_leader:
        asyncio.run(program())
    else:
        dist.barrier()
        os.kill(engine.scheduler_pid, signal.SIGKILL)
    engine.shutdown()
    return {}
