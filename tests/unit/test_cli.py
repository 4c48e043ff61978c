"""`spmd-engine plan`: what needs no SGLang. Plans of real models are in tests/integration/test_on_paper.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from spmd_engine import cli
from spmd_engine.errors import ConfigError, PlanError, SchedulerError
from spmd_engine.on_paper.plan import Cluster, plan_on_paper


def plan(*arguments):
    return cli.main(["plan", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny", "--fsdp", "6", "--tp", "4"), "6 GPUs .* make no whole number of replicas of TP 4"),
        (("--model", "tiny", "--fsdp", "8", "--tp", "4", "--ep", "3"), "ep must divide tp, got ep 3 and tp 4"),
        (("--model", "tiny", "--fsdp", "0", "--tp", "4"), "fsdp must be at least 1, got 0"),
        (("--model", "no-such-model", "--fsdp", "2", "--tp", "2"), "'no-such-model' is neither a directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message, capsys):
    assert plan(*arguments) == 1
    found = capsys.readouterr()
    assert found.err.count("\n") == 1 and not found.out
    assert re.search(message, found.err)


def test_a_wrong_choice_is_refused_by_the_parser_and_by_the_function(capsys):
    with pytest.raises(SystemExit):
        plan("--model", "tiny", "--fsdp", "2", "--tp", "2", "--placement", "shard7")
    assert "invalid choice: 'shard7'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="placement must be one of shard0, shard1, matched, got 'shard7'"):
        plan_on_paper("tiny", Cluster(2, 2, placement="shard7"))
    with pytest.raises(ConfigError, match="dtype must be one of"):
        plan_on_paper("tiny", Cluster(2, 2, dtype="int8"))


def test_a_broken_installation_shows_the_end_of_the_log(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(_program(tmp_path, "echo 'no module named sglang' >&2; exit 3")))
    with pytest.raises(SchedulerError, match=r"exit status 3(.|\n)*no module named sglang"):
        plan_on_paper("tiny", Cluster(2, 2))


def test_what_the_child_refuses_has_its_type(monkeypatch, tmp_path):
    answer = '{"error": ["PlanError", "weights that nobody reads"]}'
    monkeypatch.setattr(sys, "executable", str(_program(tmp_path, f"cat > /dev/null; echo '{answer}'")))
    with pytest.raises(PlanError, match="nobody reads"):
        plan_on_paper("tiny", Cluster(2, 2))


def _program(directory: Path, script: str) -> Path:
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path
