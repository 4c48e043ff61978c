"""Requests of one replica that run beside one another: the trainer's side of `SpmdEngine.async_generate`.

All of it happens in the thread of the caller's asyncio event loop, which watches the channel to the scheduler process
while requests are under way. A collective call in another thread reads the channel meanwhile and passes on what it
finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from spmd_engine.control import timeouts
from spmd_engine.control.generation import FunctionCall, GenerateOutput, GenerateRequest
from spmd_engine.control.messages import Abort, ParseCalls, Parsed, PauseState, Progress, Refused, Submit, Submits
from spmd_engine.errors import CollectiveTimeoutError, InvalidRequestError, SpmdEngineError
from spmd_engine.trainer import requests as req
from spmd_engine.trainer.failures import copy_of
from spmd_engine.trainer.requests import TextStream
from spmd_engine.trainer.scheduler_client import SchedulerClient
from spmd_engine.trainer.sequences import RunningSequence

_OUTBOX_LIMIT = 64


class AsyncRequests:
    """Submits requests to the scheduler process of a replica's first rank, and hands out what comes of them.

    Args:
        client: of that process.
        tokenizer: or None.
        timeout_s: longest silence of the process while requests run.
        finished: called with the results of every request that is over.
    """

    def __init__(
        self,
        client: SchedulerClient,
        tokenizer: Any,
        timeout_s: float,
        finished: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self._client, self._tokenizer, self._timeout_s = client, tokenizer, timeout_s
        self._finished = finished
        self._sequences: dict[str, RunningSequence] = {}
        self._names: dict[str, list[str]] = {}  # the sequences of each request
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._questions: dict[str, asyncio.Future[tuple[str, list[FunctionCall]]]] = {}  # texts that are parsed
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._fd = -1
        self._is_watching = False
        self._timer: asyncio.TimerHandle
        self._heard = 0.0
        self._is_paused = False
        # Requests that begin in the same turn of the event loop go out together: sooner, and into one batch of SGLang.
        self._outbox: list[Submit] = []
        self._outbox_lock = threading.RLock()  # a send that fails may end all requests
        # What has come, in the order in which it came: appended by whoever reads the channel, taken by the event loop.
        self._inbox: deque[object] = deque()
        client.on_message = self._notice
        client.on_end = self._notice
        client.before_send = self._send_outbox

    # ---- the caller's side ----

    def start(
        self,
        requests: list[GenerateRequest],
        *,
        stream: bool,
        request_id: str | None,
        timeout_s: float | None,
    ) -> tuple[str, list[RunningSequence]]:
        """Submit requests; their id, and what will come of them.

        Raises:
            InvalidRequestError: the id is in use, or requests run in another event loop.
            SpmdEngineError: the engine has ended.
        """
        loop = self._enter_loop()
        if request_id is not None and request_id in self._names:
            raise InvalidRequestError(f"request_id {request_id!r} runs already: give each request an id of its own")
        self._count += 1
        name = request_id if request_id is not None else self._free_name()
        news: asyncio.Queue[RunningSequence] = asyncio.Queue()
        made = [RunningSequence(f"{self._count}.{i};", i, one, news, streams=stream) for i, one in enumerate(requests)]
        if not self._sequences:
            self._heard = time.monotonic()
        self._sequences.update({one.rid: one for one in made})
        self._names[name] = [one.rid for one in made]
        self._watch()
        self._post(loop, Submit({one.rid: one.request for one in made}, stream))
        if timeout_s is not None:
            self._timers[name] = loop.call_later(timeout_s, self.abort, name, f"timed out after {timeout_s:g} s")
        return name, made

    def _free_name(self) -> str:
        while (name := f"request-{self._count}") in self._names:  # a name that the caller has given
            self._count += 1
        return name

    async def parse(self, text: str, tools: list[Any], parser: str) -> tuple[str, list[FunctionCall]]:
        """What a parser of SGLang's finds in a text.

        Raises:
            InvalidRequestError: see `LeaderCalls.parse_function_calls`.
            SpmdEngineError: the engine has ended.
        """
        loop = self._enter_loop()
        self._count += 1
        rid = f"text-{self._count}"
        future = self._questions[rid] = loop.create_future()
        self._heard = time.monotonic()
        self._watch()
        try:
            self._client.send(ParseCalls(rid, text, tools, parser))
            return await future
        finally:
            self._questions.pop(rid, None)
            self._unwatch_if_idle()

    def _enter_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the caller, which is that of all that is under way.

        Raises:
            InvalidRequestError: it is not.
            SpmdEngineError: the engine has ended.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop.is_closed():
            self._forget_all()
        if (self._sequences or self._questions) and loop is not self._loop:
            raise InvalidRequestError("requests of this engine run in another event loop: use one for all of them")
        self._client.check_alive()
        self._loop, self._thread = loop, threading.get_ident()
        return loop

    def _post(self, loop: asyncio.AbstractEventLoop, submit: Submit) -> None:
        with self._outbox_lock:
            self._outbox.append(submit)
            waiting = len(self._outbox)
        if waiting == 1:
            loop.call_soon(self._send_outbox)
        elif waiting >= _OUTBOX_LIMIT:
            self._send_outbox()

    def _send_outbox(self) -> None:
        with self._outbox_lock:  # held until they are sent: what another thread sends comes after them
            submits, self._outbox = tuple(self._outbox), []
            if submits:
                self._client.send_now(Submits(submits))

    async def wait(self, name: str, sequences: list[RunningSequence], *, with_text: bool) -> list[dict[str, Any]]:
        """The results, once all sequences are over.

        Raises:
            SpmdEngineError: they were refused, or the engine ended.
        """
        try:
            while not all(one.is_over for one in sequences):
                await sequences[0].news.get()
            for one in sequences:
                if one.error is not None:
                    raise one.error
            results = self._format(sequences, [one.output() for one in sequences], name, with_text)
            self._finished(results)
            return results
        finally:
            self._drop(name, sequences)

    def stream(self, name: str, sequences: list[RunningSequence], *, with_text: bool) -> Stream:
        """What comes, as it comes."""
        return Stream(self._parts(name, sequences, with_text), lambda: self._drop(name, sequences), self._loop)

    async def _parts(
        self, name: str, sequences: list[RunningSequence], with_text: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        texts = [TextStream(one.request, self._tokenizer) if self._tokenizer else None for one in sequences]
        try:
            left = len(sequences)
            while left:
                one = await sequences[0].news.get()
                if one.error is not None:
                    raise one.error
                increments, one.fresh = one.fresh, []
                is_over = any(more.finish_reason is not None for more in increments)
                (result,) = self._format([one], [one.output(increments)], name, with_text)
                text = texts[one.index]
                if text is not None and not is_over:
                    result["text"] = text.add(result["output_ids"])
                elif text is not None:  # without what SGLang cuts off at its end
                    (whole,) = self._format([one], [one.output()], name, False)
                    result["text"] = text.finish(whole["text"])
                result["meta_info"]["finish_reason"] = one.finish_reason if is_over else None
                if len(sequences) > 1:
                    result["index"] = one.index
                left -= is_over
                if is_over or result["output_ids"]:
                    yield result
            self._finished(self._format(sequences, [one.output() for one in sequences], name, False))
        finally:
            self._drop(name, sequences)

    def _format(
        self, sequences: list[RunningSequence], outputs: list[GenerateOutput], name: str, with_text: bool
    ) -> list[dict[str, Any]]:
        many = len(self._names.get(name, ())) > 1
        return req.format_outputs(
            [one.request for one in sequences],
            outputs,
            ids=[f"{name}-{one.index}" if many else name for one in sequences],
            tokenizer=self._tokenizer,
            return_text_in_logprobs=with_text,
        )

    def abort(self, name: str | None, message: str) -> int:
        """End a request, or all; the number of sequences that were still under way."""
        rids = list(self._sequences) if name is None else self._names.get(name, [])
        running = [rid for rid in rids if rid in self._sequences and not self._sequences[rid].is_over]
        for rid in running:
            self._sequences[rid].abort_message = self._sequences[rid].abort_message or message
        if running:
            self._client.send(Abort(tuple(running)))
        return len(running)

    def _drop(self, name: str, sequences: list[RunningSequence]) -> None:
        """Nobody waits for these any more."""
        self.abort(name, "nobody waits for it any more")
        self._names.pop(name, None)
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
        for one in sequences:
            self._sequences.pop(one.rid, None)
        self._unwatch_if_idle()

    def _forget_all(self) -> None:
        """The event loop that waited for these was closed."""
        self.abort(None, "nobody waits for it any more")
        self._sequences.clear()
        self._names.clear()
        self._timers.clear()
        self._questions.clear()
        self._is_watching, self._loop = False, None

    # ---- the channel ----

    def _unwatch_if_idle(self) -> None:
        if not self._sequences and not self._questions:
            self._unwatch()

    def _watch(self) -> None:
        if (
            (self._sequences or self._questions)
            and not self._is_watching
            and self._loop is not None
            and self._client.fileno() >= 0
        ):
            self._fd = self._client.fileno()
            self._loop.add_reader(self._fd, self._readable)
            self._timer = self._loop.call_later(timeouts.LIVENESS_S, self._check_progress)
            self._is_watching = True

    def _unwatch(self) -> None:
        if self._is_watching and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._timer.cancel()
            self._is_watching = False

    def _readable(self) -> None:
        """Called by the event loop when something has come."""
        with contextlib.suppress(SpmdEngineError):  # every sequence has it, from `_end`
            if not self._client.poll(self._inbox.append):
                self._unwatch()  # a call in another thread reads, and passes on what it finds
                self._heard = time.monotonic()
                assert self._loop is not None
                self._loop.call_later(timeouts.NEXT_LOOK_S, self._watch)
        self._drain()

    def _check_progress(self) -> None:
        """Nothing may stay silent for ever."""
        running = any(not one.is_over for one in self._sequences.values())
        silent_s = time.monotonic() - self._heard
        if ((running and not self._is_paused) or self._questions) and silent_s > self._timeout_s:
            count = len(self._sequences) + len(self._questions)
            error = CollectiveTimeoutError(f"nothing was heard of {count} running requests for {silent_s:.0f} s")
            with contextlib.suppress(CollectiveTimeoutError):
                self._client.fail_if_idle(error)
        if self._is_watching and self._loop is not None:
            self._timer = self._loop.call_later(timeouts.LIVENESS_S, self._check_progress)

    def _drain(self) -> None:
        """Take what has come, in the thread of the event loop."""
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Exception):
                self._end(message)
            else:
                self._take(message)

    def _take(self, message: object) -> None:
        self._heard = time.monotonic()
        if isinstance(message, PauseState):
            self._is_paused = message.is_paused
        elif isinstance(message, Progress):
            for more in message.increments:
                if (one := self._sequences.get(more.rid)) is not None:
                    one.take(more)
                    if one.streams or one.is_over:
                        one.news.put_nowait(one)
        elif isinstance(message, Parsed):
            if (future := self._questions.get(message.rid)) is not None and not future.done():
                future.set_result((message.text, message.calls))
        elif isinstance(message, Refused):
            for rid in message.rids:
                if (future := self._questions.get(rid)) is not None and not future.done():
                    future.set_exception(message.error.to_exception())
                if (one := self._sequences.get(rid)) is not None:
                    one.error = message.error.to_exception()
                    one.news.put_nowait(one)

    def _end(self, error: Exception) -> None:
        """The engine has ended."""
        self._unwatch()
        for future in self._questions.values():
            if not future.done():
                future.set_exception(copy_of(error))
        for one in self._sequences.values():
            if not one.is_over:
                one.error = copy_of(error)
                one.news.put_nowait(one)

    def _notice(self, message: object) -> None:
        """Something that a call has read, in this thread or another, or the error with which the engine ended."""
        self._inbox.append(message)
        if self._loop is not None and self._loop.is_closed():
            self._forget_all()
        if self._loop is None or threading.get_ident() == self._thread:
            self._drain()
        else:
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self._drain)


class Stream:
    """What comes of a request, as it comes. To leave it, or to close it, ends the request."""

    def __init__(
        self,
        parts: AsyncGenerator[dict[str, Any], None],
        drop: Callable[[], None],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._parts, self._drop, self._loop = parts, drop, loop
        self._has_begun = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> dict[str, Any]:
        self._has_begun = True
        return await anext(self._parts)

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
        await self._parts.aclose()
        if not self._has_begun:  # else the generator does it
            self._has_begun = True
            self._drop()

    def __del__(self) -> None:
        # The collector comes at any place, in any thread, and maybe inside of a lock that this takes.
        if not self._has_begun and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._drop)
