"""Prints the table of the GPU acceptance run, and fails it if nothing was tested."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--acceptance", action="store_true", help="a table at the end; nothing but skips is a failure")


def rows(stats: dict[str, list[Any]]) -> list[tuple[str, float, str]]:
    """(test, seconds, outcome) of all tests, from a terminal reporter's statistics.

    Seconds are what the test itself has recorded, if it has; else how long it ran.
    """
    found: dict[str, tuple[float, str]] = {}
    for outcome in OUTCOMES:
        for report in stats.get(outcome, []):
            if not hasattr(report, "nodeid") or getattr(report, "when", None) is None:  # a file that does not import
                found.setdefault(str(getattr(report, "nodeid", report)), (0.0, outcome))
                continue
            seconds = dict(report.user_properties).get("seconds", report.duration)
            if report.nodeid not in found or outcome in ("failed", "error"):
                found[report.nodeid] = (float(seconds), outcome)
    return [(name, *value) for name, value in found.items()]


def table(lines: Iterable[tuple[str, float, str]]) -> str:
    """The rows as text, in columns."""
    lines = [(name.removeprefix("tests/gpu/"), seconds, outcome) for name, seconds, outcome in lines]
    width = max([len(name) for name, _, _ in lines] + [len("test")])
    text = [f"{'test':{width}}  {'seconds':>8}  result"]
    text += [f"{name:{width}}  {seconds:8.1f}  {outcome}" for name, seconds, outcome in sorted(lines)]
    counts = [f"{sum(o == outcome for _, _, o in lines)} {outcome}" for outcome in OUTCOMES]
    return "\n".join([*text, ", ".join(counts)])


def _reporter(config: pytest.Config) -> Any:
    return config.pluginmanager.get_plugin("terminalreporter")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--acceptance", default=False) and not _reporter(session.config).stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after the other summaries
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    yield
    if config.getoption("--acceptance", default=False):
        found = rows(terminalreporter.stats)
        terminalreporter.section("GPU acceptance")
        terminalreporter.write_line(table(found))
        if not any(outcome == "passed" for _, _, outcome in found):
            terminalreporter.write_line("No test passed: this machine cannot tell whether the GPU path works.")
