"""What processes hold of the machine: memory and CPU time, read from /proc."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Held:
    """Memory of one process, in bytes. See proc(5), smaps_rollup.

    Attributes:
        role: what the process is for.
        rss: resident, pages that it shares counted whole.
        pss: resident, of a page that n processes share one n-th; None where the kernel does not tell.
        pss_anon: the part of `pss` that no file backs.
    """

    role: str
    pid: int
    rss: int
    pss: int | None
    pss_anon: int | None


def held_by(roles: Mapping[int, str]) -> list[Held]:
    """What processes hold now, given their roles by process id."""
    return [_held(pid, role) for pid, role in roles.items()]


def _held(pid: int, role: str) -> Held:
    rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # not offered by every container runtime
        return Held(role, pid, rss, None, None)
    fields = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    return Held(role, pid, fields["Rss"], fields.get("Pss"), fields.get("Pss_Anon"))


def busy_shares(roles: Mapping[int, str], seconds: float) -> dict[str, dict[str, float]]:
    """Which share of one core each process uses over some seconds: "total", and by the names of threads that use any.

    The keys of the result are roles and process ids.
    """
    before = {pid: _thread_cpu_s(pid) for pid in roles}
    began = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    found = {}
    for pid, role in roles.items():
        used: dict[str, float] = {"total": 0.0}
        for thread, (name, seconds_now) in _thread_cpu_s(pid).items():
            share = (seconds_now - before[pid].get(thread, ("", 0.0))[1]) / passed
            if share:
                used[name] = used.get(name, 0.0) + share
                used["total"] += share
        found[f"{role} {pid}"] = used
    return found


def _thread_cpu_s(pid: int) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds of each thread, by thread id."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            name, _, fields = (path / "stat").read_text().partition("(")[2].rpartition(")")
            numbers = fields.split()
            found[int(path.name)] = (name, _exact_cpu_s(path, (int(numbers[11]) + int(numbers[12])) * _TICKS_S))
    return found


def _exact_cpu_s(thread: Path, by_ticks: float) -> float:
    """In nanoseconds if the kernel tells: a thread that wakes up often and briefly is a matter of luck in ticks."""
    try:
        nanoseconds = int((thread / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return by_ticks
    return nanoseconds / 1e9 if nanoseconds else by_ticks


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds of all threads of some processes so far, in their own code and in the kernel's for them."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * _TICKS_S
