"""Starting, idling, dying: what the trainer process and the machine see of an engine."""

from __future__ import annotations

import time

import psutil
import pytest

from integration.jobs import SPINS, run_job


@pytest.mark.one_version
def test_the_trainer_process_stays_as_it_was(tmp_path, checkpoint, leaves_nothing):
    run_job("life.purity", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_an_idle_scheduler_process_uses_no_cpu(tmp_path, checkpoint):
    values = run_job("life.idle", 2, tmp_path, path=checkpoint("qwen2", 1)).values
    assert all(value["share"] < SPINS for value in values), values


def test_wrong_starts(tmp_path, checkpoint):
    run_job("life.bad_starts", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_heads_that_tp_does_not_divide(tmp_path, checkpoint):
    path = checkpoint("qwen2", 1, num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    run_job("life.heads_not_divisible", 2, tmp_path, path=path)


@pytest.mark.one_version
@pytest.mark.parametrize("during", ["generate", "update_weights"])
def test_kill_of_a_scheduler_process(tmp_path, checkpoint, leaves_nothing, during):
    run_job("life.kill_scheduler", 2, tmp_path, path=checkpoint("qwen2", 1), during=during)


@pytest.mark.one_version
def test_restart_after_a_death(tmp_path, checkpoint, leaves_nothing):
    run_job("life.restart", 2, tmp_path, path=checkpoint("qwen2", 1), tp=2)


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.one_version
def test_kill_of_a_trainer_rank_takes_its_scheduler_process_along(tmp_path, checkpoint, leaves_nothing):
    run_job("life.kill_trainer", 2, tmp_path, path=checkpoint("qwen2", 1), expect_status=(0, -9))
    for rank in (0, 1):
        assert gone_within(int((tmp_path / f"scheduler{rank}.pid").read_text()), 5.0)


@pytest.mark.one_version
def test_exit_without_shutdown(tmp_path, checkpoint, leaves_nothing):
    run_job("life.exit_without_shutdown", 1, tmp_path, path=checkpoint("qwen2", 1))
    assert gone_within(int((tmp_path / "scheduler0.pid").read_text()), 5.0)


@pytest.mark.one_version
def test_ranks_that_hang_or_are_interrupted(tmp_path, checkpoint, leaves_nothing):
    run_job("failures.silence", 2, tmp_path, path=checkpoint("qwen2", 1), timeout_s=400.0)


@pytest.mark.one_version
def test_a_loader_that_raises(tmp_path, checkpoint):
    run_job("failures.loader_raises", 2, tmp_path, path=checkpoint("qwen2", 1))


@pytest.mark.one_version
def test_two_engines_in_one_job(tmp_path, checkpoint, leaves_nothing):
    run_job("failures.neighbours", 2, tmp_path, path=checkpoint("qwen2", 1), other=checkpoint("llama", 1))


@pytest.mark.one_version
def test_a_rank_that_shuts_down_early(tmp_path, checkpoint):
    run_job("life.peer_shuts_down", 2, tmp_path, path=checkpoint("qwen2", 1))
