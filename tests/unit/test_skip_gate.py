from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
SKIPPING = """
import pytest

@pytest.mark.skip(reason="listed")
def test_listed(): pass

@pytest.mark.skipif({skips}, reason="sometimes")
def test_other(): pass
"""
LIST = """
# a comment
here   test_it.py::test_listed  it is listed
here?  test_it.py::test_other   on some machines
there  test_it.py::test_listed  it is listed
"""


def run(directory: Path, name: str, *, skips: bool) -> tuple[int, str]:
    (directory / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (directory / "skips.txt").write_text(LIST)
    (directory / "test_it.py").write_text(SKIPPING.format(skips=skips))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--skips", name, str(directory)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_a_run_that_skips_something_else_fails(tmp_path):
    assert run(tmp_path, "here", skips=True)[0] == run(tmp_path, "here", skips=False)[0] == 0
    assert run(tmp_path, "there", skips=False)[0] == 0
    status, text = run(tmp_path, "there", skips=True)
    assert status == 1 and "skipped, but not listed: test_it.py::test_other" in text
    (tmp_path / "sub").mkdir()
    status, text = run(tmp_path / "sub", "nowhere", skips=False)
    assert status == 1 and "skipped, but not listed: test_it.py::test_listed" in text


def test_a_listed_test_that_runs_fails_the_gate(tmp_path):
    run(tmp_path, "here", skips=True)
    (tmp_path / "skips.txt").write_text(LIST + "here test_it.py::test_gone it was renamed\n")
    command = [sys.executable, "-m", "pytest", "-q", "--skips", "here", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "listed, but not skipped: test_it.py::test_gone" in done.stdout
