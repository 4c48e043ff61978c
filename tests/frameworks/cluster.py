"""A Ray cluster of two nodes on one machine, and what the tests of all frameworks ask of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: How long a call may take, seconds: the first ones import verl, which takes minutes on a busy machine.
PATIENCE_S = 300


def need_verl(*series: str) -> str:
    """Skip a test module unless the verl of this environment is one of these. Returns which, without importing it."""
    try:
        found = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    for one in series:
        if found.startswith(one + "."):
            return one
    pytest.skip(f"for verl {' and '.join(series)} (make test-verl VERL=...), not {found}", allow_module_level=True)


@contextlib.contextmanager
def two_nodes(cpus: int) -> Iterator[None]:
    """Start Ray with two nodes of `cpus` CPUs each, in whose processes the test's helpers can be imported."""
    import ray
    from ray.cluster_utils import Cluster

    path = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # an actor without GPUs keeps CUDA_VISIBLE_DEVICES as it is
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=cpus)
        ray.init(address=cluster.address)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def reference_tokens(model: Path, prompts: list[list[int]], new_tokens: int, dtype: str) -> list[list[int]]:
    """What SGLang's own engine generates greedily from a checkpoint, in a process of its own."""
    given = {"model": str(model), "prompts": prompts, "new_tokens": new_tokens, "dtype": dtype}
    env = {
        **os.environ,
        "SGLANG_PLATFORM": "spmd_engine",
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_CPU_OMP_THREADS_BIND": "0",
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, str(HERE / "reference.py"), json.dumps(given)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
