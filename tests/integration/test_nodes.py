"""Two nodes: TP across them, and weights from shards on the other one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.jobs import run_job
from integration.nodes import Node

# SGLang on the plain CPU cannot load KV heads that are fewer than the TP ranks.
HEADS = {"num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("tp", "ipv6", "torchrun"), [(2, False, False), pytest.param(4, True, True, marks=pytest.mark.one_version)]
)
def test_weights_from_the_other_node(tmp_path, checkpoint, reference, nodes, tp, ipv6, torchrun):
    expected = reference("qwen2", tp, True, **HEADS)
    path = checkpoint("qwen2", 1, **HEADS)
    job = run_job(
        "nodes.update", 4, tmp_path, path=path, tp=tp, config=HEADS, nodes=nodes, ipv6=ipv6, torchrun=torchrun
    )
    values = job.values
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


@contextlib.contextmanager
def cut_when(ready: list[Path], node: Node) -> Iterator[list[float]]:
    """Cut a node off as soon as all these files exist; gives when that was."""
    cut: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not all(path.exists() for path in ready):
            if over.wait(0.05):
                return
        node.cut_off()
        cut.append(time.time())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield cut
    finally:
        over.set()
        thread.join()
        node.configure()


@pytest.mark.one_version
@pytest.mark.parametrize(("torchrun", "ipv6"), [(True, False)])
def test_a_node_that_is_cut_off(tmp_path, checkpoint, nodes, torchrun, ipv6):
    files = {
        name: [tmp_path / f"{name}{rank}{end}" for rank in range(4)] for name, end in (("ready", ""), ("rank", ".json"))
    }
    with cut_when(files["ready"], nodes[1]) as cut:
        path = checkpoint("qwen2", 1, **HEADS)
        job = run_job(
            "nodes.cut_off", 4, tmp_path, path=path, nodes=nodes, torchrun=torchrun, ipv6=ipv6,
            until=lambda: all(path.exists() for path in files["rank"]),
        )  # fmt: skip
    for rank, value in enumerate(job.values):
        # Each half of the engine misses the other one.
        assert value["rank"] in ((2, 3) if rank < 2 else (0,)), job.values
        assert "cannot be reached any more" in value["message"], job.values
        assert 0 < value["at"] - cut[0] < 25, (cut, job.values)
