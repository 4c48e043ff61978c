"""How long it takes to move a trainer's weights into SGLang, phase by phase, against what the machine can do.

    python benchmarks/weight_sync.py --model qwen2-7b --tp 2 --verify --baseline sglang-tensor,sglang-flattened

Starts its own ranks, one a GPU, or on the CPU where there is no GPU. Weights are random; SGLang starts with
`load_format="dummy"`.

The floor is what the copy would take at the rates measured here first: all bytes of a rank at the rate of a large copy
inside one device, and at the same time the bytes from other ranks at the rate of a large copy between two devices.
The baselines are SGLang's own ways, in the same run, from the same model: see `baselines.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from baselines import BASELINES
from launcher import launch, launched
from shapes import SHAPES
from trainers import DTYPES, TRAINERS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help=f"a directory, or one of {', '.join(SHAPES)}")
    add("--tp", type=int, default=1, help="ranks of a replica")
    add("--dp", type=int, default=1, help="replicas; the trainer shards over all tp x dp ranks")
    add("--trainer", choices=TRAINERS, default="fsdp2", help="plain: every rank holds everything")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the trainer's weights")
    add("--iters", type=_positive, default=12, help="measured updates; 1000 makes a soak test")
    add("--warmup", type=_positive, default=2, help="updates before them, the planning one included")
    add("--verify", action="store_true", help="one more update of new values, every element compared")
    add("--baseline", type=_baselines, default=(), metavar="NAME[,NAME]", help=f"also measure {', '.join(BASELINES)}")
    add("--baseline-iters", type=_positive, default=5, help="measured updates of each baseline, after two others")
    add("--bucket-mib", type=int, default=512, help="MiB that a baseline sends at once; 0: a request for every weight")
    add("--decode", type=_decode, nargs="?", const=(64, 128), metavar="SEQUENCESxTOKENS",
        help="decoding speed before and after the updates, 64x128 by default")  # fmt: skip
    add("--expandable", action="store_true", help="the trainer allocates in torch's expandable segments")
    add("--server-args", type=json.loads, default={}, help="more arguments of the engines, as JSON")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plot", type=Path, metavar="FILE", help="write a PNG there")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="end the ranks after this time")
    args = parser.parse_args()
    if args.decode and args.decode[0] * (args.decode[1] + 16) > 1 << 20:
        parser.error("--decode asks for more than a million tokens at once")
    return args


def _positive(text: str) -> int:
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


def _decode(text: str) -> tuple[int, int]:
    sequences, cross, tokens = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError("must look like 64x128")
    return _positive(sequences), _positive(tokens)


def main() -> None:
    args = parse()
    if launched():
        from ranks import run_rank

        sys.exit(run_rank(args))
    if torch.cuda.is_available() and torch.cuda.device_count() < args.tp * args.dp:
        sys.exit(f"{args.tp * args.dp} ranks need as many GPUs; {torch.cuda.device_count()} are here")
    try:
        status = launch(args.tp * args.dp, args)
    except (subprocess.TimeoutExpired, TimeoutError) as error:
        sys.exit(f"weight_sync: {error}")
    if status:
        print(f"weight_sync: a rank ended with status {status}", file=sys.stderr)
    sys.exit(status if status >= 0 else 128 - status)


# SGLang's processes import this file again.
if __name__ == "__main__":
    main()
