"""Ranks on Ray that fail, without an engine."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist


def world(context: Any) -> dict[str, Any]:
    """Where this rank is, and what all of them sum up to."""
    import ray

    total = torch.tensor([context.rank + 1])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {
        "total": int(total),
        "node": ray.util.get_node_ip_address(),
        "environment": [os.environ[name] for name in names],
    }


def fail(context: Any, rank: int, how: str) -> None:
    """One rank fails while the others wait for it in a collective."""
    if context.rank != rank:
        dist.barrier()
        return
    time.sleep(0.5)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "unpicklable":
        raise type("Odd", (Exception,), {"__reduce__": lambda self: (_refuse, ())})("cannot travel")
    raise ZeroDivisionError(f"reward of rank {rank}")


def _refuse() -> None:
    raise TypeError("this exception cannot be made again")
