"""Finds function calls in texts, beside the event loop: decoding goes on meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from spmd_engine.control.messages import ParseCalls, Parsed, Refused
from spmd_engine.errors import ErrorReport, SpmdEngineError
from spmd_engine.scheduler.adapter.requests import parse_function_calls


class FunctionCallFinder:
    """A thread, started when it is needed first.

    Args:
        report: takes what was found.
        rank: of this process, for errors.
    """

    def __init__(self, report: Callable[[Parsed | Refused], None], rank: int) -> None:
        self._report, self._rank = report, rank
        self._work: queue.SimpleQueue[tuple[ParseCalls, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, message: ParseCalls, tokenizer: Any) -> None:
        """Take a text; what is found in it is reported later."""
        self._work.put((message, tokenizer))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="spmd_engine-function-calls")
            self._thread.start()

    def _run(self) -> None:
        while True:
            message, tokenizer = self._work.get()
            try:
                text, calls = parse_function_calls(message.text, message.tools, message.parser, tokenizer)
                self._report(Parsed(message.rid, text, calls))
            except Exception as error:  # of whatever kind: the next texts wait for this thread
                kind = type(error).__name__ if isinstance(error, SpmdEngineError) else "SchedulerError"
                self._report(Refused((message.rid,), ErrorReport(kind, str(error), self._rank)))
