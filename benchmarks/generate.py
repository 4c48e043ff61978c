"""How fast SpmdEngine generates, against `sglang.Engine` at the same TP on the same weights, in turns in one run.

    python benchmarks/generate.py --model qwen2-7b --tp 2 --async --waiting-ranks

Starts its own ranks, one a GPU, or on the CPU where there is no GPU; `sglang.Engine` has a process of its own. Both
engines get the same server arguments and the same prompts, new ones in every round, and decode greedily. Weights of a
built-in shape are SGLang's dummy ones, the same in both.

A ratio is the median of the rounds' own ratios: both engines of a round ran one right after the other. Before that,
some requests run one at a time, where both engines compute the very same: all of their tokens must be equal. In
batches, rounding depends on which requests SGLang happens to prefill together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher import launch, launched
from options import positive, sequences_x_tokens

from spmd_engine.on_paper.model_shapes import SHAPES


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help=f"a directory, or one of {', '.join(SHAPES)}")
    add("--tp", type=positive, default=1, help="ranks of the engine")
    add(
        "--cases",
        type=_cases,
        default="64x256,512x512",
        metavar="REQUESTSxTOKENS,...",
        help="64x256,512x512 by default",
    )
    add("--prompt-tokens", type=positive, default=32, help="tokens of each prompt")
    add(
        "--async",
        dest="beside",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="also, or only, with a request each through async_generate",
    )
    add(
        "--waiting-ranks", action="store_true", help="also how the ways in which other trainer ranks wait slow decoding"
    )
    add("--rounds", type=positive, default=5, help="measured rounds of each engine")
    add("--warmup", type=positive, default=1, help="rounds before them")
    add("--starts", type=positive, default=1, help="how often to start each engine, in turns")
    add("--idle-s", type=float, default=5.0, metavar="SECONDS", help="how long to watch the idle processes")
    add("--server-args", type=json.loads, default={}, help="more arguments of both engines, as JSON")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="end the ranks after this time")
    parser.set_defaults(dp=1)
    args = parser.parse_args()
    if args.waiting_ranks and args.tp == 1:
        parser.error("--waiting-ranks needs --tp 2 or more: with one rank, none waits")
    return args


def _cases(text: str) -> list[tuple[int, int]]:
    return [sequences_x_tokens(case) for case in text.split(",")]


def main() -> None:
    args = parse()
    if not launched():
        sys.exit(launch("generate", world=args.tp, timeout_s=args.timeout, environment={}))
    from throughput import run_rank

    sys.exit(run_rank(args))


if __name__ == "__main__":
    main()
