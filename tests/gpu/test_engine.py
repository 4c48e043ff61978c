"""Engines on GPUs: jobs of one engine each, and a test for each scenario that a job's engine serves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import models
import pytest
import torch
from gpu.jobs import Job, Result, Runner
from gpu.scenarios.common import SAVED, SHAPE
from gpu.scenarios.memory import CAPTURES_GRAPHS
from integration.nodes import two_nodes_or_skip

from spmd_engine.transfer import _native

GetResult = Callable[[str, str], Result]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # of the first test: other jobs may be before its own
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="spmd_engine was built without CUDA"),
]
two_gpus = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
CORES_A_JOB = 4

SAME = "updates.bit_for_bit"
SAME_EXPANDABLE = "updates.bit_for_bit_expandable"
CHECKED = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "integration.checked_models"}
GRAPHS_SLEEP = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1"}

# In the order in which they start: those that share GPUs, the longest first; then those that want one, then two alone.
JOBS = (
    Job("lost-tp2", ("failures.lost_gpu",), tp=2, world=2, env=CHECKED),
    Job("qwen2-tp2", (SAME, SAME_EXPANDABLE), tp=2, world=2, one_gpu_each=True),
    # Two replicas: a scheduler process reads shards on a GPU that it does not see.
    Job("replicas", (SAME, SAME_EXPANDABLE), world=2, one_gpu_each=True, server_args={"enable_memory_saver": True}),
    Job("lost-tp1", ("failures.lost_gpu",), env=CHECKED),
    Job("moe-tp2", (SAME,), model="qwen3_moe", tp=2, world=2),
    Job(
        "nodes",
        ("updates.other_node",),
        world=2,
        one_gpu_each=True,
        two_nodes=True,
        env={"SPMD_ENGINE_BUCKET_BYTES": str(256 << 10)},
    ),
    Job("qwen2-tp1", (SAME, "updates.sources")),
    Job("moe-tp1", (SAME,), model="qwen3_moe"),
    Job("gemma-tp1", (SAME,), model="gemma"),
    Job("expandable", (SAME,), env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    Job("out-of-memory", ("failures.out_of_memory",), alone=True, server_args={"mem_fraction_static": 0.3}),
    Job("graphs-stay-tp1", ("memory.sleep",), alone=True, server_args=CAPTURES_GRAPHS),
    Job("graphs-sleep-tp1", ("memory.sleep",), alone=True, env=GRAPHS_SLEEP, server_args=CAPTURES_GRAPHS),
    Job(
        "keep-mapped",
        ("memory.keep_mapped",),
        alone=True,
        server_args={"enable_memory_saver": True, "keep_mapped": True},
    ),
    Job("graphs-stay-tp2", ("memory.sleep",), tp=2, world=2, alone=True, server_args=CAPTURES_GRAPHS),
    Job(
        "graphs-sleep-tp2", ("memory.sleep",), tp=2, world=2, alone=True, env=GRAPHS_SLEEP, server_args=CAPTURES_GRAPHS
    ),
)


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetResult]:
    """result(job, step) -> how it went. The jobs of the tests that were chosen run side by side."""
    chosen = {item.callspec.params["job"].name for item in request.session.items if item.path == request.path}
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    checkpoints = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(name: str) -> str:
        path = checkpoints / name
        if not path.exists():
            models.save_model(name, path, seed=SAVED, **SHAPE)
        return str(path)

    runner = Runner(
        [job for job in JOBS if job.name in chosen and job.world <= count],
        tmp_path_factory.mktemp("jobs"),
        gpus,
        jobs_a_gpu=max(1, min(3, len(os.sched_getaffinity(0)) // (CORES_A_JOB * count))),
        checkpoint=checkpoint,
        make_nodes=two_nodes_or_skip,
    )
    yield runner.result
    runner.close()


@pytest.mark.parametrize(
    ("job", "step"),
    [
        pytest.param(job, step, id=f"{job.name}-{step.split('.')[-1]}", marks=two_gpus if job.world > 1 else [])
        for job in JOBS
        for step in job.steps
    ],
)
def test_on_gpus(job: Job, step: str, result: GetResult, record_property: Callable[[str, object], None]) -> None:
    found = result(job.name, step)
    record_property("seconds", found.seconds)
    print(found.text)
    if found.outcome == "skipped":
        pytest.skip(found.text)
    assert found.outcome == "passed", found.text
