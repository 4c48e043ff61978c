"""Plans for clusters that nobody here has, from SGLang's own model classes. (That they are those of a real engine is
in test_weights.py.)"""

from __future__ import annotations

import json

import pytest

from spmd_engine import cli
from spmd_engine.errors import ConfigError, PlanError
from spmd_engine.on_paper.plan import Cluster, plan_on_paper

pytestmark = pytest.mark.one_version


def test_qwen3_235b_on_64_gpus(tmp_path, capsys):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "map.png"
    arguments = "plan --model qwen3-235b-a22b --fsdp 64 --tp 8 --network-gbps 200"
    assert cli.main([*arguments.split(), "--json", str(numbers), "--heat-map", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "qwen3-235b-a22b: 64 GPUs, 8 a node; trainer FSDP 64, shard0, bfloat16; engine 8 × TP 8" in text
    assert "at 200 GB/s a node" in text and picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    # Every node has an eighth of the 235,093,634,560 parameters and needs all of them.
    per_node = 235_093_634_560 * 2
    assert found["bytes"]["network"] == sum(map(sum, found["network"])) == per_node * 7
    assert found["floor_s"] == found["floors_s"]["network"] == per_node * 7 / 8 / 200e9
    assert sum(each["weights"] for each in found["classes"]) == 1037
    assert found["fallback"] == {}
    # KV heads are fewer than TP ranks: two ranks read the same, and nothing else is read twice.
    twice = {"k_proj.weight", "v_proj.weight"}
    for each in found["classes"]:
        read = each["local"] + each["nvlink"] + each["network"]
        name = each["name"].removeprefix("model.layers.*.self_attn.")
        if "norm" not in name and "mlp.gate.weight" not in name:
            assert read == sizes()[each["name"]] * 8 * (2 if name in twice else 1), name


def sizes():
    """Bytes of the classes of Qwen3-235B-A22B, all layers together."""
    hidden, layers, experts, inner, heads, kv, dim, words = 4096, 94, 128, 1536, 64, 4, 128, 151936
    layer = {
        "mlp.experts.gate_up_proj": experts * 2 * inner * hidden,
        "mlp.experts.down_proj": experts * inner * hidden,
        "self_attn.q_proj.weight": heads * dim * hidden,
        "self_attn.k_proj.weight": kv * dim * hidden,
        "self_attn.v_proj.weight": kv * dim * hidden,
        "self_attn.o_proj.weight": heads * dim * hidden,
    }
    found = {f"model.layers.*.{name}": 2 * layers * size for name, size in layer.items()}
    return {**found, "lm_head.weight": 2 * words * hidden, "model.embed_tokens.weight": 2 * words * hidden}


def test_deepseek_v3_on_1024_gpus():
    report = plan_on_paper("deepseek-v3", Cluster(fsdp=1024, tp=16, ep=16))
    classes = {each.name: each for each in report.classes}
    assert len(report.ranks) == 1024 and len(report.network) == 128
    experts = classes["model.layers.*.mlp.experts.gate_up_proj"]
    assert experts.weights == 58
    # Each of the 64 replicas reads all experts.
    size = 58 * 256 * 2 * 2048 * 7168 * 2
    assert experts.local + experts.nvlink + experts.network == 64 * size
    # 256 experts in one tensor are on 256 ranks: 32 of the nodes send them to all.
    senders = report.network.sum(axis=0)
    assert (senders[:32] > 10 * senders[32:].max()).all()
    assert report.floor_s == report.floors["network"] == senders.max() / report.speeds.network
    cat = {name.partition("self_attn.")[2] for name in report.fallback}
    assert cat == {"q_a_proj.weight", "kv_a_proj_with_mqa.weight"} and len(report.fallback) == 2 * 61


def test_other_trainers():
    """Experts one by one, HSDP, float32 shards in CPU memory, and a placement that leaves nothing to move."""
    one_by_one = Cluster(fsdp=2, tp=2, replicate=2, placement="matched", per_expert=True, gpus_per_node=2)
    report = plan_on_paper("tiny-moe", one_by_one)
    classes = {each.name: each for each in report.classes}
    assert classes["model.layers.*.mlp.experts.*.down_proj.weight"].weights == 2 * 8
    for each in report.classes:  # what every rank reads whole is half on the other one
        replicated = "norm" in each.name or "mlp.gate.weight" in each.name
        assert each.network == 0 and each.nvlink == (each.local if replicated else 0), each.name

    with pytest.raises(ConfigError, match=r"only into equal parts: that of model\.embed_tokens\.weight \[1024, 128\]"):
        plan_on_paper("tiny-moe", Cluster(fsdp=6, tp=2, placement="shard1"))

    masters = Cluster(fsdp=4, tp=2, dtype="float32", off_loaded=True, placement="shard1", gpus_per_node=2)
    report = plan_on_paper("tiny-moe", masters)
    links = report.bytes
    assert links["local"] == 0 and links["staged"] > 0 and links["network"] > 0
    assert report.matrix.sum() == report.written.sum()  # cast to the engine's bfloat16 before they travel


def test_kernels_that_keep_weights_in_another_order_than_they_are_loaded(tmp_path):
    options = {"moe_runner_backend": "flashinfer_trtllm"}
    with pytest.raises(
        PlanError,
        match=r"kernels of model\.layers\.0\.mlp\.experts keep its weights in another order.*moe_runner_backend",
    ):
        plan_on_paper("tiny-moe", Cluster(fsdp=2, tp=2), server_args=options)


def test_a_model_that_transformers_does_not_know(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type", "architectures": ["Nothing"]}))
    with pytest.raises(ConfigError, match="transformers cannot read the model's configuration"):
        plan_on_paper(tmp_path, Cluster(fsdp=2, tp=2))
