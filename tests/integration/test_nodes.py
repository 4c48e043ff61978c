"""Two nodes: TP across them, and weights from shards on the other one."""

from __future__ import annotations

import pytest

from integration.jobs import run_job

# SGLang on the plain CPU cannot load KV heads that are fewer than the TP ranks.
HEADS = {"num_key_value_heads": 4}


@pytest.mark.parametrize(("tp", "ipv6"), [(2, False), pytest.param(4, True, marks=pytest.mark.one_version)])
def test_weights_from_the_other_node(tmp_path, checkpoint, reference, nodes, tp, ipv6):
    expected = reference("qwen2", tp, True, **HEADS)
    path = checkpoint("qwen2", 1, **HEADS)
    values = run_job("nodes.update", 4, tmp_path, path=path, tp=tp, config=HEADS, nodes=nodes, ipv6=ipv6).values
    for rank, value in enumerate(values):
        assert {name: value[name] for name in ("checksums", "tokens")} == expected[rank % tp]
    # A node gets what its ranks want of the other one's shards once: at TP 2 that is half of the model; at TP 4 a
    # quarter of what is cut along its rows, as all else lies where it is needed.
    model = values[0]["model_bytes"]
    wanted = 0.5 * model if tp == 2 else values[0]["row_parallel_bytes"] / 4
    for number, node in enumerate((values[:2], values[2:])):
        arrived = sum(value["network_bytes"] for value in node)
        assert wanted <= values[0]["explained"][number] <= arrived  # buckets are padded
        assert wanted <= arrived < wanted + 0.01 * model
        assert arrived <= sum(value["staged_bytes"] for value in node) + 0.01 * model


@pytest.mark.one_version
def test_a_trainer_over_two_nodes(tmp_path, checkpoint, nodes):
    run_job("nodes.sources", 4, tmp_path, path=checkpoint("qwen2", 1), nodes=nodes)
