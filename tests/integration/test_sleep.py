"""Releasing memory and taking it again, in legal and illegal orders."""

from __future__ import annotations

import pytest

from integration.jobs import run_job
from integration.scenarios.sleep import SHAPE


def test_legal_and_illegal_orders(tmp_path, checkpoint):
    values = run_job("sleep.sleep", 2, tmp_path, path=checkpoint("llama", 1, **SHAPE)).values
    for value in values:
        for tag, (freed, held) in value.items():
            assert 0.9 * held < freed < 1.2 * held, f"{tag}: {freed} bytes came back of {held}"


@pytest.mark.one_version
def test_weights_with_a_backup(tmp_path, checkpoint):
    run_job("sleep.with_backup", 1, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_one_of_two_replicas_sleeps(tmp_path, checkpoint):
    run_job("sleep.two_replicas", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_what_stays_mapped_is_not_opened_again(tmp_path, checkpoint):
    for seconds in run_job("sleep.kept_mapped", 2, tmp_path, path=checkpoint("qwen2", 1)).values:
        assert seconds["kept"] < 20e-6 < seconds["moved"]  # opening takes messages between the processes
