"""verl 0.5 as it comes from PyPI, on a Ray cluster of two nodes: GRPO through its own workers, SGLang by SpmdEngine.

Run by `make test-verl VERL=0.5.0`, in an environment of its own. `VERL=0.4.1` works, too.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import documentation
import models
import numpy as np
import pytest
import torch

IS_0_5 = cluster.need_verl("0.4", "0.5") == "0.5"

PROMPTS, GROUP, PROMPT_LEN, RESPONSE_LEN, STEPS = 16, 4, 8, 8, 5
CONVERSATIONS = 16
# What a user's command line says. Nothing of it is about this package but the recipe, which names `external_lib`.
COMMAND = [
    *documentation.recipe("verl", "")[0].splitlines(),
    "data.max_prompt_length=8",
    "data.max_response_length=8",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.optim.lr=5e-2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
    "actor_rollout_ref.rollout.free_cache_engine=True",
    "actor_rollout_ref.rollout.multi_stage_wake_up=True",
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
]
# For transformers 5, of which verl cannot tell the layers by itself; and for a CPU: no flash attention, and a KV cache
# that is no share of the machine's memory.
ON_CPU = [
    "+actor_rollout_ref.actor.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[Qwen2DecoderLayer]",
    "+actor_rollout_ref.model.override_config._attn_implementation=sdpa",
    "+actor_rollout_ref.rollout.engine_kwargs.sglang.max_total_tokens=4096",
    "+actor_rollout_ref.rollout.engine_kwargs.sglang.random_seed=1",
    # Over verl's own bfloat16, which its check of log-probabilities would notice.
    "+actor_rollout_ref.rollout.engine_kwargs.sglang.dtype=float32",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    models.save_model("qwen2", directory, seed=1, max_position_embeddings=1024)
    models.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def ray_nodes():
    with cluster.two_nodes(4):
        yield


@contextlib.contextmanager
def workers_of(model: Path, *more: str, **rollout: Any) -> Iterator[Any]:
    """verl's worker group of two ranks, one on each node, with a configuration made as its trainer makes it."""
    import ray
    from hydra import compose, initialize_config_module
    from omegaconf import open_dict
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl_legacy_worker import Worker

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*COMMAND, *ON_CPU, f"actor_rollout_ref.model.path={model}", *more])
    with open_dict(config):
        config.actor_rollout_ref.rollout.update(rollout)
    pool = RayResourcePool(process_on_nodes=[1, 1], use_gpu=False, max_colocate_count=1)
    cls = RayClassWithInitArgs(ray.remote(Worker), config=config.actor_rollout_ref, role="actor_rollout")
    workers = RayWorkerGroup(pool, cls, ray_wait_register_center_timeout=cluster.PATIENCE_S)
    try:
        workers.init_model()
        yield workers
    finally:
        for worker in workers.workers:
            ray.kill(worker)
        for group in pool.pgs:
            ray.util.remove_placement_group(group)


def prompts_of(seed: int) -> Any:
    """PROMPTS × GROUP prompts of different lengths, padded on the left, as verl's data set makes them."""
    from verl import DataProto
    from verl.utils.model import compute_position_id_with_mask

    rng = np.random.default_rng(seed)
    ids = torch.zeros(PROMPTS, PROMPT_LEN, dtype=torch.int64)
    for row in ids:
        length = int(rng.integers(3, PROMPT_LEN + 1))
        row[-length:] = torch.from_numpy(rng.integers(3, 320, length))
    mask = (ids != 0).long()
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": compute_position_id_with_mask(mask)}
    batch = DataProto.from_dict(tensors, non_tensors={"uid": np.array([str(i) for i in range(PROMPTS)], dtype=object)})
    return batch.repeat(GROUP, interleave=True)


def rewards_of(batch: Any) -> torch.Tensor:
    """The share of tokens below 160, at the last token of each response."""
    from verl.trainer.ppo.ray_trainer import compute_response_mask

    mask = compute_response_mask(batch)
    batch.batch["response_mask"] = mask
    scores = ((batch.batch["responses"] < 160) * mask).sum(-1) / mask.sum(-1)
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(-1) - 1] = scores
    return rewards


def step(workers: Any, seed: int) -> dict[str, float]:
    """One step of GRPO, in the order of verl's trainer."""
    from verl.trainer.ppo.ray_trainer import AdvantageEstimator, compute_advantage

    batch = prompts_of(seed)
    made = workers.generate_sequences(batch.pop(batch_keys=["input_ids", "attention_mask", "position_ids"]))
    assert made.meta_info["timing"].keys() >= {"reshard", "generate_sequences"}
    batch = batch.union(made)
    batch.batch["token_level_rewards"] = rewards_of(batch)
    batch.meta_info["global_token_num"] = batch.batch["attention_mask"].sum(-1).tolist()
    batch.meta_info["temperature"] = 1.0
    batch = batch.union(workers.compute_log_prob(batch))
    mask = batch.batch["response_mask"].bool()
    difference = (batch.batch["old_log_probs"] - batch.batch["rollout_log_probs"])[mask].abs().mean().item()
    batch = compute_advantage(batch, adv_estimator=AdvantageEstimator.GRPO, num_repeat=GROUP)
    metrics = workers.update_actor(batch).meta_info["metrics"]
    after = workers.compute_log_prob(batch).batch["old_log_probs"]
    change = (after - batch.batch["old_log_probs"])[mask]
    return {
        "reward": batch.batch["token_level_rewards"].sum(-1).mean().item(),
        "difference": difference,
        "moved": change.abs().mean().item(),
        "gain": (change * batch.batch["advantages"][mask]).mean().item(),
        "grad_norm": float(np.mean(metrics["actor/grad_norm"])),
    }


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_grpo(tmp_path, model, ray_nodes, strategy):
    keep_mapped = f"+actor_rollout_ref.rollout.engine_kwargs.sglang.keep_mapped={strategy == 'fsdp2'}"
    with workers_of(model, f"actor_rollout_ref.actor.strategy={strategy}", keep_mapped) as workers:
        run_grpo(workers, tmp_path)


def run_grpo(workers, tmp_path):
    history = [step(workers, seed) for seed in range(STEPS)]
    for number, values in enumerate(history):
        print(f"step {number + 1}: " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))
    for values in history:
        # The engine computed with the trainer's weights: bfloat16 in verl's forward pass is all that is between them,
        # while a step moves the log-probabilities by more. An engine that missed an update is off by that much.
        assert 3 * values["difference"] < min(0.06, values["moved"]), values
        assert values["gain"] > 0, values
    assert history[-1]["reward"] > history[0]["reward"] + 0.05

    greedy = prompts_of(99)
    greedy.meta_info["do_sample"] = False
    made = workers.generate_sequences(greedy.select(deepcopy=True)).batch
    workers.save_weights(str(tmp_path / "trained"))
    rows = kept(greedy.batch["input_ids"], greedy.batch["attention_mask"])
    ours = kept(made["responses"], made["attention_mask"][:, PROMPT_LEN:])
    assert ours == cluster.reference_tokens(tmp_path / "trained", rows, RESPONSE_LEN, "float32")

    facts = workers.facts()
    assert len({fact["node"] for fact in facts}) == len({fact["pid"] for fact in facts}) == 2
    for fact in facts:
        assert fact["engine"] == "spmd_engine.engine" and not fact["sglang_imported"]
        assert fact["weight_version"] == fact["updates"] == STEPS + 1
        assert set(fact["sleeping"]) >= {"weights", "kv_cache"}


def kept(tokens: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The tokens of each row that are no padding."""
    return [row[of_row.bool()].tolist() for row, of_row in zip(tokens, mask, strict=True)]


# What the model may say: grammars keep a random model to the format. Its tool is in `verl_legacy_worker`.
SAYS = r'<tool_call>\{"name": "add", "arguments": \{"a": [0-9], "b": [0-9]\}\}</tool_call>|it is [0-9]{1,2}'
TEMPLATE = (
    "{% if tools %}<system>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = """
tools:
  - class_name: verl_legacy_worker.Adder
    config: {type: native}
    tool_schema:
      type: function
      function:
        name: add
        description: The sum of two digits.
        parameters: {type: object, properties: {}, required: []}
"""


@pytest.mark.skipif(not IS_0_5, reason="conversations need verl 0.5")
def test_conversations_with_a_tool(tmp_path, model, ray_nodes):
    import ray
    from transformers import AutoTokenizer
    from verl import DataProto

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    (tmp_path / "tools.yaml").write_text(TOOLS)
    more = [
        "data.max_prompt_length=250",
        "data.max_response_length=500",
        "actor_rollout_ref.rollout.multi_turn.enable=True",
        "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=4",
        f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tmp_path}/tools.yaml",
        "+actor_rollout_ref.rollout.engine_kwargs.sglang.grammar_backend=llguidance",
    ]
    batch = prompts_of(0)[:CONVERSATIONS]
    messages = [[{"role": "user", "content": f"What is {i} and {i}?"}] for i in range(len(batch))]
    batch.non_tensor_batch["raw_prompt"] = np.array([None, *messages], dtype=object)[1:]
    batch.non_tensor_batch["tools_kwargs"] = np.array([{"add": {}} for _ in messages], dtype=object)
    with workers_of(model, *more, regex=SAYS) as workers:
        unknown = batch.select(deepcopy=True)
        unknown.non_tensor_batch["tools_kwargs"][-1] = {"subtract": {}}
        with pytest.raises(ray.exceptions.RayTaskError, match=r"wants tools \['subtract'\]; there are \['add'\]"):
            workers.generate_sequences(unknown)
        keys = ["input_ids", "attention_mask", "position_ids"]
        made = workers.generate_sequences(
            batch.pop(batch_keys=keys, non_tensor_batch_keys=["raw_prompt", "tools_kwargs"])
        )
        made.meta_info["temperature"] = 1.0
        logprobs = workers.compute_log_prob(DataProto(made.batch, meta_info=made.meta_info)).batch["old_log_probs"]
    assert logprobs.shape == made.batch["responses"].shape and logprobs.isfinite().all()
    calls = 0
    for i, row in enumerate(made.batch):
        said = made.non_tensor_batch["messages"][i]["messages"]
        assert said[0].content == messages[i][0]["content"]
        asked = 0
        for before, after in itertools.pairwise(said):
            for call in before.tool_calls or []:
                asked += 1
                assert after.role == "tool"
                assert int(after.content) == call.function.arguments["a"] + call.function.arguments["b"]
        calls += asked
        assert made.non_tensor_batch["reward_scores"][i]["add"] == asked
        # The mask has what the model chose, and nothing else.
        text = tokenizer.decode(row["responses"][row["response_mask"].bool()])
        assert re.fullmatch(f"(({SAYS})(\n|<eos>)*)*", text), text
        assert text.count("<tool_call>") == asked
        answered = row["attention_mask"][-len(row["responses"]) :].bool()
        assert tokenizer.decode(row["responses"][answered]).count("<tool>") == asked
    assert calls > len(messages) / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "async"}, "set rollout.mode=sync"),
        ({"response_length": 2000}, "more than the 1024 that the model has"),
        ({"max_model_len": 10}, "less than the 16"),
        pytest.param(
            {"multi_turn": {"enable": True}},
            "multi_turn needs verl 0.5",
            marks=pytest.mark.skipif(IS_0_5, reason="is 0.5"),
        ),
    ],
)
def test_what_it_does_not_do_is_said(model, changes, message):
    from omegaconf import OmegaConf
    from transformers import AutoConfig, AutoTokenizer

    from spmd_engine.errors import ConfigError
    from spmd_engine.integrations.verl_legacy import SGLangRollout

    config = OmegaConf.create({"prompt_length": 8, "response_length": 8, **changes})
    with pytest.raises(ConfigError, match=message):
        SGLangRollout(str(model), config, AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model))
