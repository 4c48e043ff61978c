"""Fails in several ways: for the tests of what runs the scenarios."""

from __future__ import annotations

import os
import signal

import torch.distributed as dist
from gpu.scenarios.common import Trainer


def passes(trainer: Trainer) -> None:
    print(f"rank {dist.get_rank()} was here")


def raises(trainer: Trainer) -> None:
    raise ValueError("a scenario that fails")


def dies_on_one_rank(trainer: Trainer) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
