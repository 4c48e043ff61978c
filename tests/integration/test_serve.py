"""`async_generate` on real schedulers: forms, mixture with collective calls, pauses, many at once, death.

Where tokens are compared, models are float32: requests meet in batches as they come, and the last digits of bfloat16
would decide between tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

from integration.jobs import environment, run_job

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_turn_tools.py"


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenized")
    models.save_model("qwen2", directory, seed=1, dtype=torch.float32)
    models.save_tokenizer(directory)
    return str(directory)


def test_forms(tmp_path, with_tokenizer):
    run_job("serve.forms", 2, tmp_path, path=with_tokenizer)


@pytest.mark.one_version
def test_mixture_with_collective_calls(tmp_path, checkpoint):
    path = checkpoint("qwen2", 1, dtype=torch.float32, max_position_embeddings=1024)
    run_job("mixture.mixed", 2, tmp_path, path=path)


@pytest.mark.one_version
def test_replicas_over_one_trainer(tmp_path, checkpoint):
    run_job("serve.replicas", 4, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_many_at_once(tmp_path, checkpoint):
    requests, seed = int(os.environ.get("SERVE_REQUESTS", "200")), int(os.environ.get("SERVE_SEED", "1"))
    run_job("serve.many", 2, tmp_path, path=checkpoint("qwen2", 1), requests=requests, seed=seed, timeout_s=600.0)


@pytest.mark.one_version
def test_death(tmp_path, checkpoint, leaves_nothing):
    run_job("serve_death.death", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_conversations_with_a_tool(tmp_path):
    """The example runs; it checks by itself that engine and trainer agree on the log-probabilities."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    done = subprocess.run(
        [*launch, "--rounds", "1"], env=environment(tmp_path), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "round 1: 24 conversations" in done.stdout and "tool: " in done.stdout
