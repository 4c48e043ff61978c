"""Two nodes: TP across them, and weights from shards on the other one."""

from __future__ import annotations

import pytest

from integration.jobs import run_job

# SGLang on the plain CPU cannot load KV heads that are fewer than the TP ranks.
HEADS = {"num_key_value_heads": 4}


@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
def test_tp_across_nodes(tmp_path, checkpoint, reference, nodes, ipv6):
    expected = reference("qwen2", 4, True, **HEADS)
    job = run_job("nodes.generate", 4, tmp_path, path=checkpoint("qwen2", 2, **HEADS), tp=4, nodes=nodes, ipv6=ipv6)
    assert job.values == expected


@pytest.mark.parametrize("tp", [2, 4])
def test_weights_from_the_other_node(tmp_path, checkpoint, reference, nodes, tp):
    expected = reference("qwen2", tp, True, **HEADS)
    path = checkpoint("qwen2", 1, **HEADS)
    values = run_job("nodes.update", 4, tmp_path, path=path, tp=tp, config=HEADS, nodes=nodes).values
    for rank, value in enumerate(values):
        assert {name: value[name] for name in ("checksums", "tokens")} == expected[rank % tp]
