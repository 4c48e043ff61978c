"""The skip gate: with `--skips NAME`, a run that skips other tests than `tests/skips.txt` lists under NAME fails.

A line of that file is `NAME TEST REASON`: the test must be skipped. After `NAME?` it may be, where a machine differs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SKIPS = Path(__file__).with_name("skips.txt")


def listed(name: str, text: str) -> set[str]:
    """The tests that `text` lists for a run of that name."""
    lines = [line.split(maxsplit=2) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {test for run, test, _ in lines if run == name}


def differences(name: str, text: str, skipped: set[str]) -> list[str]:
    """What is wrong with the tests that a run has skipped."""
    must, may = listed(name, text), listed(f"{name}?", text)
    wrong = [f"skipped, but not listed: {test}" for test in sorted(skipped - must - may)]
    return wrong + [f"listed, but not skipped: {test}" for test in sorted(must - skipped)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--skips", metavar="NAME", help="fail unless exactly the tests of tests/skips.txt are skipped")


class SkipGate:
    """Compares what a run has skipped with what it may skip."""

    def __init__(self, name: str) -> None:
        self._name, self._skipped, self._wrong = name, set[str](), list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skipped.add(report.nodeid.replace(" ", "_"))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skipped.add(report.nodeid.replace(" ", "_"))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._wrong = differences(self._name, SKIPS.read_text(), self._skipped)
        if self._wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._wrong:
            terminalreporter.section(f"skips differ from {SKIPS.name}, run {self._name}", red=True)
            for line in self._wrong:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--skips")
    if name and not hasattr(config, "workerinput"):  # with xdist: in the process that hears of all reports
        config.pluginmanager.register(SkipGate(name), "skip-gate")
