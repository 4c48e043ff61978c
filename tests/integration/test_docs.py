"""The first program of the documentation, as a new user would run it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from documentation import ROOT, blocks

from integration.jobs import environment

PAGE = ROOT / "docs" / "getting-started.md"


@pytest.mark.one_version
def test_the_first_program_works_as_written(tmp_path):
    (program,) = blocks(PAGE, "python")
    (command,) = [line for line in blocks(PAGE, "bash") if line.startswith("torchrun ")]
    (tmp_path / "first.py").write_text(program)
    env = environment(tmp_path)
    env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
    launch = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]]
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"], done.stdout
    tokens = [json.loads(line.partition(" ")[2]) for line in lines]
    assert [[len(output) for output in outputs] for outputs in tokens] == [[8, 8]] * 3
