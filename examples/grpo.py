"""GRPO on two ranks: FSDP2 trains, SpmdEngine (TP 2) samples, and update_weights joins them after every step.

    torchrun --nproc_per_node 2 examples/grpo.py

Runs on CPU, or on GPUs if there are two. The policy is a small random Qwen2, the task is arithmetic on digits: after
"bos a b c =" say a+1, b+1, c+1 (mod 10) and eos. The reward is the fraction of right tokens, checked by code.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

from spmd_engine import SpmdEngine

# A vocabulary without a tokenizer: a digit d is the token DIGIT + d.
PAD, BOS, EOS, EQUALS, DIGIT, VOCAB = 0, 1, 2, 3, 4, 32
DIGITS = 3
PROMPT_LEN, ANSWER_LEN = DIGITS + 2, DIGITS + 1
PROMPTS, GROUP = 64, 8  # a step samples GROUP answers to each of PROMPTS prompts
LEARNING_RATE, CLIP, ENTROPY = 2e-3, 0.2, 0.1
PHASES = ("rollout", "train", "sync")
METRICS = ("reward", "difference", "moved", *PHASES)
# On the CPU the engine computes in float32 as the trainer does, so that log-probabilities differ by rounding only.
# SGLang's GPU kernels take 16-bit weights: update_weights casts on the way.
CPU_ARGS = {"device": "cpu", "dtype": "float32"}
GPU_ARGS = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_prefill_cuda_graph": True,
    "mem_fraction_static": 0.2,
}
EDGE = 5  # the verdict compares the first and the last EDGE steps


def make_prompts(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [PROMPTS, PROMPT_LEN] and the right answers [PROMPTS, ANSWER_LEN]; equal seeds give equal prompts."""
    digits = torch.randint(10, (PROMPTS, DIGITS), generator=generator)
    bos, equals, eos = (torch.full((PROMPTS, 1), token) for token in (BOS, EQUALS, EOS))
    return torch.cat([bos, digits + DIGIT, equals], 1), torch.cat([(digits + 1) % 10 + DIGIT, eos], 1)


def rollout(engine: SpmdEngine, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GROUP answers per prompt, all [PROMPTS * GROUP, ANSWER_LEN]: tokens, mask, the engine's log-probabilities."""
    outputs = engine.generate(
        input_ids=prompts.tolist(),
        sampling_params={"n": GROUP, "temperature": 1.0, "max_new_tokens": ANSWER_LEN},
        return_logprob=True,
    )
    tokens = [output["output_ids"] for output in outputs]
    logprobs = [[entry[0] for entry in output["meta_info"]["output_token_logprobs"]] for output in outputs]
    return padded(tokens, PAD), padded([[1.0] * len(row) for row in tokens], 0.0), padded(logprobs, 0.0)


def padded(rows: list[list], fill: float) -> torch.Tensor:
    return torch.tensor([row + [fill] * (ANSWER_LEN - len(row)) for row in rows])


def log_probabilities(model, prompts, answers) -> torch.Tensor:
    """The trainer's log-probabilities of all tokens at the answers' positions, [samples, ANSWER_LEN, VOCAB]."""
    logits = model(torch.cat([prompts, answers[:, :-1]], 1), use_cache=False).logits[:, PROMPT_LEN - 1 :]
    return logits.float().log_softmax(-1)


def train_step(model, optimizer, prompts, answers, mask, engine_logprobs, advantages) -> tuple[float, float]:
    """One GRPO step on this rank's samples.

    Returns two means over the sampled tokens: |engine's - trainer's log-probability|, and how far this step moves the
    trainer's. An engine that missed the last update would be off by as much as that step moved.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum() / mask.sum()

    logprobs = log_probabilities(model, prompts, answers)
    before = logprobs.gather(-1, answers[..., None])[..., 0]
    ratio = (before - engine_logprobs).exp()  # 1 as long as the engine holds the trainer's weights
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    entropy = -(logprobs.exp() * logprobs).sum(-1)  # its bonus keeps the policy exploring until each digit is found
    optimizer.zero_grad()
    mean(-gain - ENTROPY * entropy).backward()  # FSDP averages the gradients of the ranks
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        after = log_probabilities(model, prompts, answers).gather(-1, answers[..., None])[..., 0]
    return mean((before - engine_logprobs).abs()).item(), mean((after - before).abs()).item()


def save_random_model(path: str, seed: int) -> None:
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
    tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = Qwen2Config(**shape, **tokens, initializer_range=0.05, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(path)


def plot(history: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (reward, logprob, seconds) = plt.subplots(3, sharex=True, figsize=(8, 8), layout="constrained")
    steps = range(1, len(history["reward"]) + 1)
    reward.plot(steps, history["reward"], color="tab:green")
    reward.set(ylabel="mean reward", ylim=(0, 1.03), title="GRPO on two ranks: FSDP2 trains, SpmdEngine samples")
    logprob.semilogy(steps, history["moved"], color="tab:gray", label="trainer after vs. before the step")
    logprob.semilogy(steps, history["difference"], color="tab:red", label="engine vs. trainer, same weights")
    logprob.set(ylabel="mean |Δ log-probability|", ylim=(1e-9, 1e1))
    for phase in PHASES:
        seconds.semilogy(steps, history[phase], label=phase)
    seconds.set(ylabel="seconds", xlabel="step")
    for axis in (reward, logprob, seconds):
        axis.grid(alpha=0.3)
    for axis in (logprob, seconds):
        axis.legend(ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, borderaxespad=0.0)
    figure.savefig(path, dpi=150)


def train(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, float]]:
    """Take args.steps steps on this rank; after each one what it came to, the same on all ranks but for the seconds."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with contextlib.ExitStack() as stack:
        checkpoint = [args.model]
        if args.model is None and rank == 0:
            checkpoint = [stack.enter_context(tempfile.TemporaryDirectory())]
            save_random_model(checkpoint[0], args.seed)
        dist.broadcast_object_list(checkpoint, src=0)

        # Master weights in float32, each sharded over all ranks.
        model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32).to(device)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

        # The engine reads the initial checkpoint; what it learns later comes through update_weights alone.
        tp = args.tp or world
        mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]
        replica, replicas = rank // tp, world // tp
        server_args = {"random_seed": args.seed + replica, **(GPU_ARGS if device.type == "cuda" else CPU_ARGS)}
        engine = stack.enter_context(SpmdEngine(checkpoint[0], device_mesh_cpu=mesh, **server_args))

        generator = torch.Generator().manual_seed(args.seed)
        size = PROMPTS * GROUP // world
        mine = slice(engine.tp_rank * size, (engine.tp_rank + 1) * size)
        for step in range(args.steps):
            times = [time.perf_counter()]
            # generate is collective over the ranks of a replica: they have the same prompts, and get the same answers.
            prompts, targets = (part.chunk(replicas)[replica] for part in make_prompts(generator))
            answers, mask, engine_logprobs = rollout(engine, prompts)
            times.append(time.perf_counter())

            prompts, targets = prompts.repeat_interleave(GROUP, 0), targets.repeat_interleave(GROUP, 0)
            rewards = (answers == targets).float().mean(1).view(-1, GROUP)
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
            batch = (prompts, answers, mask, engine_logprobs, advantages.view(-1, 1))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2.1 - 2 * step / args.steps)
            difference, moved = train_step(model, optimizer, *(part[mine].to(device) for part in batch))
            times.append(time.perf_counter())

            engine.update_weights(model)
            times.append(time.perf_counter())

            means = torch.tensor([rewards.mean().item(), difference, moved])
            dist.all_reduce(means)
            seconds = [end - start for start, end in itertools.pairwise(times)]
            yield dict(zip(METRICS, [*(means / world).tolist(), *seconds], strict=True))


def describe(step: int, metrics: dict[str, float]) -> str:
    phases = "  ".join(f"{phase} {metrics[phase]:.3f} s" for phase in PHASES)
    return f"step {step:3d}  reward {metrics['reward']:.3f}  |Δ logprob| {metrics['difference']:.1e}  {phases}"


def verdict(history: dict[str, list[float]]) -> tuple[bool, str]:
    """Whether the reward rose, and a line that says so."""
    first, last = (statistics.mean(part) for part in (history["reward"][:EDGE], history["reward"][-EDGE:]))
    rose = last > first + 0.3
    says = f"reward rose from {first:.2f} (first {EDGE} steps) to {last:.2f} (last {EDGE} steps)"
    return rose, f"{says}: {'yes' if rose else 'no'}"


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory for grpo.png")
    parser.add_argument("--model", help="checkpoint to start from; default: a small random Qwen2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", type=int, help="ranks of one replica of the engine; default: all")
    return parser


def main() -> int:
    args = arguments(
        argparse.ArgumentParser(description="GRPO: torchrun --nproc_per_node 2 examples/grpo.py")
    ).parse_args()

    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    hf_logging.disable_progress_bar()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    leader = dist.get_rank() == 0
    history: dict[str, list[float]] = {key: [] for key in METRICS}
    with tqdm(total=args.steps, disable=not leader, unit="step") as bar:
        for step, metrics in enumerate(train(args, device), 1):
            for key, value in metrics.items():
                history[key].append(value)
            if leader:
                tqdm.write(describe(step, metrics))
                bar.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)
            bar.update()
    dist.destroy_process_group()

    rose, line = verdict(history)
    if leader:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(history, args.out / "grpo.png")
        print(f"plot: {args.out / 'grpo.png'}")
        print(line)
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
