"""The driver of a Ray job without an engine: what calls of a `RankGroup` return and raise, in one group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

from spmd_engine.errors import CollectiveTimeoutError, ConfigError, EngineClosedError, RankFailedError
from spmd_engine.integrations.ray import RankGroup, place_ranks


class Worker:
    """One rank."""

    def world(self) -> dict[str, Any]:
        """Where this rank is, and what all of them sum up to."""
        total = torch.tensor([dist.get_rank() + 1])
        dist.all_reduce(total)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        environment = [os.environ[name] for name in names]
        return {"total": int(total), "node": ray.util.get_node_ip_address(), "environment": environment}

    def refuse(self) -> None:
        raise ValueError(f"rank {dist.get_rank()} has bad input")

    def shutdown(self) -> None:
        if dist.get_rank() == 3:
            raise RuntimeError("the last metrics could not be written")

    def hang(self, rank: int) -> None:
        if dist.get_rank() == rank:
            threading.Event().wait()


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C in the middle. What starts this in the background may have it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main() -> None:
    ray.init(log_to_driver=False)
    with pytest.raises(ConfigError, match=r"no room in 2 s for \{'CPU': 1\} on each of 3 nodes"):
        place_ranks(nnodes=3, ranks_per_node=1, timeout_s=2.0)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.5):
        place_ranks(nnodes=3, ranks_per_node=1, timeout_s=60.0)
    with pytest.raises(ConfigError, match="must be at least 1, got 2 and 0"):
        place_ranks(nnodes=2, ranks_per_node=0)
    ranks = RankGroup(Worker, placement=place_ranks(nnodes=2, ranks_per_node=2), timeout_s=120.0)
    values = ranks.call("world")

    # All have answered: they stay.
    with pytest.raises(RankFailedError, match=r"rank \d has bad input") as failed:
        ranks.call("refuse")
    assert sorted(failed.value.errors) == [0, 1, 2, 3] and isinstance(failed.value.__cause__, ValueError)
    assert ranks.call("world") == values

    # They are ended, and it is said that one could not do what it wanted to do before.
    with pytest.raises(RankFailedError, match="the last metrics could not be written"):
        ranks.shutdown()
    ranks = RankGroup(Worker, placement=place_ranks(nnodes=2, ranks_per_node=2), timeout_s=120.0)

    # One has not: it may wait for ever.
    with pytest.raises(CollectiveTimeoutError, match=r"hang: no answer in 5 s from rank .*\b1 \("):
        ranks.call("hang", 1, timeout_s=5.0)
    with pytest.raises(EngineClosedError, match="no answer in 5 s from rank"):
        ranks.call("world")
    ranks.shutdown()

    # The room is free again.
    deadline = time.monotonic() + 20.0
    while ray.available_resources().get("CPU") != 4.0:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)
    Path(sys.argv[1], "driver.json").write_text(json.dumps({"values": values}))


if __name__ == "__main__":
    main()
