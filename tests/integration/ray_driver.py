"""The driver of a Ray job: `ray_driver.py SCENARIO ARGUMENTS DIRECTORY`, with scenarios as `worker.py` has them."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray

from integration.worker import Context
from spmd_engine.errors import SpmdEngineError
from spmd_engine.integrations.ray import RankGroup, place_ranks

NODES, RANKS_PER_NODE = 2, 2


class ScenarioRank:
    """One rank of a scenario."""

    def __init__(self, directory: str) -> None:
        import torch.distributed as dist

        self.context = Context(dist.get_rank(), dist.get_world_size(), Path(directory))

    def run(self, scenario: str, arguments: dict[str, Any]) -> Any:
        module, function = scenario.split(".")
        return getattr(importlib.import_module(f"integration.scenarios.{module}"), function)(self.context, **arguments)


def main() -> None:
    scenario, arguments, directory = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    ray.init(log_to_driver=False)
    placement = place_ranks(nnodes=NODES, ranks_per_node=RANKS_PER_NODE, timeout_s=60.0)
    answer: dict[str, Any]
    try:
        with RankGroup(ScenarioRank, directory, placement=placement, timeout_s=120.0) as ranks:
            answer = {"values": ranks.call("run", scenario, arguments, timeout_s=300.0)}
    except SpmdEngineError as error:
        answer = {"kind": type(error).__name__, "rank": getattr(error, "rank", None), "message": str(error)}
        answer["cause"] = type(error.__cause__).__name__
    Path(directory, "driver.json").write_text(json.dumps({**answer, "at": time.time()}))


if __name__ == "__main__":
    main()
