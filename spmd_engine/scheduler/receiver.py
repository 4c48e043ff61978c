"""In what order calls take effect, the same on all ranks: the `receiver` of SGLang's event loop.

Each rank hands its collective call to its own scheduler process; the processes agree on it over their links before any
of them acts. While a rollout runs nothing else can arrive, so no message is exchanged; while nothing runs, the process
sleeps in a blocking receive.

Requests beside others come from the trainer of the first rank alone. As long as some of them run, its scheduler process
tells the others at each turn of the loop what is new (`tickets.py`); it does not wait for them. A collective call takes
its turn once they have finished, or are paused.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from dataclasses import replace
from typing import Any, NoReturn

from spmd_engine.control.agreement import verdict
from spmd_engine.control.channel import Channel, ChannelClosed
from spmd_engine.control.digest import digest
from spmd_engine.control.framing import Frame
from spmd_engine.control.links import Interjection, Links, LinkTimeout, PeerGone
from spmd_engine.control.messages import Call, Coming, Descriptors, LinkAddress, Phase, Reply, Shutdown, Start
from spmd_engine.errors import EngineBusyError, ErrorReport, SpmdEngineError
from spmd_engine.planning.layout import first_difference
from spmd_engine.scheduler.adapter import memory as sglang_memory
from spmd_engine.scheduler.adapter import model as sglang_model
from spmd_engine.scheduler.adapter import requests as sglang_requests
from spmd_engine.scheduler.async_requests import Service
from spmd_engine.scheduler.explain import survey
from spmd_engine.scheduler.memory import MemoryKeeper
from spmd_engine.scheduler.step_commands import Ticket
from spmd_engine.scheduler.watchdog import Watchdog
from spmd_engine.scheduler.weights import WeightsKeeper

_DEPARTURE_GRACE_S = 1.0
# Calls that all replicas which share weights make together.
_WIDE = ("update_weights", "explain", "refused")
# On a GPU machine, where cores are many: ranks reach an update, and finish it, within a few milliseconds.
_SPIN_S = 0.005


class Feed:
    """Receives calls from the trainer rank and turns them into requests for SGLang's Scheduler."""

    def __init__(self, start: Start, channel: Channel, links: Links, watchdog: Watchdog) -> None:
        self._is_hub = start.rank == start.link.ranks[0]
        self._service = Service(start, channel)
        self.outputs = self._service.outputs
        self._start, self._channel, self._watchdog = start, channel, watchdog
        self._links = {start.link.ranks: links}
        self._replica = start.link.ranks
        self._either = select.poll()  # on members: the trainer, or the first rank
        for fd in (channel.fileno(), *(sock.fileno() for sock in links.data.values())):
            self._either.register(fd, select.POLLIN)
        self._spin_s = 0.0 if start.on_cpu else _SPIN_S
        self._running: Call | None = None  # a rollout
        self._pending: Call | None = None  # a collective call that has come and has not begun
        self._is_coming = False  # a weight update, at once
        self._hub_has_left = False
        watchdog.is_generating = lambda: self._running is not None or bool(self.outputs.served)

    def attach(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._weights = WeightsKeeper(scheduler, self._start, self._channel)
        self._memory = MemoryKeeper(scheduler, self._start, self._weights.device, unmap=self._weights.unmap)
        self._service.attach(scheduler, self._weights, self._memory)

    def foresee(self) -> None:
        """Do what the first weight update will need and the trainer's first call need not wait for."""
        self._weights.foresee()

    def memory(self) -> dict[str, int]:
        """Bytes that the engine holds on its device, by tag."""
        return self._memory.held()

    def recv_requests(self, local_reqs: Any = None) -> list[Any]:
        """Called by SGLang at each turn of its event loop: what to begin now. Blocks while there is nothing to do."""
        if self._running is not None:
            if not self.outputs.complete:
                # What comes takes its turn later, but is read now: the trainer's event loop must not wait for room.
                while self._is_hub and self._channel.is_readable():
                    self._take_message()
                return []
            call, self._running = self._running, None
            self._finish(call)
        if self._service.is_paused:
            self.outputs.catch_up(sglang_requests.paused_requests(self._scheduler))
        elif self.outputs.served:
            return self._service.apply(self._ticket_of_this_turn())
        # Turns of the loop that only drain SGLang's own pipeline.
        elif not self._scheduler.is_fully_idle():
            return []
        while True:
            item = self._next_call()
            if isinstance(item, Ticket):
                return self._service.apply(item)
            try:
                batch = self._perform(item)
            except Interjection as first:
                return self._service.apply(_as_ticket(first.frame))
            except SpmdEngineError as error:
                self._pending = None
                self._weights.withdraw()
                self._reply(item, error=ErrorReport(type(error).__name__, str(error), self._start.rank))
                continue
            self._pending = None
            self._weights.withdraw()
            if batch is not None:
                self._running = item
                return [batch]

    # ---- requests beside others ----

    def _ticket_of_this_turn(self) -> Ticket:
        """What is new while requests run."""
        if not self._is_hub:
            while (frame := self._wait_for_either()) is None:
                pass
            return _as_ticket(frame)
        while self._channel.is_readable():
            self._take_message()
        self._service.admit(behind_call=self._pending is not None)
        self._service.show_progress()
        return self._issue()

    def _issue(self) -> Ticket:
        """Tell the other ranks of the next ticket."""
        self._check_all_here()
        ticket = self._service.take_ticket()
        try:
            self._links[self._replica].tell(*ticket.to_frame())
        except (PeerGone, LinkTimeout) as error:
            self._broken(error, "requests that run beside others")
        return ticket

    def _check_all_here(self) -> None:
        """No rank of the replica may have shut its engine down when requests begin or go on."""
        for rank in sorted(self._watchdog.departed.intersection(self._replica)):
            message = f"rank {rank} has shut its engine down: no request can run"
            self._watchdog.die(ErrorReport("EngineClosedError", message, rank))

    def _hold(self, call: Call) -> None:
        """Keep a collective call until no request runs; an update may say that they shall not run that long."""
        self._pending, self._is_coming = call, False
        if call.kind in ("agree", "update_weights") and self._is_hub:
            self._service.make_way(call.payload["running"])

    # ---- one call ----

    def _next_call(self) -> Call | Ticket:
        """What comes next while nothing runs: a collective call, or requests beside others."""
        while True:
            self._service.admit(behind_call=self._pending is not None)
            if self._pending is None:
                self._service.resume_if_wanted()
            if self._service.has_news:
                return self._issue()
            if self._pending is not None:
                return self._pending
            if self._is_hub or self._hub_has_left:
                self._take_message()
            elif (frame := self._wait_for_either()) is not None:
                return _as_ticket(frame)

    def _wait_for_either(self) -> Frame | None:
        """Wait for the first rank, whose frame is returned, or for the trainer, whose message is taken."""
        links = self._links[self._replica]
        hub = links.data[links.hub]
        end = time.monotonic() + (self._spin_s if self._is_coming else 0.0)
        while not (ready := self._either.poll(0)) and time.monotonic() < end:
            pass
        if hub.fileno() not in (fd for fd, _ in ready or self._either.poll()):
            self._take_message()
            return None
        try:
            return links.hear(timeout_s=self._start.timeout_s)
        except PeerGone as error:
            if self.outputs.served or not self._has_departed(error.rank):
                self._broken(error, "no call")
            self._hub_has_left = True  # whoever calls next will hear of it
            return None
        except LinkTimeout as error:
            self._broken(error, "no call")

    def _has_departed(self, rank: int) -> bool:
        """Whether a rank whose link is closed has shut its engine down: it says so on another way."""
        deadline = time.monotonic() + _DEPARTURE_GRACE_S
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
        elif isinstance(message, LinkAddress):
            self._join(message, fds)
        elif isinstance(message, Coming):
            self._is_coming = True
            if not self.outputs.served:
                self._weights.inspect()
        elif isinstance(message, Descriptors):
            self._weights.offer(message.counts, socket.socket(fileno=fds[0]))
        elif isinstance(message, Call):
            self._hold(message)
        else:
            self._service.take(message, behind_call=self._pending is not None)

    def _perform(self, call: Call) -> Any:
        """Agree on `call` with the other ranks and do it; a batch for SGLang if it is a rollout."""
        self._enter(call, "wait")
        began = time.monotonic()
        wide = tuple(call.payload["ranks"]) if call.kind in _WIDE and call.payload else ()
        agreement = {
            "kind": call.kind,
            "digest": call.digest,
            "summary": call.summary,
            "overlapped": call.overlapped,
            "wide": wide,
            "refusal": _as_pair(self._refusal(call)),
            "tokens": self.outputs.digest(),
            "number": call.payload["number"] if call.kind == "agree" else 0,
        }
        news, places = self._weights.announce(call.payload) if call.kind == "update_weights" else ({}, b"")
        frames = self._exchange(self._replica, {**agreement, **news}, places, call)
        error = self._verdict(self._replica, frames, call)
        if len({header["tokens"] for header, _ in frames}) > 1:
            self._diverged("requests that ran")
        wide = max((tuple(header["wide"]) for header, _ in frames), key=len)  # a refusing rank may not know its peers
        if wide and wide != self._replica and wide in self._links:
            # The other replicas are on their way into the same update: they must hear of an error here.
            failed = None if error is None else [error.kind, error.message]
            note = {**agreement, **news, "error": failed, "refusal": None}
            frames = self._exchange(wide, note, places, call)
            error = self._verdict(wide, frames, call) or error
        if error is not None:
            raise error.to_exception()
        if call.kind == "refused":
            self._reply(call)  # the trainer rank knows its own error
            return None
        if call.kind == "agree":
            self._reply(call, value=max(header["number"] for header, _ in frames))
            return None
        if call.kind != "update_weights":
            self._enter(call, "run")
        if call.kind == "generate":
            return self._generate(call)

        def exchange(header: dict[str, Any], blob: bytes) -> list[Frame]:
            return self._exchange(wide, header, blob, call)

        if call.kind == "explain":
            model = sglang_model.model_of(self._scheduler)
            self._reply(call, value=survey(self._weights, model, call.payload, exchange, start=self._start))
            return None
        if call.kind == "update_weights":
            wait_s = time.monotonic() - began

            def enter(phase: str) -> None:
                self._enter(call, phase)

            flush = "kv_cache" not in self._memory.sleeping
            stats = self._weights.update(call.payload, frames, exchange, enter, flush=flush, wait_s=wait_s)
            self.outputs.use_version(self._weights.version)
            self._reply(call, value=stats)
            return None
        if call.kind in ("release_memory_occupation", "resume_memory_occupation"):
            self._occupy(call)
            return None
        if call.kind == "flush_cache":
            if "kv_cache" not in self._memory.sleeping:  # else it is empty
                sglang_memory.flush_cache(self._scheduler)
            self._reply(call)
            return None
        if call.kind == "weight_checksums":
            self._reply(call, value=sglang_model.checksums(self._scheduler))
            return None
        raise SpmdEngineError(f"unknown call {call.kind!r}")

    def _verdict(self, ranks: tuple[int, ...], frames: list[Frame], call: Call) -> ErrorReport | None:
        """As `verdict`; where the ranks describe their weights differently, the first that differs is named."""
        error = verdict(ranks, frames)
        is_of_layouts = {header["kind"] for header, _ in frames} in ({"update_weights"}, {"explain"})
        was_known = any(header.get("error") for header, _ in frames)
        if error is None or error.kind != "CollectiveMismatchError" or was_known or not is_of_layouts:
            return error
        plain = json.dumps(self._weights.layout_of(call.payload).plain())
        told = self._exchange(ranks, {}, plain.encode(), call)
        difference = first_difference({rank: json.loads(blob) for rank, (_, blob) in zip(ranks, told, strict=True)})
        return replace(error, message=f"{error.message}. Here {difference}") if difference else error

    def _refusal(self, call: Call) -> SpmdEngineError | None:
        """Why a call cannot be made now."""
        if call.kind == "generate" and self._service.is_paused:
            return EngineBusyError("requests are paused: call resume() before generate")
        return self._memory.refusal(call.kind, call.payload)

    def _diverged(self, what: str) -> NoReturn:
        """End the engine: prefix caches that differ would let the ranks' collectives wait for one another."""
        message = (
            f"the TP ranks {list(self._replica)} generated different tokens in {what}; "
            "set SYNC_TOKEN_IDS_ACROSS_TP=1 if the hardware is not deterministic"
        )
        self._watchdog.die(ErrorReport("SchedulerError", message, self._start.rank))

    def _generate(self, call: Call) -> Any:
        requests = call.payload
        self._weights.check_consistent()
        rids = [f"{call.seq}-{i}" for i in range(len(requests))]
        made = [sglang_requests.make_request(r, rid, self._scheduler) for r, rid in zip(requests, rids, strict=True)]
        self._weights.is_inspected = False
        self.outputs.expect(rids, [request.return_logprob for request in requests], self._weights.version)
        return sglang_requests.make_batch(made)

    def _occupy(self, call: Call) -> None:
        """Release or resume memory, and answer with the tags that sleep now."""

        def barrier(header: dict[str, Any]) -> list[dict[str, Any]]:
            return [answer for answer, _ in self._exchange(self._replica, header, b"", call)]

        if not self._start.keeps_mapped:
            self._weights.unmap()
        if call.kind == "resume_memory_occupation":
            self._memory.resume(call.payload, barrier)
        elif "weights" in self._memory.release(call.payload, barrier) and not self._memory.keeps_weights:
            self._weights.lose_contents()
        self._reply(call, value=(self._memory.sleeping, self._memory.held()))

    def _finish(self, call: Call) -> None:
        """Answer a rollout once all ranks have finished it, so that none can leave while another still needs it."""
        self._enter(call, "commit")
        results = self.outputs.take()
        tokens = digest([result.output_ids for result in results])
        frames = self._exchange(self._replica, {"tokens": tokens}, b"", call)
        if len({header["tokens"] for header, _ in frames}) > 1:
            self._diverged(call.summary)
        self._reply(call, value=results)

    def _enter(self, call: Call, phase: str) -> None:
        if call.is_traced:
            with contextlib.suppress(ChannelClosed):
                self._channel.send(Phase(phase))

    def _reply(self, call: Call, *, value: Any = None, error: ErrorReport | None = None) -> None:
        with contextlib.suppress(ChannelClosed):  # the watchdog sees a trainer that is gone
            self._channel.send(Reply(seq=call.seq, value=value, error=error))

    # ---- the other ranks ----

    def _join(self, address: LinkAddress, fds: tuple[int, ...]) -> None:
        if address.listener_fd >= 0:
            address = LinkAddress(**{**vars(address), "listener_fd": fds[0]})
        try:
            links = Links(self._start.rank, address, timeout_s=self._start.timeout_s)
        except (PeerGone, LinkTimeout) as error:
            self._broken(error, "the first update_weights")
        self._links[address.ranks] = links
        self._watchdog.add_links(links)

    def _exchange(self, ranks: tuple[int, ...], header: dict[str, Any], blob: bytes, call: Call) -> list[Frame]:
        spin_s = self._spin_s if call.kind == "update_weights" else 0.0
        # Requests that come meanwhile are read: the trainer's event loop must not wait for room.
        beside = (self._channel.fileno(), self._take_message) if self._is_hub else None
        try:
            return self._links[ranks].exchange(header, blob, timeout_s=call.timeout_s, spin_s=spin_s, beside=beside)
        except (PeerGone, LinkTimeout) as error:
            self._broken(error, call.summary)

    def _broken(self, error: PeerGone | LinkTimeout, what: str) -> NoReturn:
        """An exchange that one rank could not finish ends the engine on all of them."""
        me = self._start.rank
        if isinstance(error, LinkTimeout):
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


def _as_ticket(frame: Frame) -> Ticket:
    ticket = Ticket.from_frame(frame)
    assert ticket is not None, f"the first rank sent {frame[0]} where a ticket was due"
    return ticket


def _as_pair(error: SpmdEngineError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]
