"""What a check finds, and what checks know of the machine."""

from __future__ import annotations

import enum
import glob
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

_WIDTH = 120
_INDENT = 10


class Status(enum.StrEnum):
    """How bad it is. A warning costs speed, or matters to some jobs only; a failure stops a job."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: see `Status`.
        found: what was seen, with values.
        fix: what to do; "" only where nothing needs to be done.
        name: of the check.
    """

    status: Status
    found: str
    fix: str = ""
    name: str = ""

    def named(self, name: str) -> Finding:
        """The same under a name."""
        return replace(self, name=name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"check": self.name, "status": str(self.status), "found": self.found, "fix": self.fix}


@dataclass(frozen=True)
class Machine:
    """What all checks have in common.

    Attributes:
        environ, rendezvous, timeout_s: see `examine`.
        shared: what one check found out and others use, too.
    """

    environ: Mapping[str, str]
    rendezvous: str = ""
    timeout_s: float = 120.0
    shared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def has_gpu_nodes(self) -> bool:
        """Whether the system has NVIDIA devices, whatever CUDA_VISIBLE_DEVICES and torch say."""
        return bool(glob.glob("/dev/nvidia[0-9]*"))

    @cached_property
    def gpu_count(self) -> int:
        """How many GPUs torch sees. Asks the driver's management library: no CUDA context is made."""
        import torch

        return torch.cuda.device_count()


def ok(found: str) -> Finding:
    return Finding(Status.OK, found)


def skipped(found: str) -> Finding:
    return Finding(Status.SKIPPED, found)


def warning(found: str, fix: str) -> Finding:
    return Finding(Status.WARNING, found, fix)


def failure(found: str, fix: str) -> Finding:
    return Finding(Status.FAILURE, found, fix)


def exit_status(findings: Sequence[Finding]) -> int:
    """1 if anything failed, else 0: warnings do not stop a job."""
    return int(any(finding.status is Status.FAILURE for finding in findings))


def as_text(findings: Sequence[Finding]) -> str:
    """For people: one paragraph a check, and a line that sums up."""
    lines = []
    for finding in findings:
        lines += _wrapped(f"{finding.status:<{_INDENT}}{finding.name}: {finding.found}")
        if finding.fix:
            lines += _wrapped(f"{'':<{_INDENT}}fix: {finding.fix}")
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * _INDENT, break_long_words=False, drop_whitespace=True)
