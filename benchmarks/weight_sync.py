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
import os
import sys

from launcher import launch, launched, measured_machine
from options import parse


def main() -> None:
    args = parse((__doc__ or "").split("\n")[0])
    if not launched():
        sys.exit(launch("weight_sync", world=args.tp * args.dp, timeout_s=args.timeout, environment=_environment(args)))
    from ranks import run_rank

    sys.exit(run_rank(args))


def _environment(args: argparse.Namespace) -> dict[str, str]:
    env = measured_machine(args.tp * args.dp)
    if args.expandable:
        allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        env["PYTORCH_CUDA_ALLOC_CONF"] = ",".join(filter(None, [allocator, "expandable_segments:True"]))
    if args.baseline:
        # sglang.Engine sets these in its own process, our rank 0; NCCL fails where the other ranks differ.
        env.update(NCCL_CUMEM_ENABLE="0", NCCL_NVLS_ENABLE="0")
    return env


# SGLang's processes import this file again: nothing but this may run, and the imports above are light.
if __name__ == "__main__":
    main()
