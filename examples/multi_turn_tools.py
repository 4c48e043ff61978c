"""Conversations with a tool, many at a time: async_generate on the leader, FSDP2 training on all ranks.

    torchrun --nproc_per_node 2 examples/multi_turn_tools.py

Every conversation is a small state machine (pending → running → tool calling → running → … → done) with a calculator
as its tool. All of them run beside one another and share the engine. What they leave is what a trainer wants: token
ids, a mask of those that the policy chose, and the engine's log-probabilities.

The policy is a small random Qwen2 that has learnt nothing, so grammars keep it to the format: a call of the tool, or an
answer. A call is `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes models write it, which SGLang's own
parser of that name finds in what the policy said. Grammars
take probability away from most tokens; the log-probabilities to train with are asked for afterwards, without one.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import enum
import json
import operator
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

from spmd_engine import SpmdEngine

CONVERSATIONS, MAX_TURNS, ROUNDS = 24, 5, 3
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "The value of an arithmetic expression of integers.",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXPRESSION = r"[1-9][0-9]?( [+*-] [1-9][0-9]?){1,2}"
ANSWER = r"answer: -?[0-9]{1,4}"
CALL = r'<tool_call>\{"name": "calculator", "arguments": \{"expression": "' + EXPRESSION + r'"\}\}</tool_call>'
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int:
    """Evaluate sums, differences and products of integers, and nothing else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError(f"{ast.unparse(node)!r} is not arithmetic of integers")

    if len(expression) > 100:
        raise ValueError("the expression is too long")
    return value(ast.parse(expression, mode="eval").body)


class State(enum.Enum):
    PENDING = "pending"
    RUNNING = "running"
    TOOL_CALLING = "tool calling"
    DONE = "done"


@dataclass
class Conversation:
    """One conversation: what was said, and the same as tokens.

    Attributes:
        tokens, mask: and for each token whether the policy chose it.
        logprobs: the engine's log-probability of each token but the first, once the conversation is done.
    """

    messages: list[dict[str, str]]
    state: State = State.PENDING
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    calls: int = 0
    cached_tokens: int = 0
    versions: set[int] = field(default_factory=set)

    def hear(self, tokens: list[int]) -> None:
        """Tokens that were not the policy's choice."""
        self.tokens += tokens
        self.mask += [0] * len(tokens)

    def say(self, output: dict) -> None:
        """What the policy generated."""
        meta = output["meta_info"]
        self.messages.append({"role": "assistant", "content": output["text"]})
        self.tokens += output["output_ids"]
        self.mask += [1] * len(output["output_ids"])
        self.cached_tokens += meta["cached_tokens"]
        self.versions |= set(meta["token_weight_versions"])


async def converse(engine: SpmdEngine, conversation: Conversation, turns: int) -> None:
    """Run a conversation until it is done; in its last turn the policy has to answer."""
    tokenizer = engine.tokenizer

    def render() -> str:
        return tokenizer.apply_chat_template(
            conversation.messages, tools=TOOLS, tokenize=False, add_generation_prompt=True
        )

    seen = ""
    while conversation.state is not State.DONE:
        conversation.state = State.RUNNING
        text = render()
        conversation.hear(tokenizer.encode(text.removeprefix(seen)))  # what has been generated stays as it was
        output = await engine.async_generate(
            input_ids=conversation.tokens,
            sampling_params={
                "temperature": 1.0,
                "max_new_tokens": 160,
                "regex": ANSWER if conversation.calls == turns - 1 else f"({CALL}|{ANSWER})",
            },
        )
        conversation.say(output)
        seen = text + output["text"]
        _, calls = await engine.parse_function_calls(output["text"], TOOLS, parser="hermes")
        if not calls:
            conversation.state = State.DONE
            continue
        conversation.state = State.TOOL_CALLING
        await asyncio.sleep(random.uniform(0.0, 0.05))  # real tools take their time, and the others go on meanwhile
        conversation.messages.append({"role": "tool", "content": str(calculate(**json.loads(calls[0].arguments)))})
        conversation.calls += 1
    scored = await engine.async_generate(
        input_ids=conversation.tokens, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
    )
    conversation.logprobs = [logprob for logprob, _, _ in scored["meta_info"]["input_token_logprobs"][1:]]


async def rollout(engine: SpmdEngine, seed: int) -> list[Conversation]:
    """Conversations of different lengths, all at once."""
    draw = random.Random(seed)
    conversations = []
    for _ in range(CONVERSATIONS):
        question = f"What is {draw.randint(1, 99)} {draw.choice('+-*')} {draw.randint(1, 99)}?"
        conversations.append(Conversation([{"role": "user", "content": question}]))
    await asyncio.gather(*(converse(engine, one, draw.randint(1, MAX_TURNS)) for one in conversations))
    return conversations


def train_step(model, optimizer, conversations: list[Conversation]) -> tuple[float, int]:
    """Make what the policy said likelier. Returns mean |engine's - trainer's log-probability|, and of how many."""
    total, count = torch.zeros(()), 0
    optimizer.zero_grad()
    for one in conversations:
        tokens, mask = torch.tensor([one.tokens]), torch.tensor(one.mask, dtype=torch.bool)
        logits = model(tokens[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        logprobs = logits.gather(-1, tokens[:, 1:, None])[0, :, 0][mask[1:]]
        (-logprobs.mean() / len(conversations)).backward()
        total += (logprobs.detach() - torch.tensor(one.logprobs)[mask[1:]]).abs().sum()
        count += int(mask.sum())
    optimizer.step()
    return float(total / count), count


def save_random_model(path: Path, seed: int) -> None:
    """A byte-level tokenizer with a chat template, and a model for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<eos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 2048}
    config = Qwen2Config(**shape, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        place = [directory]
        if rank == 0:
            save_random_model(Path(directory), args.seed)
        dist.broadcast_object_list(place, src=0)
        model = fully_shard(AutoModelForCausalLM.from_pretrained(place[0], dtype=torch.float32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        mesh = init_device_mesh("cpu", (world,))
        arguments = {"device": "cpu", "dtype": "float32", "grammar_backend": "llguidance", "random_seed": args.seed}
        with SpmdEngine(place[0], device_mesh_cpu=mesh, **arguments) as engine:
            for number in range(args.rounds):
                made: list[list[Conversation] | None] = [None]
                if engine.is_leader:
                    made = [asyncio.run(rollout(engine, args.seed + number))]
                dist.broadcast_object_list(made, src=0)  # the other ranks wait here, without a GPU or a core
                conversations = made[0] or []
                difference, count = train_step(model, optimizer, conversations[rank::world])
                engine.update_weights(model)
                worst = max(worst, difference)
                calls = sum(one.calls for one in conversations)
                cached = sum(one.cached_tokens for one in conversations)
                assert all(one.state is State.DONE for one in conversations)
                assert all(one.versions == {number} for one in conversations)
                if rank == 0:
                    example = max(conversations, key=lambda one: one.calls).messages
                    print("\n".join(f"  {m['role']}: {m['content']}" for m in example))
                    print(
                        f"round {number + 1}: {len(conversations)} conversations, {calls} tool calls, {count} tokens "
                        f"to train on here, {cached} prompt tokens from the cache, |Δ logprob| {difference:.1e}",
                        flush=True,
                    )
                assert cached > 0 and calls > 0
    dist.destroy_process_group()
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
