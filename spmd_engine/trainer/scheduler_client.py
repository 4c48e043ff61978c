"""How a trainer rank makes a collective call of its scheduler process, and what it makes of every way that can fail."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from spmd_engine.control.channel import ChannelTimeout
from spmd_engine.control.digest import digest
from spmd_engine.control.messages import Call, Failed, Phase, Ready, Reply
from spmd_engine.errors import CollectiveTimeoutError, EngineClosedError, SchedulerDiedError, SpmdEngineError
from spmd_engine.trainer import tracing
from spmd_engine.trainer.process import ProcessDied, SchedulerProcess
from spmd_engine.trainer.rendezvous import Rendezvous, bounded

logger = logging.getLogger(__name__)

# The scheduler process times out by itself first, with more to say; this is for one that hangs.
_REPLY_MARGIN_S = 5.0
_STOP_GRACE_S = 5.0
# How long to look for a better explanation of a failure, which another rank may have.
_CAUSE_S = 3.0
_LOOK_S = 0.5


class KnownToAllError(Exception):
    """What all ranks of the replica know: no call need tell them.

    Attributes:
        error: of the engine.
    """

    def __init__(self, error: SpmdEngineError) -> None:
        super().__init__(str(error))
        self.error = error


class Caller:
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
        self._rank, self._process, self._rendezvous = rank, process, rendezvous
        self._lock = threading.Lock()  # of whoever reads the channel: a call, or `poll`
        self._calls = 0  # that run, or wait for one that does
        self._count_lock = threading.Lock()
        self._dead: SpmdEngineError | None = None
        self._owner_pid = os.getpid()
        self.on_message: Callable[[object], None] = lambda message: None
        self.on_end: Callable[[Exception], None] = lambda error: None
        self.before_send: Callable[[], None] = lambda: None
        self._finalizer = weakref.finalize(self, process.stop, grace_s=0.0)

    def call(
        self,
        kind: str,
        prepare: Callable[[], tuple[Any, str]],
        *,
        as_payload: Callable[[Any], Any] = lambda made: made,
        as_digest: Callable[[Any], Any] | None = None,
        refusal_payload: Callable[[], Any] = lambda: None,
        notice: object = None,
        prepare_span: str = "prepare",
        spin_s: float = 0.0,
    ) -> tuple[Any, Any]:
        """Make one collective call. Returns what `prepare` built, and the reply's value.

        Args:
            kind: of the call.
            prepare: builds the arguments, and a line for messages. It may `agree` with the other ranks.
            as_payload, as_digest: what of them is sent, and what all ranks must have in common; by default all.
            refusal_payload: what is sent if `prepare` raises.
            notice: a message for the scheduler process, sent before `prepare` begins.
            prepare_span: what `prepare` is called in a trace.
            spin_s: seconds to wait for the reply without going to sleep.
        """
        self.check_alive()
        with contextlib.ExitStack() as stack:
            overlapped = stack.enter_context(self._counted()) > 1
            if not self._lock.acquire(timeout=self.timeout_s):
                raise CollectiveTimeoutError(
                    f"rank {self._rank}: {kind} has not begun, since another thread's call of this engine has run for "
                    f"over {self.timeout_s:.0f} s: call the engine from one thread at a time, or raise timeout_s"
                )
            stack.callback(self._lock.release)
            self.check_alive()
            stack.enter_context(tracing.span(kind))
            self.seq += 1
            refusal: Exception | None = None
            known: SpmdEngineError | None = None
            made, payload, reply = None, None, None
            try:
                self.before_send()
                if notice is not None:
                    self._send(notice, kind)
                try:
                    with tracing.span(prepare_span):
                        made, summary = prepare()
                    payload = as_payload(made)
                except KnownToAllError as error:
                    known = error.error
                except CollectiveTimeoutError as error:
                    self.fail(error)
                except ChannelTimeout:
                    self.fail(self._no_answer(kind, self.timeout_s))
                except Exception as error:
                    # The other ranks may be waiting: tell them, so that all of them get an error now.
                    if self._dead is not None:
                        raise
                    refusal, summary = error, f"{kind}(...) refused: {type(error).__name__}: {error}"
                    payload = refusal_payload()
                if known is None:
                    call = Call(
                        seq=self.seq,
                        kind="refused" if refusal else kind,
                        payload=payload,
                        digest=digest(["refused", kind] if refusal else [kind, (as_digest or as_payload)(made)]),
                        summary=summary,
                        overlapped=overlapped,
                        timeout_s=self.timeout_s,
                        is_traced=tracing.is_recording(),
                    )
                    reply = self._exchange(call, kind, spin_s)
            except BaseException as error:
                if self._dead is None:
                    self._interrupted(kind, error)
                raise
            if known is not None:
                raise known
            assert reply is not None
            if reply.error is not None:
                raise reply.error.to_exception()
            if refusal is not None:
                raise refusal
            return made, reply.value

    def agree(self, summary: str, common: Any, *, number: int, running: str) -> int:
        """Within `prepare`: wait until all ranks of the replica are there, before this one waits for ranks of others.

        Args:
            summary: of the call, for messages.
            common: what all ranks must have in common.
            number: that this rank proposes.
            running: what becomes of requests that run; see `SpmdEngine.update_weights`.

        Returns:
            The highest number that any rank proposes.

        Raises:
            KnownToAllError: they are not: another rank made another call.
        """
        call = Call(
            seq=self.seq,
            kind="agree",
            payload={"running": running, "number": number},
            digest=digest(["agree", common]),
            summary=summary,
            overlapped=False,
            timeout_s=self.timeout_s,
            is_traced=False,
        )
        reply = self._exchange(call, summary, 0.0)
        if reply.error is not None:
            raise KnownToAllError(reply.error.to_exception())
        return int(reply.value)

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
            ready: Ready = self.receive(
                lambda message: isinstance(message, Ready), self.timeout_s, "start", look_s=_LOOK_S
            )
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
            self.fail(self._no_answer(phase, self.timeout_s))

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
                self.fail(self._own_death(phase))
            if isinstance(message, Failed):
                self.fail(self._peer_failure(message))
            take(message)

    def _exchange(self, call: Call, kind: str, spin_s: float) -> Reply:
        def hear(message: Any) -> bool:
            if isinstance(message, Phase):
                spans.begin(message.name)
            return isinstance(message, Reply) and message.seq == call.seq

        with tracing.Spans() as spans:
            self._send(call, kind)
            reply: Reply = self.receive(hear, self.timeout_s + _REPLY_MARGIN_S, kind, spin_s=spin_s)
            return reply

    def _interrupted(self, kind: str, error: BaseException) -> None:
        """End the process after Ctrl-C, say: a message may be half sent or half read, or shards half copied."""
        cause = f"{kind} of rank {self._rank} was interrupted by {type(error).__name__}"
        self._dead = EngineClosedError(f"{cause}; call restart(), or make a new SpmdEngine")
        self.on_end(self._dead)
        try:
            bounded(lambda: self._rendezvous.post(f"died/{self._rank}", {"cause": cause}), timeout_s=_CAUSE_S)
        finally:
            self._process.stop(grace_s=0.0)
            self._finalizer.detach()

    def receive(
        self,
        wanted: Callable[[Any], bool],
        timeout_s: float,
        phase: str,
        *,
        spin_s: float = 0.0,
        look_s: float = math.inf,
    ) -> Any:
        """The next wanted message; each `look_s` seconds without one, look whether another rank's process has died."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                message = self._process.recv(timeout_s=min(left_s, look_s), spin_s=spin_s)
            except ProcessDied:
                self.fail(self._own_death(phase))
            except ChannelTimeout:
                if left_s <= look_s:
                    self.fail(self._no_answer(phase, timeout_s))
                self._check_others(phase)
                continue
            if isinstance(message, Failed):
                self.fail(self._peer_failure(message))
            if wanted(message):
                return message
            self.on_message(message)

    def stop(self) -> None:
        """End the process, if it has not ended yet. Later calls raise EngineClosedError."""
        if self._dead is None:
            self._dead = EngineClosedError(f"the engine of rank {self._rank} was shut down; make a new SpmdEngine")
            self.on_end(self._dead)
            self._process.stop(grace_s=_STOP_GRACE_S)
            self._finalizer.detach()

    def check_failed(self) -> None:
        """Raise if the scheduler process has ended or reported a failure meanwhile."""
        self._take_all(self.on_message, "update_weights")

    def _own_death(self, phase: str) -> SchedulerDiedError:
        status = self._process.wait(5.0)
        report = {"exit_status": status, "log_tail": self._process.log_tail()}
        bounded(lambda: self._rendezvous.post(f"died/{self._rank}", report), timeout_s=_CAUSE_S)
        return _died(self._rank, f"the scheduler process of rank {self._rank} ended during {phase}", report)

    def _check_others(self, phase: str) -> None:
        """Raise if the process of another rank has died: until they are linked, the processes do not notice it."""
        for rank in self._rendezvous.ranks:
            if rank != self._rank:
                report = bounded(partial(self._rendezvous.poll, f"died/{rank}"), timeout_s=_CAUSE_S)
                if report is not None:
                    self.fail(_died(rank, f"the scheduler process of rank {rank} ended during {phase}", report))

    def _peer_failure(self, message: Failed) -> SpmdEngineError:
        error = message.error.to_exception()
        if isinstance(error, SchedulerDiedError):
            rank = error.rank
            report = bounded(lambda: _await_key(self._rendezvous, f"died/{rank}", _CAUSE_S), timeout_s=_CAUSE_S)
            return _died(rank, str(error), report or {})
        return error

    def _no_answer(self, phase: str, timeout_s: float) -> CollectiveTimeoutError:
        """Why a scheduler process says nothing: it, or one that it waits for, is stopped; or it is not known."""
        mine = {"is_stopped": self._process.is_stopped(), "pid": self._process.pid}
        bounded(lambda: self._rendezvous.post(f"hung/{self._rank}", mine), timeout_s=_CAUSE_S)
        reports = {self._rank: mine}
        if not mine["is_stopped"]:  # this rank's process may wait for another one, whose rank finds out about now
            reports.update(bounded(self._reports_of_others, timeout_s=2 * _CAUSE_S) or {})
        stopped = [(rank, report["pid"]) for rank, report in reports.items() if report["is_stopped"]]
        cause = "".join(f"; that of rank {rank} (pid {pid}) is stopped (SIGSTOP, a debugger)" for rank, pid in stopped)
        return CollectiveTimeoutError(
            f"rank {self._rank}: its scheduler process (pid {self._process.pid}) gave no answer to {phase} within "
            f"{timeout_s:.0f} s{cause}. End of its log:\n{self._process.log_tail()}"
        )

    def _reports_of_others(self) -> dict[int, dict[str, Any]]:
        """What the other ranks say of their processes, until one of them is stopped, or all have."""
        missing = {rank for rank in self._rendezvous.ranks if rank != self._rank}
        reports: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + _CAUSE_S
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if (report := self._rendezvous.poll(f"hung/{rank}")) is not None:
                    reports[rank] = report
                    missing.discard(rank)
                    if report["is_stopped"]:
                        return reports
            time.sleep(0.02)
        return reports

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


def copy_of(error: Exception) -> Exception:
    """One more of the same kind: an exception that several raise would collect the tracebacks of all of them."""
    copy = type(error)(*error.args)
    vars(copy).update(vars(error))
    return copy


def _died(rank: int, what: str, report: Mapping[str, Any]) -> SchedulerDiedError:
    status, tail = report.get("exit_status"), str(report.get("log_tail", ""))
    how = "" if status is None else f" ({'signal ' + str(-status) if status < 0 else 'exit status ' + str(status)})"
    text = f"{what}{how}"
    if "cause" in report:
        text += f": {report['cause']}"
    if tail:
        text += f". End of its log:\n{tail}"
    return SchedulerDiedError(text, rank=rank, exit_status=status, log_tail=tail)


def _await_key(rendezvous: Rendezvous, key: str, timeout_s: float) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout_s
    while (found := rendezvous.poll(key)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
