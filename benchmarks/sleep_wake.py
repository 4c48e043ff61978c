"""How fast an engine gives its memory back and takes it again, how much it keeps, and whether cycles leave anything.

    python benchmarks/sleep_wake.py --model qwen2-7b --tp 1 --cycles 200

A cycle is `sleep()`, a pause, `resume_memory_occupation(["weights"])`, `update_weights(model)`, and the KV cache and
the CUDA graphs again; every few cycles greedy tokens are compared with those of the start. Starts its own ranks, one a
GPU; without one nothing can be released, and the engine only starts, takes weights and generates.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher import launch, launched
from options import positive

from spmd_engine.on_paper.model_shapes import SHAPES

ENVIRONMENT = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1"}  # else CUDA graphs keep their memory


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help=f"a directory, or one of {', '.join(SHAPES)}")
    add("--tp", type=positive, default=1, help="ranks of the engine, over which the trainer shards by FSDP2")
    add("--cycles", type=positive, default=20, help="measured cycles")
    add("--pause-s", type=float, default=0.3, metavar="SECONDS", help="how long the engine sleeps in each cycle")
    add("--check-every", type=positive, default=10, help="cycles between two comparisons of tokens")
    add("--server-args", type=json.loads, default={}, help="more arguments of the engine, as JSON")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="end the ranks after this time")
    parser.set_defaults(dp=1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not launched():
        sys.exit(launch("sleep_wake", world=args.tp, timeout_s=args.timeout, environment=ENVIRONMENT))
    from cycles import run_rank

    sys.exit(run_rank(args))


if __name__ == "__main__":
    main()
