"""One trainer rank of a test job: `worker.py MODULE.FUNCTION ARGUMENTS DIRECTORY`, with torchrun's environment."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
PATIENCE_S = 5.0  # a peer may have been killed
GARBAGE = 50_000  # objects, not 700: importing torch and transformers takes half as long again otherwise


@dataclass
class Context:
    """A rank of the job, with the process group initialised."""

    rank: int
    world: int
    directory: Path

    def mesh(self, tp: int, *, strided: bool = False) -> Any:
        """The TP mesh of this rank's replica: neighbours, or every so many ranks (0 and 2, 1 and 3)."""
        if strided:
            return init_device_mesh("cpu", (tp, self.world // tp), mesh_dim_names=("tp", "dp"))["tp"]
        return init_device_mesh("cpu", (self.world // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]

    def engine(self, path: str, tp: int, *, strided: bool = False, **kwargs: Any) -> Any:
        from spmd_engine import SpmdEngine

        mesh = self.mesh(tp, strided=strided)
        return SpmdEngine(path, device_mesh_cpu=mesh, **{"timeout_s": 200.0, "random_seed": 7, **kwargs})


def main() -> None:
    faulthandler.enable()
    gc.set_threshold(GARBAGE)
    scenario, arguments, directory = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    module, function = scenario.split(".")
    run = getattr(importlib.import_module(f"integration.scenarios.{module}"), function)
    dist.init_process_group("gloo")
    context = Context(dist.get_rank(), dist.get_world_size(), directory)
    value = run(context, **arguments)
    (directory / f"rank{context.rank}.json").write_text(json.dumps(value))
    sys.stdout.flush()
    wait_for_others(context)
    os._exit(0)  # a peer that a test has killed must not hold up the exit


def wait_for_others(context: Context) -> None:
    """Rank 0 serves the store that all ranks use till their end."""
    with contextlib.suppress(dist.DistError):
        store = dist.distributed_c10d._get_default_store()
        over, deadline = store.add("worker/over", 1), time.monotonic() + PATIENCE_S
        while context.rank == 0 and over < context.world and time.monotonic() < deadline:
            time.sleep(0.02)
            over = store.add("worker/over", 0)


if __name__ == "__main__":
    main()
