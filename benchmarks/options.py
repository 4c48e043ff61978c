"""The benchmark's command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from spmd_engine.on_paper.model_shapes import SHAPES

TRAINERS = ("fsdp2", "fsdp1", "plain")
OFFLOADS = ("none", "pinned", "pageable")
DTYPES = ("bfloat16", "float16", "float32")
BASELINES = ("sglang-tensor", "sglang-flattened")


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", default="tiny", help=f"a directory, or one of {', '.join(SHAPES)}")
    add("--tp", type=positive, default=1, help="ranks of a replica")
    add("--dp", type=positive, default=1, help="replicas; the trainer shards over all tp x dp ranks")
    add("--trainer", choices=TRAINERS, default="fsdp2", help="plain: every rank holds everything")
    add("--match-tp", action="store_true", help="fsdp2 shards o_proj and down_proj as the engine does, by Shard(1)")
    add("--offload", choices=OFFLOADS, default="none", help="the trainer's weights lie in CPU memory")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the trainer's weights")
    add("--iters", type=positive, default=12, help="measured updates; 1000 makes a soak test")
    add("--warmup", type=positive, default=2, help="updates before them, the planning one included")
    add("--pause-s", type=float, default=0.0, metavar="SECONDS", help="between the engine's start and the first update")
    add("--verify", action="store_true", help="one more update of new values, every element compared")
    add("--baseline", type=_baselines, default=(), metavar="NAME[,NAME]", help=f"also measure {', '.join(BASELINES)}")
    add("--baseline-iters", type=positive, default=5, help="measured updates of each baseline, after others")
    add("--bucket-mib", type=int, default=512, help="MiB that a baseline sends at once; 0: a request for every weight")
    add(
        "--decode",
        type=sequences_x_tokens,
        nargs="?",
        const=(64, 128),
        metavar="SEQUENCESxTOKENS",
        help="decoding speed before and after the updates, 64x128 by default",
    )
    add("--expandable", action="store_true", help="the trainer allocates in torch's expandable segments")
    add("--server-args", type=json.loads, default={}, help="more arguments of the engines, as JSON")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plot", type=Path, metavar="FILE", help="write a PNG there")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="end the ranks after this time")
    args = parser.parse_args()
    if args.match_tp and args.trainer != "fsdp2":
        parser.error("--match-tp needs --trainer fsdp2")
    if args.offload != "none" and args.trainer == "fsdp1":
        parser.error("--offload needs --trainer fsdp2 or plain")
    if args.offload != "none" and args.baseline:
        parser.error("--offload has no baselines: SGLang's own ways take weights from the GPU")
    return args


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _baselines(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in BASELINES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(BASELINES)}")
    return names


def sequences_x_tokens(text: str) -> tuple[int, int]:
    """64x128 as (64, 128), for argparse."""
    sequences, cross, tokens = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError("must look like 64x128")
    return positive(sequences), positive(tokens)
