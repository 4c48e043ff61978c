"""What a user can see of an engine: traces, log records, sums."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from integration.scenarios.common import PROMPTS, greedy

ROUNDING_US = 1.0
IDLE_S = 2.0
OF_CALLS = {
    "generate": ["prepare", "wait", "run", "commit"],
    "update_weights": ["describe", "wait", "copy", "commit"],
    "release_memory_occupation": ["prepare", "wait", "run"],
    "resume_memory_occupation": ["prepare", "wait", "run"],
}


def traced(engine: Any, model: torch.nn.Module, file: Path) -> None:
    """The Chrome trace of a training step shows the calls of the engine, and inside each what it waits for."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("training step"):
            greedy(engine)
            engine.update_weights(model)
            engine.release_memory_occupation(["kv_cache"])
            engine.resume_memory_occupation(["kv_cache"])
    profiler.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("cat") == "user_annotation"]
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix("spmd_engine."))
        for event in events
        if event["name"].startswith("spmd_engine.")
    )
    (step,) = [event for event in events if event["name"] == "training step"]
    calls = [found for found in ranges if found[2] in OF_CALLS]
    assert [name for _, _, name in calls] == list(OF_CALLS)
    for begin, end, name in calls:
        assert step["ts"] <= begin and end <= step["ts"] + step["dur"] + ROUNDING_US
        inside = [found for found in ranges if begin <= found[0] and found[1] <= end + ROUNDING_US and found[2] != name]
        assert [phase for _, _, phase in inside] == OF_CALLS[name], name
        assert all(one[1] <= other[0] + ROUNDING_US for one, other in pairwise(inside)), inside
    assert [name for _, _, name in ranges].count("format") == 1
    greedy(engine)
    engine.update_weights(model)


def logged(engine: Any, model: torch.nn.Module) -> None:
    """Records say what happened in words and in fields; a program that asks for none sees none."""
    package = logging.getLogger("spmd_engine")
    assert package.handlers == [] and package.level == logging.NOTSET
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    package.addHandler(handler)
    try:
        greedy(engine)
        assert records == []
        package.setLevel(logging.DEBUG)
        greedy(engine)
        stats = engine.update_weights(model)
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation(["kv_cache"])
    finally:
        package.setLevel(logging.NOTSET)
        package.removeHandler(handler)
    fields: list[Mapping[str, Any]] = [vars(record)["spmd_engine"] for record in records]
    assert [found["event"] for found in fields] == list(OF_CALLS)
    assert all(record.levelno == logging.DEBUG for record in records)
    assert fields[0]["sequences"] == len(PROMPTS) and fields[0]["seconds"] > 0
    assert fields[1]["weight_version"] == stats.weight_version and fields[1]["copy_s"] == stats.copy_s
    assert fields[2]["sleeping"] == ("kv_cache",) and fields[3]["sleeping"] == ()
    assert f"weight version {stats.weight_version}" in records[1].getMessage()


def idle(engine: Any) -> None:
    """A scheduler process that has nothing to do sleeps, but for a thread of gloo that looks 100 times a second."""
    before = _switches(engine.scheduler_pid)
    time.sleep(IDLE_S)
    assert (_switches(engine.scheduler_pid) - before) / IDLE_S < 200


def _switches(pid: int) -> int:
    """How often the threads of a process have gone to sleep so far."""
    count = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
        count += int(status["voluntary_ctxt_switches"])
    return count


def summed(engine: Any) -> None:
    """The phases of all updates add up to less than the calls took."""
    stats = engine.stats()
    phases = stats.update_phases_s
    assert list(phases) == ["describe", "wait", "record", "plan", "bind", "copy", "commit"]
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) < stats.update_s
    assert phases["copy"] > stats.last_update.copy_s
