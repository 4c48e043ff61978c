"""The first program of the documentation, as a new user would run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from integration.jobs import environment

PAGE = Path(__file__).parents[2] / "docs" / "getting-started.md"


@pytest.mark.one_version
def test_the_first_program_works_as_written(tmp_path):
    text = PAGE.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (command,) = re.findall(r"^torchrun (.*first\.py)$", text, re.M)
    (tmp_path / "first.py").write_text(program)
    env = environment(tmp_path)
    env["PYTHONPATH"] = f"{PAGE.parents[1]}:{env.get('PYTHONPATH', '')}"
    launch = [sys.executable, "-m", "torch.distributed.run", *command.split()]
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"], done.stdout
    tokens = [json.loads(line.partition(" ")[2]) for line in lines]
    assert [[len(output) for output in outputs] for outputs in tokens] == [[8, 8]] * 3
