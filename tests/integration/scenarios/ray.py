"""Ranks on Ray that fail, without an engine."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch.distributed as dist


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
