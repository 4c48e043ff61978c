"""Decides in which order calls take effect, the same on all ranks: the `receiver` of SGLang's event loop.

Each rank hands its collective call to its own scheduler process; the processes agree on it before any of them acts.
While a rollout runs nothing else takes effect, so the ranks tell each other nothing; while nothing runs, the process
sleeps in a blocking receive.

Requests of `async_generate` come from the leader's trainer alone. As long as some of them run, the leader's scheduler
process, the root, broadcasts at each turn of the loop what is new (`step_commands.py`); it does not wait for the
others. A collective call takes its turn once these requests have finished, or are paused.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from functools import partial
from typing import Any, NoReturn, TypeVar

import msgspec

from spmd_engine.control import codec, timeouts
from spmd_engine.control.agreement import AllGather, Announcement, verdict
from spmd_engine.control.calls import Answer, Generated, Meet, Refuse, UpdateWeights
from spmd_engine.control.channel import Channel, ChannelClosed
from spmd_engine.control.digest import digest
from spmd_engine.control.messages import (
    Call,
    Coming,
    Descriptors,
    GroupAddress,
    Phase,
    Reply,
    Shutdown,
    Start,
    ToScheduler,
)
from spmd_engine.control.peer_group import BroadcastFirst, PeerGone, PeerGroup, PeerTimeout
from spmd_engine.errors import ErrorReport, SpmdEngineError
from spmd_engine.planning.layout import first_difference
from spmd_engine.scheduler.adapter import requests as sglang_requests
from spmd_engine.scheduler.async_requests import AsyncRequests
from spmd_engine.scheduler.calls import Handlers, Rollout, Turn
from spmd_engine.scheduler.memory import MemoryKeeper
from spmd_engine.scheduler.step_commands import StepCommands
from spmd_engine.scheduler.watchdog import Watchdog
from spmd_engine.scheduler.weights import NO_NEWS, UpdateNews, WeightsKeeper

M = TypeVar("M")


class _Entry(msgspec.Struct, frozen=True):
    """What a rank tells the others when it enters a call."""

    announced: Announcement
    news: UpdateNews


class _Tokens(msgspec.Struct, frozen=True):
    """Digest of the tokens that a rollout has made on a rank."""

    digest: str


class Receiver:
    """Receives calls from the trainer rank and turns them into requests for SGLang's Scheduler.

    Args:
        start: of this process.
        channel: to the trainer.
        replica: the scheduler processes of this replica.
        watchdog: of this process.
    """

    def __init__(self, start: Start, channel: Channel[ToScheduler], replica: PeerGroup, watchdog: Watchdog) -> None:
        self._is_root = start.rank == replica.root
        self._requests = AsyncRequests(start, channel)
        self.outputs = self._requests.outputs
        self._start, self._channel, self._watchdog = start, channel, watchdog
        self._groups = {replica.ranks: replica}
        self._replica = replica.ranks
        self._either = select.poll()  # on members: the trainer, or the root
        for fd in (channel.fileno(), *(sock.fileno() for sock in replica.data.values())):
            self._either.register(fd, select.POLLIN)
        self._spin_s = 0.0 if start.on_cpu else timeouts.SCHEDULER_SPIN_S
        self._running: Call | None = None  # a rollout
        self._pending: Call | None = None  # a collective call that has come and has not begun
        self._is_coming = False  # a weight update, at once
        self._root_has_left = False
        watchdog.is_generating = lambda: self._running is not None or bool(self.outputs.served)

    def attach(self, scheduler: Any) -> None:
        """Take SGLang's scheduler, which was made with this as its receiver."""
        self._scheduler = scheduler
        self._weights = WeightsKeeper(scheduler, self._start, self._channel)
        self._memory = MemoryKeeper(scheduler, self._start, self._weights.device, unmap=self._weights.unmap)
        self._requests.attach(scheduler, self._weights, self._memory)
        self._handlers = Handlers(scheduler, self._start, self._weights, self._memory, self._requests)

    def prerecord(self) -> None:
        """Do what the first weight update will need and the trainer's first call need not wait for."""
        self._weights.prerecord()

    def memory(self) -> dict[str, int]:
        """Bytes that the engine holds on its device, by tag."""
        return self._memory.held()

    def recv_requests(self, local_reqs: Any = None) -> list[Any]:
        """Called by SGLang at each turn of its event loop: what to begin now. Blocks while there is nothing to do."""
        if self._running is not None:
            if not self.outputs.complete:
                # What comes takes its turn later, but is read now: the trainer's event loop must not wait for room.
                while self._is_root and self._channel.is_readable():
                    self._take_message()
                return []
            call, self._running = self._running, None
            self._finish(call)
        if self._requests.is_paused:
            self.outputs.catch_up(sglang_requests.paused_requests(self._scheduler))
        elif self.outputs.served:
            return self._apply(self._commands_of_this_turn())
        # Turns of the loop that only drain SGLang's own pipeline.
        elif not self._scheduler.is_fully_idle():
            return []
        while True:
            item = self._next_call()
            if isinstance(item, StepCommands):
                return self._apply(item)
            made: Answer | Rollout | ErrorReport
            try:
                made = self._perform(item)
            except BroadcastFirst as first:
                return self._apply(codec.decode(first.data, StepCommands))
            except SpmdEngineError as error:
                made = ErrorReport(type(error).__name__, str(error), self._start.rank)
            self._pending = None
            self._weights.withdraw()
            if isinstance(made, Rollout):
                self._running = item
                self._weights.parameters_may_change()
                return [made.batch]
            if isinstance(made, ErrorReport):
                self._reply(Reply(item.seq, error=made))
            else:
                self._reply(Reply(item.seq, made))

    # ---- requests of async_generate ----

    def _apply(self, commands: StepCommands) -> list[Any]:
        self._weights.parameters_may_change()
        return self._requests.apply(commands)

    def _commands_of_this_turn(self) -> StepCommands:
        """What is new while requests run."""
        if not self._is_root:
            while (commands := self._wait_for_either()) is None:
                pass
            return commands
        while self._channel.is_readable():
            self._take_message()
        self._requests.admit(behind_call=self._pending is not None)
        self._requests.show_progress()
        return self._issue()

    def _issue(self) -> StepCommands:
        """Tell the other ranks of the next commands."""
        self._check_all_here()
        commands = self._requests.take_commands()
        try:
            self._groups[self._replica].broadcast(commands)
        except (PeerGone, PeerTimeout) as error:
            self._broken(error, "requests of async_generate")
        return commands

    def _check_all_here(self) -> None:
        """No rank of the replica may have shut its engine down when requests begin or go on."""
        for rank in sorted(self._watchdog.departed.intersection(self._replica)):
            message = f"rank {rank} has shut its engine down: no request can run"
            self._watchdog.die(ErrorReport("EngineClosedError", message, rank))

    def _hold(self, call: Call) -> None:
        """Keep a collective call until no request runs; an update may say that they shall not run that long."""
        self._pending, self._is_coming = call, False
        if isinstance(call.body, (Meet, UpdateWeights)) and self._is_root:
            self._requests.make_way(call.body.running)

    # ---- one call ----

    def _next_call(self) -> Call | StepCommands:
        """What comes next while nothing runs: a collective call, or requests of async_generate."""
        while True:
            self._requests.admit(behind_call=self._pending is not None)
            if self._pending is None:
                self._requests.resume_if_wanted()
            if self._requests.has_commands:
                return self._issue()
            if self._pending is not None:
                return self._pending
            if self._is_root or self._root_has_left:
                self._take_message()
            elif (commands := self._wait_for_either()) is not None:
                return commands

    def _wait_for_either(self) -> StepCommands | None:
        """Wait for the root, whose commands are returned, or for the trainer, whose message is taken."""
        group = self._groups[self._replica]
        root = group.data[group.root]
        end = time.monotonic() + (self._spin_s if self._is_coming else 0.0)
        while not (ready := self._either.poll(0)) and time.monotonic() < end:
            pass
        if root.fileno() not in (fd for fd, _ in ready or self._either.poll()):
            self._take_message()
            return None
        try:
            return group.recv_broadcast(StepCommands, timeout_s=self._start.timeout_s)
        except PeerGone as error:
            if self.outputs.served or not self._has_departed(error.rank):
                self._broken(error, "no call")
            self._root_has_left = True  # whoever calls next will hear of it
            return None
        except PeerTimeout as error:
            self._broken(error, "no call")

    def _has_departed(self, rank: int) -> bool:
        """Whether a rank whose connection is closed has shut its engine down: it says so on another way."""
        deadline = time.monotonic() + timeouts.GOODBYE_S
        while rank not in self._watchdog.departed and time.monotonic() < deadline:
            time.sleep(0.01)
        return rank in self._watchdog.departed

    def _take_message(self) -> None:
        """Wait for a message from the trainer, and do what it says or remember it."""
        try:
            message, fds = self._channel.recv(spin_s=self._spin_s if self._is_coming else 0.0)
        except ChannelClosed:
            self._watchdog.die(ErrorReport("SchedulerDiedError", "the trainer closed its channel", self._start.rank))
        if isinstance(message, Shutdown):
            self._watchdog.leave()
        elif isinstance(message, GroupAddress):
            self._join(message, fds)
        elif isinstance(message, Coming):
            self._is_coming = True
            if not self.outputs.served:
                self._weights.drop_stale_plans()
        elif isinstance(message, Descriptors):
            self._weights.offer(message.counts, socket.socket(fileno=fds[0]))
        elif isinstance(message, Call):
            self._hold(message)
        else:
            self._requests.take(message, behind_call=self._pending is not None)

    def _perform(self, call: Call) -> Answer | Rollout:
        """Agree on `call` with the other ranks, and make it."""
        self._enter(call, "wait")
        began = time.monotonic()
        body = call.body
        refusal = self._handlers.refusal(body)
        mine = Announcement(
            call=body.name,
            digest=call.digest,
            summary=call.summary,
            is_overlapped=call.is_overlapped,
            ranks=body.ranks,
            refusal=None if refusal is None else ErrorReport(type(refusal).__name__, str(refusal), self._start.rank),
            tokens=self.outputs.digest(),
        )
        news = self._weights.announce(body) if isinstance(body, UpdateWeights) else NO_NEWS
        entries = self._gather(_Entry(mine, news), self._replica, call)
        error = self._verdict(self._replica, entries, call)
        if len({entry.announced.tokens for entry in entries}) > 1:
            self._diverged("requests that ran")
        # A rank that refuses may not know its peers in other replicas.
        ranks = max((entry.announced.ranks for entry in entries), key=len)
        if ranks and ranks != self._replica and ranks in self._groups:
            # The other replicas are on their way into the same update: they must hear of an error here.
            told = msgspec.structs.replace(mine, error=error, refusal=None)
            entries = self._gather(_Entry(told, news), ranks, call)
            error = self._verdict(ranks, entries, call) or error
        if error is not None:
            raise error.to_exception()
        if not isinstance(body, (Meet, Refuse, UpdateWeights)):
            self._enter(call, "run")
        turn = Turn(
            seq=call.seq,
            gather=self._all_gather(ranks or self._replica, call),
            gather_replica=self._all_gather(self._replica, call),
            news=[entry.news for entry in entries],
            enter=partial(self._enter, call),
            wait_s=time.monotonic() - began,
        )
        return self._handlers.make(body, turn)

    def _verdict(self, ranks: tuple[int, ...], entries: list[_Entry], call: Call) -> ErrorReport | None:
        """As `verdict`; where the ranks describe their weights differently, the first that differs is named."""
        announced = [entry.announced for entry in entries]
        error = verdict(ranks, announced)
        calls = {one.call for one in announced}
        is_of_layouts = calls in ({"update_weights"}, {"explain"}) and all(one.error is None for one in announced)
        if error is None or error.kind != "CollectiveMismatchError" or not is_of_layouts:
            return error
        layout = self._weights.layout_of(call.body)
        difference = first_difference(dict(zip(ranks, self._gather(layout, ranks, call), strict=True)))
        message = f"{error.message}. Here {difference}" if difference else error.message
        return ErrorReport(error.kind, message, error.rank)

    def _diverged(self, what: str) -> NoReturn:
        """End the engine: prefix caches that differ would let the ranks' collectives wait for one another."""
        message = (
            f"the TP ranks {list(self._replica)} generated different tokens in {what}; "
            "set SYNC_TOKEN_IDS_ACROSS_TP=1 if the hardware is not deterministic"
        )
        self._watchdog.die(ErrorReport("SchedulerError", message, self._start.rank))

    def _finish(self, call: Call) -> None:
        """Answer a rollout once all ranks have finished it, so that none can leave while another still needs it."""
        self._enter(call, "commit")
        outputs = self.outputs.take()
        tokens = _Tokens(digest([output.output_ids for output in outputs]))
        if len(set(self._gather(tokens, self._replica, call))) > 1:
            self._diverged(call.summary)
        self._reply(Reply(call.seq, Generated(outputs)))

    def _enter(self, call: Call, phase: str) -> None:
        if call.is_traced:
            with contextlib.suppress(ChannelClosed):
                self._channel.send(Phase(phase))

    def _reply(self, reply: Reply) -> None:
        with contextlib.suppress(ChannelClosed):  # the watchdog sees a trainer that is gone
            self._channel.send(reply)

    # ---- the other ranks ----

    def _join(self, address: GroupAddress, fds: tuple[int, ...]) -> None:
        if address.listener_fd >= 0:
            address = msgspec.structs.replace(address, listener_fd=fds[0])
        try:
            group = PeerGroup(self._start.rank, address, timeout_s=self._start.timeout_s)
        except (PeerGone, PeerTimeout) as error:
            self._broken(error, "the first update_weights")
        self._groups[address.ranks] = group
        self._watchdog.watch(group)

    def _all_gather(self, ranks: tuple[int, ...], call: Call) -> AllGather:
        return lambda message: self._gather(message, ranks, call)

    def _gather(self, message: M, ranks: tuple[int, ...], call: Call) -> list[M]:
        spin_s = self._spin_s if isinstance(call.body, UpdateWeights) else 0.0
        # Requests that come meanwhile are read: the trainer's event loop must not wait for room.
        beside = (self._channel.fileno(), self._take_message) if self._is_root else None
        try:
            return self._groups[ranks].all_gather(message, timeout_s=call.timeout_s, spin_s=spin_s, beside=beside)
        except (PeerGone, PeerTimeout) as error:
            self._broken(error, call.summary)

    def _broken(self, error: PeerGone | PeerTimeout, what: str) -> NoReturn:
        """A message that one rank could not get ends the engine on all of them."""
        me = self._start.rank
        if isinstance(error, PeerTimeout):
            kind = "CollectiveTimeoutError"
            message = (
                f"rank {me} was in {what} and {error}, which did not make the same call or itself waits for a rank"
            )
        else:
            departed = self._has_departed(error.rank)
            kind = "EngineClosedError" if departed else "SchedulerDiedError"
            how = f"rank {error.rank} had shut its engine down" if departed else str(error)
            message = f"rank {me} was in {what}, but {how}"
        self._watchdog.die(ErrorReport(kind, message, error.rank))
        raise AssertionError("die() does not return")
