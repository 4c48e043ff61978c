"""Random faults. A longer run: CHAOS_STEPS=300 CHAOS_SEED=7 python -m pytest tests/integration/test_chaos.py."""

from __future__ import annotations

import os

import pytest

from integration.jobs import run_job
from integration.scenarios.chaos import STEPS


@pytest.mark.slow
@pytest.mark.one_version
def test_random_faults(tmp_path, checkpoint, leaves_nothing):
    steps, seed = int(os.environ.get("CHAOS_STEPS", len(STEPS))), int(os.environ.get("CHAOS_SEED", 1))
    timeout_s = 120.0 + 30.0 * steps
    job = run_job("chaos.faults", 2, tmp_path, path=checkpoint("qwen2", 1), seed=seed, steps=steps, timeout_s=timeout_s)
    assert all(sum(taken.values()) == steps for taken in job.values)
