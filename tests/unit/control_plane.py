"""Runs the receivers of several ranks on threads of one process, with a scheduler that makes one token a step.

SGLang and the moving of weights are replaced; the receiver, the requests, the peers, the channels and the watchdog are
the real ones. What ends a process in production ends the threads of a rank here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch

from spmd_engine.control.agreement import Outcome, raise_first
from spmd_engine.control.channel import Channel, ChannelClosed
from spmd_engine.control.messages import Failed, GroupAddress, PauseState, Start, ToScheduler, ToTrainer
from spmd_engine.control.peer_group import PeerGroup, listen
from spmd_engine.errors import ErrorReport, InvalidRequestError
from spmd_engine.scheduler import receiver as receiver_module
from spmd_engine.scheduler import watchdog as watchdog_module
from spmd_engine.scheduler.adapter import memory as sglang_memory
from spmd_engine.scheduler.adapter import requests as sglang_requests
from spmd_engine.scheduler.receiver import Receiver
from spmd_engine.scheduler.watchdog import Watchdog
from spmd_engine.scheduler.weights import UpdateNews
from spmd_engine.stats import UpdateStats

BOUND_S = 20.0
VERSION = 10_000  # a token is the version of the weights that made it, times this, plus its position


class RankEnded(SystemExit):
    """What stands for the end of a process; a thread that ends so prints nothing."""


@dataclass
class Batch:
    requests: list[Any]


@dataclass
class AbortReq:
    rid: str
    finished_reason: Any = None
    abort_message: str = ""


@dataclass
class Pause:
    pass


@dataclass
class Resume:
    pass


@dataclass
class Sequence:
    """SGLang's object for one request."""

    rid: str
    left: int
    return_logprob: bool = False
    output_ids: list[int] = field(default_factory=list)
    sent: int = 0
    is_aborted: bool = False


def make_request(request: Any, rid: str, scheduler: Any, *, stream: bool = False) -> Sequence:
    if "unknown" in request.sampling_params:
        raise InvalidRequestError("unknown sampling parameter")
    return Sequence(rid, request.sampling_params["max_new_tokens"])


def replace_sglang(monkeypatch: Any) -> None:
    """Put what stands for SGLang, for moving weights, and for the end of a process in the place of those."""
    names = {"make_batch": Batch, "make_abort": AbortReq, "make_pause": Pause, "make_resume": Resume}
    for name, made in {**names, "make_request": make_request}.items():
        monkeypatch.setattr(sglang_requests, name, made)
    monkeypatch.setattr(receiver_module, "WeightsKeeper", Weights)
    monkeypatch.setattr(watchdog_module, "os", SimpleNamespace(**{**vars(os), "_exit": _exit}))


def _exit(status: int) -> None:
    raise RankEnded(status)


class Gate:
    """Lets the root make as many steps as the test allows, or as many as it wants."""

    def __init__(self) -> None:
        self._news, self._permits, self.is_open = threading.Condition(), 0, False

    def allow(self, steps: int) -> None:
        with self._news:
            self._permits += steps
            self._news.notify_all()

    def set(self, is_open: bool) -> None:
        with self._news:
            self.is_open, self._permits = is_open, 0
            self._news.notify_all()

    def step(self) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self.is_open or self._permits > 0, BOUND_S), "the test allowed no step"
            self._permits -= not self.is_open


class Scheduler:
    """SGLang's: all requests run at once, each step makes one token of each, and every third is sent."""

    def __init__(self, receiver: Receiver, gate: Gate | None) -> None:
        self.receiver, self._gate = receiver, gate
        self.running: list[Sequence] = []
        self.waiting_queue: list[Sequence] = []
        self.forward_ct, self.version, self.is_paused = 0, 0, False
        self.log: list[tuple[int, str]] = []  # what was applied, and after how many steps
        self.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: False)
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(2, 2)))
        self.token_to_kv_pool_allocator = SimpleNamespace(get_kvcache=lambda: None)

    def is_fully_idle(self) -> bool:
        return not self.running and not self.waiting_queue

    def flush_cache(self, *, empty_cache: bool) -> bool:
        self.log.append((self.forward_ct, "flush"))
        return self.is_fully_idle()

    def run(self) -> None:
        while True:
            for message in self.receiver.recv_requests():
                self.log.append((self.forward_ct, repr(message)))
                self._apply(message)
            if self.running and not self.is_paused:
                self._step()

    def _apply(self, message: Any) -> None:
        if isinstance(message, Batch):
            (self.waiting_queue if self.is_paused else self.running).extend(message.requests)
        elif isinstance(message, AbortReq):
            for one in [one for one in self.waiting_queue if one.rid.startswith(message.rid)]:
                self.waiting_queue.remove(one)
                self.receiver.outputs.send_output(AbortReq(one.rid), one)
            for one in self.running:
                one.is_aborted |= one.rid.startswith(message.rid)
        else:
            self.is_paused = isinstance(message, Pause)
            self.waiting_queue, self.running = (self.running, []) if self.is_paused else ([], self.waiting_queue)

    def _step(self) -> None:
        if self._gate is not None:
            self._gate.step()
        self.forward_ct += 1
        ended = []
        for one in self.running:
            one.output_ids.append(self.version * VERSION + len(one.output_ids))
            one.left -= 1
            reason = {"type": "abort"} if one.is_aborted else None if one.left > 0 else {"type": "length"}
            if reason is not None or len(one.output_ids) % 3 == 0:
                self._send(one, reason)
            if reason is not None:
                ended.append(one)
        self.running = [one for one in self.running if one not in ended]

    def _send(self, one: Sequence, reason: Any) -> None:
        news, one.sent = one.output_ids[one.sent :], len(one.output_ids)
        output = SimpleNamespace(
            rids=[one.rid], output_ids=[news], finished_reasons=[reason], prompt_tokens=[1], cached_tokens=[0]
        )
        self.receiver.outputs.send_output(output)


class Weights:
    """Stands for the `WeightsKeeper`: an update asks all ranks once, and moves nothing."""

    def __init__(self, scheduler: Scheduler, start: Start, channel: Any) -> None:
        self.version, self._scheduler, self.device = 0, scheduler, torch.device("cpu")
        self.unmap = self.withdraw = self.parameters_may_change = self.drop_stale_plans = lambda: None
        self.check_consistent = lambda: None

    def announce(self, call: Any) -> UpdateNews:
        return UpdateNews(False, True, None, self.version, "")

    def update(self, call: Any, news: Any, gather: Any, enter: Any, *, flush: bool, wait_s: float) -> UpdateStats:
        assert {one.version for one in news} == {self.version}
        if flush:
            sglang_memory.flush_cache(self._scheduler)
        raise_first(gather(Outcome()))
        self.version += 1
        self._scheduler.version = self.version
        values: dict[str, Any] = {one.name: 0 for one in fields(UpdateStats)}
        return UpdateStats(**{**values, "weight_version": self.version, "planned": False, "fallback_weights": ()})


class _Departed(set[int]):
    """Ranks that have departed. Whoever waits for one ends with its own rank, as a thread of a process does."""

    def __init__(self, watchdog: RankWatchdog) -> None:
        super().__init__()
        self._watchdog = watchdog

    def __contains__(self, rank: object) -> bool:
        if self._watchdog.ended is not None:
            raise RankEnded(1)
        return super().__contains__(rank)


class RankWatchdog(Watchdog):
    """The real one, but the end of its process is the end of its rank's threads. `ended` says how."""

    ended: object = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ending = threading.Lock()
        self.departed = _Departed(self)

    def _ends_by(self, how: object) -> None:
        with self._ending:
            if self.ended is not None:
                raise RankEnded(1)
            self.ended = how

    def run(self) -> None:
        with contextlib.suppress(RankEnded):
            super().run()

    def die(self, error: ErrorReport, *, forward: bool = True) -> Any:
        self._ends_by(error)
        try:
            super().die(error, forward=forward)
        finally:
            self.disconnect()

    def leave(self) -> None:
        self._ends_by("left")
        try:
            super().leave()
        finally:
            self.disconnect()

    def kill(self) -> None:
        """End as by SIGKILL, without a word to anybody."""
        self._ends_by("killed")
        self.disconnect()

    def disconnect(self) -> None:
        """What the system does with the connections of a process that ends."""
        self._channel.give_up()
        for group in self._groups:
            for sock in (*group.data.values(), *group.alarms.values()):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class Trainer:
    """The trainer's end of a rank's channel, with all that came over it."""

    def __init__(self, channel: Channel[Any]) -> None:
        self.channel, self.heard = channel, []
        self._news = threading.Condition()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            while True:
                message, _ = self.channel.recv()
                with self._news:
                    self.heard.append(message)
                    self._news.notify_all()
        except (ChannelClosed, OSError, ValueError):
            return

    def send(self, message: object) -> None:
        try:
            self.channel.send(message)
        except ChannelClosed:
            raise AssertionError(f"the rank has ended: {self.of(Failed)}") from None

    def of(self, kind: type) -> list[Any]:
        return [message for message in list(self.heard) if isinstance(message, kind)]

    def wait(self, condition: Any, what: str) -> None:
        with self._news:
            if not self._news.wait_for(condition, BOUND_S):
                raise AssertionError(f"{what} did not come in {BOUND_S} s:\n{stacks()}")


def stacks() -> str:
    """Where all threads are."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame)[-4:])}" for ident, frame in frames)


class Rank:
    """One scheduler process, as threads, and its trainer."""

    def __init__(self, start: Start, gate: Gate | None) -> None:
        mine, theirs = socket.socketpair()
        self.channel = Channel(mine, ToScheduler)
        self.trainer = Trainer(Channel(theirs, ToTrainer))
        self.start, self._gate = start, gate
        ranks = start.group.ranks
        self.watchdog = RankWatchdog(
            start.rank, self.channel, replica=ranks, trainer_pid=os.getppid(), scratch="/nonexistent"
        )
        self.error: BaseException | None = None
        self.is_up = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"rank {start.rank}")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.group = PeerGroup(self.start.rank, self.start.group, timeout_s=BOUND_S)
            self.watchdog.watch(self.group)
            self.receiver = Receiver(self.start, self.channel, self.group, self.watchdog)
            self.scheduler = Scheduler(self.receiver, self._gate)
            self.receiver.attach(self.scheduler)
            self.watchdog.start()
            self.is_up.set()
            self.scheduler.run()
        except RankEnded:
            return
        except BaseException as error:
            self.error = error
            self.watchdog.disconnect()

    def close(self) -> None:
        """Let go of what the end of a process would let go."""
        self.trainer.thread.join(BOUND_S)
        self.watchdog.join(BOUND_S)
        self.channel.close()
        self.trainer.channel.close()
        self.group.close()
        self.receiver._requests._reports.put(PauseState(False))  # its thread finds the channel closed
        for fd in (self.watchdog._wake_read, self.watchdog._wake_write, self.watchdog._trainer):
            if fd >= 0:
                os.close(fd)


class ControlPlane:
    """The ranks of one replica."""

    def __init__(self, count: int) -> None:
        self.gate = Gate()
        ranks = tuple(range(count))
        listener = listen("127.0.0.1")
        port = listener.getsockname()[1]
        fd = listener.detach()
        self.ranks = [
            Rank(_start(rank, GroupAddress(ranks, "127.0.0.1", port, "token", fd if rank == 0 else -1)), gate)
            for rank, gate in zip(ranks, [self.gate, *[None] * count], strict=False)
        ]
        for rank in self.ranks:
            assert rank.is_up.wait(BOUND_S), stacks()

    def check_no_error(self) -> None:
        for rank in self.ranks:
            if rank.error is not None:
                raise AssertionError(f"rank {rank.start.rank} failed") from rank.error

    def join(self) -> None:
        """Wait until all ranks have ended, and let go of everything."""
        self.gate.set(True)
        deadline = time.monotonic() + BOUND_S
        for rank in self.ranks:
            rank.thread.join(max(0.0, deadline - time.monotonic()))
        alive = [rank.start.rank for rank in self.ranks if rank.thread.is_alive()]
        assert not alive, f"ranks {alive} did not end in {BOUND_S} s:\n{stacks()}"
        for rank in self.ranks:
            rank.close()
        self.check_no_error()

    def check_all_heard_of_death(self, dead: int) -> None:
        for rank in self.ranks:
            if rank.start.rank != dead:
                assert isinstance(rank.watchdog.ended, ErrorReport), (rank.start.rank, rank.watchdog.ended)
                assert rank.trainer.of(Failed), f"the trainer of rank {rank.start.rank} was not told"


def _start(rank: int, group: GroupAddress) -> Start:
    values: dict[str, Any] = dict.fromkeys(Start.__struct_fields__, "")
    numbers = dict.fromkeys(("random_seed", "store_port", "store_fd", "gpu_id", "node_rank", "weight_version"), 0)
    flags = {"is_restart": False, "keeps_mapped": False, "on_cpu": True}
    mine = {"protocol": 2, "rank": rank, "tp_rank": rank, "group": group, "server_args": {}, "nnodes": 1}
    return Start(**{**values, **numbers, **flags, **mine, "trainer_pid": os.getppid(), "timeout_s": BOUND_S})
