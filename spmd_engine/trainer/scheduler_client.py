"""Makes collective calls of this rank's scheduler process, and says why one failed, whatever the way."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from spmd_engine.control import timeouts
from spmd_engine.control.calls import Answer, AnyCall, Meet, Met, Refuse
from spmd_engine.control.channel import ChannelTimeout
from spmd_engine.control.codec import EncodeError
from spmd_engine.control.messages import Call, Failed, Phase, Ready, Reply
from spmd_engine.errors import (
    CollectiveTimeoutError,
    EngineClosedError,
    InvalidRequestError,
    SpmdEngineError,
    as_utf8,
)
from spmd_engine.trainer import tracing
from spmd_engine.trainer.failures import Failures, copy_of
from spmd_engine.trainer.process import ProcessDied, SchedulerProcess
from spmd_engine.trainer.rendezvous import Rendezvous

logger = logging.getLogger(__name__)

A = TypeVar("A")


class CollectiveCall:
    """A call that this rank is making: its arguments are being prepared, or it has been sent.

    Attributes:
        name: what users know it by.
        holders: ranks of all replicas that wait in it, as far as they are known; a refusal tells them.
        is_settled: all ranks of the replica know what became of it.
    """

    def __init__(
        self, client: SchedulerClient, name: str, seq: int, spans: tracing.Spans, *, is_overlapped: bool
    ) -> None:
        self.name, self.seq = name, seq
        self.holders: tuple[int, ...] = ()
        self.is_settled = False
        self.is_overlapped = is_overlapped
        self._client, self._spans = client, spans

    def finish(self, body: AnyCall, answer: type[A], *, spin_s: float = 0.0) -> A:
        """Send the call, and wait for its answer.

        Args:
            answer: type of the answer.
            spin_s: seconds to wait for it without going to sleep.

        Raises:
            SpmdEngineError: the call was refused, on all ranks; or the engine has failed.
        """
        found = self._send(body, spin_s)
        assert isinstance(found, answer), f"{self.name} was answered by {found!r}"
        return found

    def meet(self, what: str, group: tuple[int, ...], *, number: int, running: str) -> int:
        """Wait until all ranks of the replica are there, before this one waits for ranks of others.

        Args:
            what: the call, for messages.
            group: ranks that will be connected.
            number: of the meeting that this rank proposes.
            running: what becomes of requests that run; see `SpmdEngine.update_weights`.

        Returns:
            The highest number that any rank proposes.

        Raises:
            CollectiveMismatchError: another rank made another call; all of them know.
        """
        found = self._send(Meet(as_utf8(what), group, number, running), 0.0)
        assert isinstance(found, Met)
        self.is_settled = False
        return found.number

    def refuse(self, reason: Exception) -> None:
        """Tell the other ranks that this one cannot make the call.

        Raises:
            SpmdEngineError: another rank made another call; or the engine has failed.
        """
        self._send(Refuse(self.name, as_utf8(f"{type(reason).__name__}: {reason}"), self.holders), 0.0)

    def check_failed(self) -> None:
        """Raise if the scheduler process has ended or reported a failure meanwhile."""
        self._client.check_failed()

    def _send(self, body: AnyCall, spin_s: float) -> Answer | None:
        self._spans.end()
        reply = self._client.send_call(self, body, self._spans, spin_s)
        self.is_settled = True
        if reply.error is not None:
            raise reply.error.to_exception()
        return reply.answer


class SchedulerClient:
    """One call at a time from this trainer rank to its scheduler process.

    Args:
        rank: global rank of the caller.
        process: its scheduler process, which is ended by any failure.
        rendezvous: where ranks leave word of the death of their processes.
        timeout_s: seconds that a call may take.

    Attributes:
        seq: number of the last call.
        on_message: takes messages that belong to no call.
        on_end: hears the error with which the process ended.
        before_send: is called before a call or a message is sent, for what shall go first.
    """

    def __init__(self, rank: int, process: SchedulerProcess, rendezvous: Rendezvous, timeout_s: float) -> None:
        self.seq = 0
        self.timeout_s = timeout_s
        self._rank, self._process = rank, process
        self._failures = Failures(rank, process, rendezvous)
        self._lock = threading.Lock()  # of whoever reads the channel: a call, or `poll`
        self._calls = 0  # that run, or wait for one that does
        self._count_lock = threading.Lock()
        self._dead: SpmdEngineError | None = None
        self._owner_pid = os.getpid()
        self.on_message: Callable[[object], None] = lambda message: None
        self.on_end: Callable[[Exception], None] = lambda error: None
        self.before_send: Callable[[], None] = lambda: None
        self._finalizer = weakref.finalize(self, process.stop, grace_s=0.0)

    @contextlib.contextmanager
    def collective(self, name: str, *, notice: object = None, span: str = "prepare") -> Iterator[CollectiveCall]:
        """Make one collective call: prepare its arguments inside, and end with `CollectiveCall.finish`.

        An exception inside is told to the other ranks, which wait, so that all of them get an error now.

        Args:
            name: of the call.
            notice: a message for the scheduler process, sent at once.
            span: what the preparation is called in a trace.
        """
        self.check_alive()
        with contextlib.ExitStack() as stack:
            is_overlapped = stack.enter_context(self._counted()) > 1
            if not self._lock.acquire(timeout=self.timeout_s):
                raise CollectiveTimeoutError(
                    f"rank {self._rank}: {name} has not begun, since another thread's call of this engine has run for "
                    f"over {self.timeout_s:.0f} s: call the engine from one thread at a time, or raise timeout_s"
                )
            stack.callback(self._lock.release)
            self.check_alive()
            stack.enter_context(tracing.span(name))
            spans = stack.enter_context(tracing.Spans())
            self.seq += 1
            call = CollectiveCall(self, name, self.seq, spans, is_overlapped=is_overlapped)
            try:
                self.before_send()
                if notice is not None:
                    self._send(notice, name)
                spans.begin(span)
                try:
                    yield call
                except Exception as error:
                    if self._dead is not None or call.is_settled:
                        raise
                    if isinstance(error, CollectiveTimeoutError):
                        self.fail(error)
                    if isinstance(error, ChannelTimeout):
                        self.fail(self._failures.no_answer(name, self.timeout_s))
                    call.refuse(error)
                    raise
            except BaseException as error:
                if self._dead is None and not (call.is_settled and isinstance(error, Exception)):
                    self._interrupted(name, error)
                raise

    def send_call(self, call: CollectiveCall, body: AnyCall, spans: tracing.Spans, spin_s: float) -> Reply:
        """Send a call, and wait for the reply."""
        message = Call(
            seq=call.seq,
            body=body,
            digest=body.digest(),
            summary=body.summary(),
            is_overlapped=call.is_overlapped,
            timeout_s=self.timeout_s,
            is_traced=tracing.is_recording(),
        )

        def hear(heard: object) -> bool:
            if isinstance(heard, Phase):
                spans.begin(heard.name)
            return isinstance(heard, Reply) and heard.seq == call.seq

        try:
            self._send(message, call.name)
        except EncodeError as error:
            raise InvalidRequestError(
                f"an argument of {call.name} cannot be told to another process: {error}"
            ) from error
        reply = self.receive(hear, self.timeout_s + timeouts.REPLY_MARGIN_S, call.name, spin_s=spin_s)
        assert isinstance(reply, Reply)
        return reply

    @contextlib.contextmanager
    def _counted(self) -> Iterator[int]:
        """How many calls there are with this one."""
        with self._count_lock:
            self._calls += 1
            count = self._calls
        try:
            yield count
        finally:
            with self._count_lock:
                self._calls -= 1

    def await_ready(self) -> Ready:
        """Wait until the scheduler process serves."""
        try:
            ready = self.receive(
                lambda message: isinstance(message, Ready), self.timeout_s, "start", look_s=timeouts.LOOK_S
            )
            assert isinstance(ready, Ready)
            return ready
        except BaseException as error:
            if self._dead is None:
                self._interrupted("start", error)
            raise

    def send(self, message: object) -> None:
        """Send a message that is no call, after those that wait for the next one."""
        self.before_send()
        self.send_now(message)

    def send_now(self, message: object) -> None:
        """Send a message that is no call."""
        self._send(message, "asynchronous requests")

    def _send(self, message: object, phase: str) -> None:
        try:
            self._process.send(message)
        except ChannelTimeout:
            self.fail(self._failures.no_answer(phase, self.timeout_s))

    def fileno(self) -> int:
        """Readable when something has come from the process."""
        return self._process.channel.fileno()

    def poll(self, take: Callable[[object], None]) -> bool:
        """Hand over what has come unasked. False if a call in another thread is under way, which does it.

        Raises:
            SpmdEngineError: the process has ended.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self.check_alive()
            self._take_all(take, "asynchronous requests")
        finally:
            self._lock.release()
        return True

    def _take_all(self, take: Callable[[object], None], phase: str) -> None:
        """Hand over all messages that have come. Fails if the process has ended, or says that it ends."""
        while self._process.channel.is_readable():
            try:
                message = self._process.recv(timeout_s=0.0)
            except ProcessDied:
                self.fail(self._failures.own_death(phase))
            if isinstance(message, Failed):
                self.fail(self._failures.peer_failure(message))
            take(message)

    def _interrupted(self, kind: str, error: BaseException) -> None:
        """End the process after Ctrl-C, say: a message may be half sent or half read, or shards half copied."""
        cause = f"{kind} of rank {self._rank} was interrupted by {type(error).__name__}"
        self._dead = EngineClosedError(f"{cause}; call restart(), or make a new SpmdEngine")
        self.on_end(self._dead)
        try:
            self._failures.post("died", {"cause": cause})
        finally:
            self._process.stop(grace_s=0.0)
            self._finalizer.detach()

    def receive(
        self,
        wanted: Callable[[object], bool],
        timeout_s: float,
        phase: str,
        *,
        spin_s: float = 0.0,
        look_s: float = math.inf,
    ) -> object:
        """The next wanted message; each `look_s` seconds without one, look whether another rank's process has died."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                message = self._process.recv(timeout_s=min(left_s, look_s), spin_s=spin_s)
            except ProcessDied:
                self.fail(self._failures.own_death(phase))
            except ChannelTimeout:
                if left_s <= look_s:
                    self.fail(self._failures.no_answer(phase, timeout_s))
                if (error := self._failures.death_of_others(phase)) is not None:
                    self.fail(error)
                continue
            if isinstance(message, Failed):
                self.fail(self._failures.peer_failure(message))
            if wanted(message):
                return message
            self.on_message(message)

    def stop(self) -> None:
        """End the process, if it has not ended yet. Later calls raise EngineClosedError."""
        if self._dead is None:
            self._dead = EngineClosedError(f"the engine of rank {self._rank} was shut down; make a new SpmdEngine")
            self.on_end(self._dead)
            self._process.stop(grace_s=timeouts.STOP_S)
            self._finalizer.detach()

    def check_failed(self) -> None:
        """Raise if the scheduler process has ended or reported a failure meanwhile."""
        self._take_all(self.on_message, "update_weights")

    def fail(self, error: SpmdEngineError) -> NoReturn:
        """End the process, and raise `error`, now and at every later call; the first error if it has ended already."""
        if self._dead is not None:
            raise copy_of(self._dead)
        self._dead = error
        self.on_end(error)
        event = {"event": "failure", "rank": self._rank, "error": type(error).__name__}
        logger.info("rank %d: engine closed: %s", self._rank, error, extra={"spmd_engine": event})
        self._process.stop(grace_s=0.0)
        self._finalizer.detach()
        raise error

    def fail_if_idle(self, error: SpmdEngineError) -> None:
        """`fail`, unless a call in another thread is under way, which has a timeout of its own."""
        if self._lock.acquire(blocking=False):
            try:
                self.fail(error)
            finally:
                self._lock.release()

    def check_owner(self) -> None:
        """Raise in a forked copy of the trainer: what it sent would be mixed with what the trainer sends."""
        if os.getpid() != self._owner_pid:
            raise EngineClosedError(
                f"process {os.getpid()} is a fork of rank {self._rank} (pid {self._owner_pid}): only the trainer "
                "process itself can use its engine"
            )

    def check_alive(self) -> None:
        """Raise what ended the process, if it has ended."""
        self.check_owner()
        if self._dead is not None:
            raise copy_of(self._dead)
