"""Keeps the requests of `async_generate`: which begins, ends, stops or goes on next, and what the trainer hears of it.

The root of a replica decides, and puts it into step commands; all ranks apply the same ones.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from array import array
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from spmd_engine.control import timeouts
from spmd_engine.control.channel import Channel, ChannelClosed
from spmd_engine.control.generation import Increment
from spmd_engine.control.messages import (
    Abort,
    ParseCalls,
    Parsed,
    Pause,
    PauseState,
    Progress,
    Refused,
    Resume,
    Start,
    Submit,
    Submits,
    ToScheduler,
)
from spmd_engine.errors import ErrorReport, SpmdEngineError
from spmd_engine.scheduler.adapter import requests as sglang_requests
from spmd_engine.scheduler.function_calls import FunctionCallFinder
from spmd_engine.scheduler.memory import MemoryKeeper
from spmd_engine.scheduler.outputs import Outputs
from spmd_engine.scheduler.step_commands import StepCommands
from spmd_engine.scheduler.weights import WeightsKeeper


class AsyncRequests:
    """The requests that the trainer of the first rank has submitted.

    Args:
        channel: to the trainer of this rank, which hears of them if it is the first one.

    Attributes:
        outputs: the `sink` of the scheduler.
        is_paused: whether all stand still.
    """

    def __init__(self, start: Start, channel: Channel[ToScheduler]) -> None:
        self._rank, self._channel = start.rank, channel
        self.outputs = Outputs(self._report if start.rank == start.group.ranks[0] else None)
        self.is_paused = False
        self._next = StepCommands()
        self._later: list[Submit] = []  # they came behind a collective call, or while all stand still
        self._wants_resume = False
        self._sign_s = min(timeouts.LONGEST_SILENCE_S, start.timeout_s / 4)
        self._next_sign, self._steps_then = 0.0, -1
        self._reports: queue.SimpleQueue[Increment | Progress | Refused | PauseState | Parsed] = queue.SimpleQueue()
        self._finder = FunctionCallFinder(self._reports.put, start.rank)
        threading.Thread(target=self._write_reports, daemon=True, name="spmd_engine-reports").start()

    def attach(self, scheduler: Any, weights: WeightsKeeper, memory: MemoryKeeper) -> None:
        self._scheduler, self._weights, self._memory = scheduler, weights, memory

    # ---- to the trainer ----

    def _report(self, increments: list[Increment]) -> None:
        for increment in increments:
            self._reports.put(increment)

    def show_progress(self) -> None:
        """Let the trainer know now and then that steps are made: it hears of most requests only when they finish."""
        now, steps = time.monotonic(), sglang_requests.steps(self._scheduler)
        if now >= self._next_sign and steps != self._steps_then:
            self._next_sign, self._steps_then = now + self._sign_s, steps
            self._reports.put(Progress([]))

    def _write_reports(self) -> None:
        """A thread: the trainer may be busy and not read, and this process must not wait for it."""
        with contextlib.suppress(ChannelClosed):  # the watchdog sees a trainer that is gone
            while True:
                batch = [self._reports.get()]
                while not self._reports.empty():
                    batch.append(self._reports.get())
                for is_increment, items in groupby(batch, key=lambda item: isinstance(item, Increment)):
                    if is_increment:
                        self._channel.send(Progress([item for item in items if isinstance(item, Increment)]))
                        continue
                    for message in items:
                        self._channel.send(message)

    # ---- from the trainer, on the first rank ----

    def take(self, message: Any, *, behind_call: bool) -> None:
        """Remember what a message says.

        Args:
            behind_call: a collective call came before it and has not begun.
        """
        if isinstance(message, Submits):
            self._later += message.submits
            self.admit(behind_call=behind_call)
        elif isinstance(message, Abort):
            self._abort(message.rids)
        elif isinstance(message, Pause):
            self._next.pause, self._wants_resume = not self.is_paused, False
        elif isinstance(message, Resume):
            if self._next.pause and not behind_call:
                self._next.pause = False  # it had not begun
            else:
                self._wants_resume = True
        elif isinstance(message, ParseCalls):
            self._finder.put(message, self._scheduler.tokenizer)

    def admit(self, *, behind_call: bool) -> None:
        """Let requests into the next commands, unless they are behind a collective call or all stand still."""
        while self._later and not (behind_call or self.is_paused or self._next.pause):
            self._submit(self._later.pop(0))

    def _submit(self, submit: Submit) -> None:
        """Put requests into the next commands, or say why not: they must not fail on other ranks."""
        try:
            asleep = self._memory.generate_refusal()
            if asleep is not None:
                raise asleep
            self._weights.check_consistent()
            for rid, request in submit.requests.items():
                sglang_requests.make_request(request, rid, self._scheduler)
        except SpmdEngineError as error:
            report = ErrorReport(type(error).__name__, str(error), self._rank)
            self._reports.put(Refused(tuple(submit.requests), report))
            return
        self._next.submits.append(submit)

    def make_way(self, running: str) -> None:
        """For a weight update, which lets requests run ("wait"), or not so long ("abort", "pause")."""
        waiting = [rid for submit in self._next.submits for rid in submit.requests]
        if running == "abort":
            self._abort((*self.outputs.served, *waiting))
        elif running == "pause" and not self.is_paused and not self._next.pause:
            self._next.pause = self._wants_resume = bool(self.outputs.served or waiting)

    def _abort(self, aborted: Iterable[str]) -> None:
        """End requests, those that have not begun included."""
        rids = dict.fromkeys(aborted)
        for submit in [*self._next.submits, *self._later]:
            gone = [rid for rid in submit.requests if rid in rids]
            reason: dict[str, object] = {"type": "abort", "message": "aborted before it began"}
            for rid in gone:
                del submit.requests[rid]
                self._report([Increment(rid, array("q"), [], None, reason, 0, 0)])
        self._next.submits = [submit for submit in self._next.submits if submit.requests]
        self._later = [submit for submit in self._later if submit.requests]
        self._next.aborts += [rid for rid in rids if rid in self.outputs.served]

    def resume_if_wanted(self) -> None:
        """Let paused requests go on: not with released memory, nor with a mixture of weights."""
        if self._wants_resume and self._may_resume():
            self._next.resume, self._wants_resume = self.is_paused, False

    def _may_resume(self) -> bool:
        try:
            self._weights.check_consistent()
        except SpmdEngineError:
            return False
        return self._memory.generate_refusal() is None

    # ---- step commands ----

    @property
    def has_commands(self) -> bool:
        """Whether the next commands say something."""
        return self._next != StepCommands()

    def take_commands(self) -> StepCommands:
        """The next commands, on the root."""
        commands, self._next = self._next, StepCommands()
        # What begins or ends in the same turn would not be stopped by a pause.
        if commands.pause and (commands.submits or commands.aborts or not sglang_requests.can_pause(self._scheduler)):
            commands.pause, self._next.pause = False, True
        return commands

    def apply(self, commands: StepCommands) -> list[Any]:
        """Step commands as SGLang's messages, on all ranks."""
        messages = []
        for submit in commands.submits:
            made = [
                sglang_requests.make_request(request, rid, self._scheduler, stream=submit.stream)
                for rid, request in submit.requests.items()
            ]
            self.outputs.serve(list(submit.requests), [one.return_logprob for one in made], self._weights.version)
            messages.append(sglang_requests.make_batch(made))
        messages += [sglang_requests.make_abort(rid) for rid in commands.aborts]
        if commands.pause and not self.is_paused:
            messages.append(sglang_requests.make_pause())
            self.is_paused = True
            self._reports.put(PauseState(True))
        if commands.resume and self.is_paused:
            messages.append(sglang_requests.make_resume())
            self.is_paused = False
            self._reports.put(PauseState(False))
        return messages
