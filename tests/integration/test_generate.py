"""`generate` on real schedulers: its forms, its errors, and SGLang's own engine as the reference.

Models are float32 where other batches must make the same tokens: the last digits of bfloat16 would decide between them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

from integration.jobs import environment, run_job
from integration.scenarios.common import assert_close


def test_forms_and_lockstep(tmp_path, checkpoint):
    ranks = run_job("generate.generate", 2, tmp_path, path=checkpoint("qwen2", 1, dtype=torch.float32)).values
    assert ranks[0] == ranks[1]


@pytest.mark.one_version
def test_under_torchrun(tmp_path, checkpoint):
    ranks = run_job(
        "weights.reference", 2, tmp_path, torchrun=True, path=checkpoint("qwen2", 1), tp=2, generates=True
    ).values
    assert ranks[0]["tokens"] == ranks[1]["tokens"] is not None


def test_wrong_calls(tmp_path, checkpoint):
    run_job("generate.bad_requests", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_a_call_from_a_second_thread_is_refused_on_all_ranks(tmp_path, checkpoint):
    run_job("generate.overlapping", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenized")
    models.save_model("qwen2", directory, seed=1, dtype=torch.float32)
    models.save_tokenizer(directory)
    return directory


def test_text_equals_sglang_engine(tmp_path, with_tokenizer):
    """The same outputs as `sglang.Engine` for the same calls: text, tokens, finish reasons, log-probabilities."""
    ours = run_job("generate.text", 1, tmp_path / "ours", path=str(with_tokenizer)).values[0]
    output = tmp_path / "theirs.json"
    env = environment(tmp_path)
    env.update(
        SGLANG_PLATFORM="spmd_engine",
        CUDA_VISIBLE_DEVICES="",
        SGLANG_CPU_OMP_THREADS_BIND="0",
        TORCH_COMPILE_DISABLE="1",
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")]),
    )
    command = [sys.executable, str(Path(__file__).with_name("stock_engine.py")), str(with_tokenizer), str(output)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    theirs = json.loads(output.read_text())
    assert [o["output_ids"] for o in ours] == [o["output_ids"] for o in theirs]
    assert_close(ours, theirs)
    assert any(o["meta"]["finish_reason"]["type"] == "stop" for o in ours)
