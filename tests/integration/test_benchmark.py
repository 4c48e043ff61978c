"""`weight_sync.py`, `generate.py` and `rl_step.py` of the benchmarks as a user runs them, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import throughput_report

from integration.jobs import SPINS, environment

pytestmark = [pytest.mark.slow, pytest.mark.one_version]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXACT = ("--server-args", '{"dtype": "float32"}')  # rounding tells no tokens apart


def run(tmp_path, *arguments, timeout_s=240.0, script="weight_sync.py"):
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--timeout", str(timeout_s - 30)]
    env = {**environment(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)


def test_numbers_baseline_and_plot(tmp_path):
    """A mixture of experts: the baseline has to translate their names to reach all parameters."""
    numbers, picture = tmp_path / "numbers.json", tmp_path / "plot.png"
    done = run(
        tmp_path,
        *("--model", "tiny-moe", "--tp", "2", "--iters", "3", "--verify", "--decode", "2x4", "--expandable"),
        *("--baseline", "sglang-tensor,sglang-flattened", "--baseline-iters", "1"),
        *("--json", str(numbers), "--plot", str(picture)),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(numbers.read_text())
    assert found["header"]["ranks"] == 2 and found["header"]["commit"]
    assert found["header"]["allocator"] == "expandable_segments:True"
    assert found["ceilings_gb_s"]["local"] > 0

    ours = found["spmd_engine"]
    assert ours["wrong_elements"] == 0
    assert ours["local_bytes"] > 0 and ours["peer_bytes"] > 0 and ours["network_bytes"] == 0
    assert ours["floor_s"] > 0
    assert {"wait", "copy", "device", "commit", "other", "total"} <= ours["phases_s"].keys()
    assert all(0 < times["min"] <= times["median"] <= times["max"] for times in [ours["phases_s"]["total"]])
    assert [len(rank["rows_s"]) for rank in found["ranks"]] == [3, 3]
    assert ours["memory"].keys() == {"peak_extra_bytes", "peak_over_first_bytes"}
    assert ours["growth"]["updates"] == 2
    assert {"trainer_resident_bytes", "scheduler_descriptors", "scheduler_mappings"} <= ours["growth"]["by"].keys()
    assert ours["decode"]["before_tokens_s"] > 0 and ours["decode"]["after_tokens_s"] > 0

    assert found["baselines"].keys() == {"sglang-tensor", "sglang-flattened"}
    for name, baseline in found["baselines"].items():
        assert baseline["unlike_spmd_engine"] == [], name
        assert baseline["parameters"] > 0 and baseline["requests"] == 1
        assert baseline["total_s"]["median"] > 0
    assert "wrong elements: 0" in done.stdout and "sglang-flattened" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_rank_that_fails_ends_the_run_with_its_error(tmp_path):
    done = run(tmp_path, "--model", str(tmp_path / "missing"), "--tp", "2", timeout_s=120.0)
    assert done.returncode == 1
    assert "missing" in done.stderr and "weight_sync: ended: rank" in done.stderr


def test_generating_against_stock_sglang(tmp_path):
    """Both engines make the same tokens. In batches rounding depends on which requests SGLang prefills together."""
    numbers = tmp_path / "numbers.json"
    arguments = ("--tp", "2", "--cases", "4x8", "--rounds", "1", "--async", "--waiting-ranks", "--idle-s", "3")
    done = run(tmp_path, *arguments, *EXACT, "--json", str(numbers), script="generate.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(numbers.read_text())
    assert found["alone"]["requests"] == 8 and found["alone"]["differing_requests"] == 0
    assert [case["mode"] for case in found["cases"]] == ["batch", "async"]
    assert all(case["differing_requests"] <= 1 and case["compared_requests"] == 4 for case in found["cases"])
    assert all(case[name]["tokens_s"]["min"] > 0 for case in found["cases"] for name in ("SpmdEngine", "sglang.Engine"))
    idle, memory = found["idle"]["SpmdEngine"], found["memory"]
    assert len(idle) == 4 and max(used["total"] for used in idle.values()) < SPINS
    ours, theirs = (throughput_report.added_memory(memory[name], "pss") for name in ("SpmdEngine", "sglang.Engine"))
    assert 0 < ours < theirs
    assert {"asleep", "in a call of the engine"} < found["waiting"]["ways"].keys()
    assert "ratio" in done.stdout and "sglang.Engine adds" in done.stdout


def test_rl_steps_on_both_engines(tmp_path):
    """From the same start both loops train the same weights, bit for bit, and so make the same tokens, but for
    rounding in batches."""
    numbers = tmp_path / "numbers.json"
    arguments = (
        "--tp",
        "1",
        "--steps",
        "1",
        "--rollout",
        "2x4",
        "--prompt-tokens",
        "8",
        "--train-tokens",
        "2x16",
        *EXACT,
    )
    done = run(tmp_path, *arguments, "--json", str(numbers), script="rl_step.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(numbers.read_text())
    ours, theirs = (found["engines"][name] for name in ("SpmdEngine", "sglang.Engine"))
    assert len(set(ours["losses"])) == 3 and ours["losses"] == theirs["losses"]
    assert found["rollouts"]["requests"] == 6 and found["rollouts"]["differing"] <= 1
    assert ours["wrong_elements"] == 0
    without_sleep = {"train", "update_weights", "rollout"}
    assert theirs["memory"].keys() == without_sleep
    assert ours["memory"].keys() == {*without_sleep, "sleep", "wake weights", "wake KV cache"}
    for engine in (ours, theirs):
        (step,) = engine["steps_s"]
        assert step.keys() == {*engine["memory"], "whole step"} == engine["phases_s"].keys()
        assert min(step.values()) > 0 and step["whole step"] == pytest.approx(sum(step.values()) / 2)
        assert all(level["peak_bytes"] >= level["after_bytes"] > 0 for level in engine["memory"].values())
    assert "of 6 requests" in done.stdout
