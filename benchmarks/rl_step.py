"""The loop of an RL step as verl runs it, on SpmdEngine and on `sglang.Engine`, with the time of each phase.

    python benchmarks/rl_step.py --model qwen2-7b --tp 2 --dp 2

A step: the engine sleeps (weights, KV cache, CUDA graphs); the trainer, FSDP2 over all ranks, makes an optimizer step
on random tokens and gives its cached memory back; the engine wakes its weights, takes the trainer's, wakes the rest,
and generates. `sglang.Engine` lives in the process of the first rank of each replica; the other ranks wait in gloo
barriers and get the tokens by a broadcast. Its weights come by the flattened bucket: see `baselines.py`.

One loop runs after the other in one run, both from the same weights, on the same training batches and prompts. They do
not alternate: an engine that sleeps keeps about a GiB on each GPU, and the schedulers of `sglang.Engine` use a core
each while they wait, which would count against the other loop.

A phase begins when all ranks are ready, and takes what the slowest of them takes. SGLang answers an update when it has
queued its copies: what is left of them then counts in the next phase.

One more step, of which no time is taken, samples the memory of each phase: on a GPU all that is in use on the device,
on the CPU the resident memory of all processes of the run.

Starts its own ranks, one a GPU, or on the CPU where there is no GPU. There `sglang.Engine` has no memory saver, and its
loop goes without sleep. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher import launch, launched
from options import positive, sequences_x_tokens

from spmd_engine.on_paper.model_shapes import SHAPES

SHAPE = "SEQUENCESxTOKENS"
ENVIRONMENT = {
    "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1",  # else CUDA graphs keep their memory
    # sglang.Engine sets these in its own process, a rank of the trainer; NCCL fails where the other ranks differ.
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    # SpmdEngine sets it for its own processes: NCCL must not register graphs whose memory is released.
    "NCCL_GRAPH_REGISTER": "0",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help=f"a directory, or one of {', '.join(SHAPES)}")
    add("--tp", type=positive, default=1, help="ranks of a replica")
    add("--dp", type=positive, default=1, help="replicas; the trainer shards over all tp x dp ranks")
    add("--engines", choices=("both", "spmd", "sglang"), default="both", help="whose loops to run")
    add("--steps", type=positive, default=20, help="measured steps, after two that are not")
    add(
        "--rollout", type=sequences_x_tokens, default="64x128", metavar=SHAPE, help="of each replica; 64x128 by default"
    )
    add("--prompt-tokens", type=positive, default=64, help="tokens of each prompt")
    add(
        "--train-tokens",
        type=sequences_x_tokens,
        default="8x512",
        metavar=SHAPE,
        help="the batch of each rank; 8x512 by default",
    )
    add("--keep-mapped", action="store_true", help="SpmdEngine(..., keep_mapped=True): the weights stay on the GPU")
    add("--server-args", type=json.loads, default={}, help="more arguments of both engines, as JSON")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="end the ranks after this time")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not launched():
        sys.exit(launch("rl_step", world=args.tp * args.dp, timeout_s=args.timeout, environment=ENVIRONMENT))
    from steps import run_rank

    sys.exit(run_rank(args))


# SGLang's processes import this file again: nothing but this may run, and the imports above are light.
if __name__ == "__main__":
    main()
