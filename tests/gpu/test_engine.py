"""`update_weights` on GPUs: shards in device memory of the trainer ranks, parameters in that of SGLang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from gpu.worker import SHAPE
from integration.nodes import Node, two_nodes_or_skip

from spmd_engine.transfer import _native

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT_S = 420.0  # the first start compiles kernels
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="spmd_engine was built without CUDA"),
]
two_gpus = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def run_ranks(
    tmp_path: Path,
    scenario: str,
    world: int,
    *,
    one_gpu_each: bool = False,
    expandable: bool = False,
    pausable_graphs: bool = False,
    nodes: Sequence[Node] = (),
    **arguments: Any,
) -> None:
    """Run a scenario of worker.py on `world` ranks.

    Args:
        one_gpu_each: a rank sees its own GPU only, as under Ray.
        expandable: the trainer's memory is in expandable segments.
        pausable_graphs: SGLang captures CUDA graphs into memory that can be released.
        nodes: one for each rank.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        if one_gpu_each:
            env["CUDA_VISIBLE_DEVICES"] = str(rank)
        if expandable:
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        if pausable_graphs:
            env["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
        if nodes:
            env.update(nodes[rank].environment(nodes[0], ipv6=False), LOCAL_RANK="0")
            # NCCL would see through it: the nodes are one machine.
            env.update(NCCL_SOCKET_IFNAME=env["GLOO_SOCKET_IFNAME"], NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")
        with open(tmp_path / f"rank{rank}.log", "wb") as log:
            command = [sys.executable, str(WORKER), scenario, json.dumps(arguments)]
            ranks.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=nodes[rank].enter if nodes else None,
                )
            )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < deadline, f"no end after {TIMEOUT_S:.0f} s\n{_logs(tmp_path, world)}"
            time.sleep(0.1)
        time.sleep(0.5 if any(rank.poll() for rank in ranks) else 0)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert [rank.returncode for rank in ranks] == [0] * world, _logs(tmp_path, world)


def _logs(directory: Path, world: int) -> str:
    texts = [(directory / f"rank{rank}.log").read_text(errors="replace")[-5000:] for rank in range(world)]
    return "\n".join(f"---- rank {rank} ----\n{text}" for rank, text in enumerate(texts))


@pytest.mark.parametrize(
    ("name", "tp", "world", "how"),
    [
        ("qwen2", 1, 1, {}),
        ("gemma", 1, 1, {}),
        ("qwen3_moe", 1, 1, {}),
        ("qwen2", 1, 1, {"expandable": True}),
        pytest.param("qwen2", 2, 2, {"one_gpu_each": True}, marks=two_gpus),
        pytest.param("qwen3_moe", 2, 2, {}, marks=two_gpus),
        pytest.param("qwen2", 2, 2, {"one_gpu_each": True, "expandable": True}, marks=two_gpus),
        # Two replicas: a scheduler process reads shards on a GPU that it does not see.
        pytest.param("qwen2", 1, 2, {"one_gpu_each": True}, marks=two_gpus),
        pytest.param("qwen2", 1, 2, {"one_gpu_each": True, "expandable": True}, marks=two_gpus),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_bit_for_bit_what_sglang_loads(tmp_path: Path, name: str, tp: int, world: int, how: dict[str, bool]) -> None:
    path, other = (str(models.save_model(name, tmp_path / str(seed), seed=seed, **SHAPE)) for seed in (1, 2))
    run_ranks(tmp_path, "update", world, name=name, path=path, other=other, tp=tp, **how)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_shards_on_another_node(tmp_path: Path) -> None:
    path = str(models.save_model("qwen2", tmp_path / "1", seed=1, **SHAPE))
    with two_nodes_or_skip() as nodes:
        run_ranks(tmp_path, "other_node", 2, one_gpu_each=True, nodes=nodes, path=path)


@pytest.mark.parametrize("pausable_graphs", [False, True], ids=["graphs-stay", "graphs-sleep"])
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=two_gpus)])
def test_sleep_and_wake(tmp_path: Path, tp: int, pausable_graphs: bool) -> None:
    path = str(models.save_model("qwen2", tmp_path / "1", seed=1, **SHAPE))
    run_ranks(tmp_path, "sleep", tp, path=path, tp=tp, pausable_graphs=pausable_graphs)


def test_what_stays_mapped_until_memory_is_short(tmp_path: Path) -> None:
    path = str(models.save_model("qwen2", tmp_path / "1", seed=1, **SHAPE))
    run_ranks(tmp_path, "keep_mapped", 1, path=path)


def test_sources_that_change_and_sources_that_are_refused(tmp_path: Path) -> None:
    path = models.save_model("qwen2", tmp_path / "1", seed=1, **SHAPE)
    run_ranks(tmp_path, "sources", 1, path=str(path))


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=two_gpus)])
def test_a_gpu_that_is_lost_to_its_process(tmp_path: Path, tp: int) -> None:
    path = models.save_model("qwen2", tmp_path / "1", seed=1, **SHAPE)
    run_ranks(tmp_path, "lost_gpu", tp, path=str(path))


def test_no_memory_to_compute_in(tmp_path: Path) -> None:
    path = models.save_model("qwen2", tmp_path / "1", seed=1, **SHAPE)
    run_ranks(tmp_path, "out_of_memory", 1, path=str(path))
