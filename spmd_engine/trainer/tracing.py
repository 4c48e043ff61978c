"""Named ranges in the traces of `torch.profiler`. While none records, they cost a look at a flag."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()


def is_recording() -> bool:
    """Whether a profiler records this thread now."""
    return bool(torch.autograd._profiler_enabled())


def span(name: str) -> AbstractContextManager[Any]:
    """A range "spmd_engine.<name>" in the trace, if there is one."""
    return torch.profiler.record_function(f"spmd_engine.{name}") if is_recording() else _NOTHING


class Spans:
    """Ranges that follow one another, each until the next one begins; the last one until the end of the context."""

    def __init__(self) -> None:
        self._current: AbstractContextManager[Any] = _NOTHING

    def begin(self, name: str) -> None:
        """End the current range and begin this one."""
        self._current.__exit__(None, None, None)
        self._current = span(name)
        self._current.__enter__()

    def end(self) -> None:
        """End the current range."""
        self._current.__exit__(None, None, None)
        self._current = _NOTHING

    def __enter__(self) -> Spans:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
