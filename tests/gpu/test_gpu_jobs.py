"""Checks on the CPU what runs the jobs of GPU tests: groups, failures, the table."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
from gpu.conftest import rows, table
from gpu.jobs import Job, Runner
from gpu.scenarios.common import SAVED, SHAPE
from gpu.test_engine import JOBS
from integration.nodes import Node

PASSES, RAISES, DIES = (f"faults.{name}" for name in ("passes", "raises", "dies_on_one_rank"))


@contextmanager
def no_nodes() -> Iterator[tuple[Node, Node]]:
    pytest.skip("no nodes here")
    yield


def runner(root: Path, *jobs: Job, gpus: tuple[str, ...] = ()) -> Runner:
    def checkpoint(name: str) -> str:
        return str(models.save_model(name, root / "model", seed=SAVED, **SHAPE))

    return Runner(jobs, root / "jobs", gpus, jobs_a_gpu=2, checkpoint=checkpoint, make_nodes=no_nodes)


def test_a_failure_hides_no_other_scenario(tmp_path: Path) -> None:
    broken = Job("broken", (PASSES, RAISES, DIES), model=None, world=2)
    nodes = Job("nodes", (PASSES,), model=None, world=2, two_nodes=True)
    jobs = runner(tmp_path, broken, nodes)
    try:
        found = {step: jobs.result("broken", step) for step in broken.steps}
        assert {jobs.result("nodes", step).outcome for step in nodes.steps} == {"skipped"}
    finally:
        jobs.close()
    outcomes = {step: value.outcome for step, value in found.items()}
    assert outcomes == {"start": "passed", PASSES: "passed", RAISES: "failed", DIES: "failed", "end": "failed"}
    assert "rank 0 was here" in found[PASSES].text and "rank 1 was here" in found[PASSES].text
    assert "a scenario that fails" in found[RAISES].text
    assert "not run" in found["end"].text


@pytest.mark.slow
@pytest.mark.one_version
def test_an_engine_serves_one_scenario_after_the_other(tmp_path: Path) -> None:
    job = Job("cpu", ("updates.bit_for_bit", PASSES))
    jobs = runner(tmp_path, job)
    try:
        found = {step: jobs.result("cpu", step) for step in job.steps}
    finally:
        jobs.close()
    assert {value.outcome for value in found.values()} == {"passed"}, [value.text for value in found.values()]
    assert found["start"].seconds > 0 and found["updates.bit_for_bit"].seconds > 0


def test_jobs_share_gpus_unless_they_want_them_alone(tmp_path: Path) -> None:
    one, two = Job("one", ()), Job("two", (), world=2)
    alone, both = Job("alone", (), alone=True), Job("both", (), world=2, alone=True)
    jobs = runner(tmp_path, gpus=("0", "1"))

    def free(job: Job, *running: tuple[Job, str]) -> list[str] | None:
        jobs._running = [(SimpleNamespace(job=job, gpus=gpus.split()), None) for job, gpus in running]
        return jobs._free_gpus(job)

    assert free(one) == free(alone) == ["0"] and free(two) == free(both) == ["0", "1"]
    assert free(one, (one, "0")) == ["1"] and free(two, (one, "0")) == ["1", "0"] and free(alone, (one, "0")) == ["1"]
    assert free(both, (one, "0")) is None and free(alone, (two, "0 1")) is None
    assert free(one, (two, "0 1"), (two, "0 1")) is None and free(one, (two, "0 1"), (one, "0")) == ["1"]
    assert free(one, (alone, "0")) == ["1"] and free(two, (alone, "0")) is None
    assert free(one, (alone, "0"), (alone, "1")) is None


def test_every_job_has_a_name_of_its_own_and_scenarios_that_exist() -> None:
    assert len({job.name for job in JOBS}) == len(JOBS)
    for job in JOBS:
        assert job.scenarios and len({*job.scenarios}) == len(job.scenarios)
        for scenario in job.scenarios:
            module, function = scenario.split(".")
            assert callable(getattr(importlib.import_module(f"gpu.scenarios.{module}"), function))


def test_the_table_has_every_test_once() -> None:
    def report(name: str, when: str, **properties: float) -> SimpleNamespace:
        return SimpleNamespace(nodeid=name, when=when, duration=0.25, user_properties=list(properties.items()))

    stats = {
        "passed": [
            report("tests/gpu/test_a.py::one", "call", seconds=12.0),
            report("tests/gpu/test_a.py::two", "call"),
        ],
        "error": [report("tests/gpu/test_a.py::two", "teardown")],
        "skipped": [report("tests/gpu/test_b.py::three", "setup")],
        "": [report("tests/gpu/test_a.py::one", "setup")],
    }
    lines = table(rows(stats)).splitlines()
    assert [line.split() for line in lines] == [
        ["test", "seconds", "result"],
        ["test_a.py::one", "12.0", "passed"],
        ["test_a.py::two", "0.2", "error"],
        ["test_b.py::three", "0.2", "skipped"],
        ["1", "passed,", "0", "failed,", "1", "error,", "1", "skipped"],
    ]


@pytest.mark.parametrize("body", ["", "import pytest\ndef test_a(): pytest.skip('no GPU')"], ids=["none", "skips"])
def test_a_run_that_tests_nothing_fails(tmp_path: Path, body: str) -> None:
    (tmp_path / "test_nothing.py").write_text(body)
    conftest = Path(__file__).with_name("conftest.py")
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    command = [sys.executable, "-m", "pytest", "--acceptance", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, None), done.stdout
    assert "No test passed" in done.stdout
