"""The loop of grpo.py on a Ray cluster: the driver takes the steps, each rank is an actor with one GPU, or on the CPU.

    ray start --head                               # on the first node
    ray start --address FIRST_NODE:6379            # on every other one
    python examples/grpo_ray.py --nodes 2 --ranks-per-node 1

Without a cluster it starts Ray on this machine, which is one node. The ranks of all nodes train one model; with
`--tp` equal to the ranks of a node each node has a replica of the engine, by default all ranks are one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import grpo
import ray
import torch
from transformers.utils import logging as hf_logging

from spmd_engine import RankFailedError
from spmd_engine.integrations.ray import RankGroup, place_ranks


class Trainer:
    """One rank. `torch.distributed` is there when it is made; it knows nothing of Ray."""

    def __init__(self, args: argparse.Namespace, scratch: str) -> None:
        hf_logging.disable_progress_bar()
        # Every node makes the same model for itself: nodes need not share a file system.
        self._scratch = Path(scratch)
        if args.model is None:
            args.model = str(self._scratch)
            if os.environ["LOCAL_RANK"] == "0":
                grpo.save_random_model(args.model, args.seed)
            torch.distributed.barrier()
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._steps = grpo.train(args, device)

    def step(self) -> dict[str, float]:
        return next(self._steps)

    def shutdown(self) -> None:
        self._steps.close()  # leaves its `with`: the engine shuts down
        shutil.rmtree(self._scratch, ignore_errors=True)


def main() -> int:
    parser = grpo.arguments(argparse.ArgumentParser(description="GRPO on a Ray cluster"))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    args = parser.parse_args()

    ray.init(log_to_driver=False)  # RAY_ADDRESS or the cluster of this node, if there is one
    placement = place_ranks(nnodes=args.nodes, ranks_per_node=args.ranks_per_node)
    scratch = os.path.join(tempfile.gettempdir(), f"grpo-ray-{ray.get_runtime_context().get_job_id()}-{os.getpid()}")
    history: dict[str, list[float]] = {key: [] for key in grpo.METRICS}
    try:
        with RankGroup(Trainer, args, scratch, placement=placement) as ranks:
            for step in range(1, args.steps + 1):
                metrics = ranks.call("step")[0]
                for key, value in metrics.items():
                    history[key].append(value)
                print(grpo.describe(step, metrics), flush=True)
    except RankFailedError as error:
        print(f"grpo_ray: {error}", file=sys.stderr)
        return 1

    rose, line = grpo.verdict(history)
    args.out.mkdir(parents=True, exist_ok=True)
    grpo.plot(history, args.out / "grpo.png")
    print(f"plot: {args.out / 'grpo.png'}\n{line}")
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
