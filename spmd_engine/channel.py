"""Framed messages between a trainer rank and its own scheduler process, over an inherited Unix socket pair.

Both ends are processes of one user and nobody else can reach the socket, so frames are pickles of the frozen
dataclasses below. Links between scheduler processes, which do cross a network, carry JSON instead (`links.py`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spmd_engine.errors import ErrorReport

PROTOCOL = 1
_HEADER = struct.Struct("<Q")
# Longest pause inside a message: it is written as fast as it is read.
_REST_S = 60.0


class ChannelClosed(Exception):
    """The other end of the channel is gone."""


class ChannelTimeout(Exception):
    """Nothing arrived in time."""


@dataclass(frozen=True)
class LinkAddress:
    """Where the scheduler process of the first rank of `ranks` accepts the others.

    Attributes:
        ranks: global ranks that the link connects; the first one is the hub.
        host, port: where the hub listens.
        token: secret that a joining process must show.
        listener_fd: on the hub, the listening socket, already bound; -1 elsewhere.
        trainers: process ids of the other ranks' trainers, by rank, as far as they are on the hub's node.
    """

    ranks: tuple[int, ...]
    host: str
    port: int
    token: str
    listener_fd: int = -1
    trainers: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """First message to a scheduler process.

    SGLang's processes find one another through a store at `link.host` and `store_port`. The first of them serves it on
    `store_fd`, a listening socket that is bound already; -1 elsewhere.

    The weights of an engine that starts anew (`is_restart`) are not those that the trainer's `weight_version` names.

    Attributes:
        node: identity of this node; see `rendezvous.node_identity`.
        nnodes, node_rank: over how many nodes the replica's ranks are spread, and which of them this is.
        host: this node's address on the way to the others.
        gpu_id: CUDA ordinal of this rank among the GPUs that the process sees.
        keeps_mapped: the trainers' memory stays mapped while memory is released and resumed.
    """

    protocol: int
    rank: int
    tp_rank: int
    link: LinkAddress
    model_path: str
    server_args: dict[str, Any]
    random_seed: int
    store_port: int
    store_fd: int
    gpu_id: int
    on_cpu: bool
    node: str
    nnodes: int
    node_rank: int
    host: str
    trainer_pid: int
    scratch: str
    timeout_s: float
    weight_version: int
    is_restart: bool
    keeps_mapped: bool


@dataclass(frozen=True)
class Ready:
    """The scheduler process serves.

    Attributes:
        memory: bytes that the engine holds on its device, by tag.
    """

    memory: dict[str, int]


@dataclass(frozen=True)
class Descriptors:
    """The chunks that hold this rank's shards. With it comes a socket, over which their file descriptors follow.

    Attributes:
        counts: how many chunks each handle of `ShardMemory` stands for, in the order in which they follow.
    """

    counts: dict[bytes, int]


@dataclass(frozen=True)
class Packing:
    """The trainer shall pack its shards in CPU memory, as it is asked to over the socket that comes with this."""


@dataclass(frozen=True)
class Call:
    """A collective call.

    Attributes:
        seq: number of the call on this rank.
        kind: "generate", "update_weights", "flush_cache", ..., or "refused" for a call that the trainer rank
            already knows to be wrong; it is sent so that the other ranks do not wait for it.
        payload: arguments, built of plain Python and NumPy.
        digest: equal on two ranks if and only if the arguments are.
        summary: one line for error messages.
        overlapped: another call of this rank was running when this one was made.
        timeout_s: how long to wait for the other ranks, and for the result.
        is_traced: the trainer rank wants to hear of every `Phase`.
    """

    seq: int
    kind: str
    payload: Any
    digest: str
    summary: str
    overlapped: bool
    timeout_s: float
    is_traced: bool = False


@dataclass(frozen=True)
class Phase:
    """A traced call has come so far."""

    name: str


@dataclass(frozen=True)
class Coming:
    """A weight update is being described: what can be done before the `Call` comes had better be done now."""


@dataclass(frozen=True)
class Submit:
    """Requests that begin as soon as they can, beside others. From the trainer of a replica's first rank only.

    Attributes:
        requests: of `requests.GenerateRequest`, by id. No id is the beginning of another one.
        stream: whether to report tokens as they come.
    """

    requests: dict[str, Any]
    stream: bool


@dataclass(frozen=True)
class Submits:
    """Several `Submit`s in one message: each is taken, or refused, by itself."""

    submits: tuple[Submit, ...]


@dataclass(frozen=True)
class Abort:
    """End requests that were submitted; each reports what it has."""

    rids: tuple[str, ...]


@dataclass(frozen=True)
class Pause:
    """Stop all requests that were submitted where they are; they keep their tokens and give back their KV cache."""


@dataclass(frozen=True)
class Resume:
    """Go on with requests that were paused."""


@dataclass(frozen=True)
class Progress:
    """What has become of requests that were submitted, as lists of `requests.Increment`."""

    increments: list[Any]


@dataclass(frozen=True)
class Held:
    """Whether requests that were submitted stand still: nothing will come of them meanwhile."""

    is_held: bool


@dataclass(frozen=True)
class Refused:
    """Requests that did not begin, or a text that was not parsed, and why."""

    rids: tuple[str, ...]
    error: ErrorReport


@dataclass(frozen=True)
class ParseCalls:
    """Find the function calls in `text`, with one of SGLang's parsers; answered by `Parsed` or `Refused`."""

    rid: str
    text: str
    tools: list[Any]
    parser: str


@dataclass(frozen=True)
class Parsed:
    """Answer to `ParseCalls`: the text around the calls, and a list of `requests.FunctionCall`."""

    rid: str
    text: str
    calls: list[Any]


@dataclass(frozen=True)
class Reply:
    """Answer to the `Call` with the same `seq`; exactly one of `error` and `value` counts."""

    seq: int
    value: Any = None
    error: ErrorReport | None = None


@dataclass(frozen=True)
class Failed:
    """The scheduler process ends; nothing else will come."""

    error: ErrorReport


@dataclass(frozen=True)
class Shutdown:
    """End the scheduler process. Needs no agreement of the other ranks."""


def spin(sock: socket.socket, seconds: float) -> bool:
    """Wait for `sock` to become readable without going to sleep, for at most some milliseconds; whether it did.

    To wake a sleeping process takes 0.15 ms on a virtual machine, and one weight update has six such waits in a row.
    """
    if seconds <= 0:
        return False
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    end = time.monotonic() + seconds
    while not poller.poll(0):
        if time.monotonic() >= end:
            return False
    return True


@dataclass
class Channel:
    """One end of the socket pair. `send` may be called from several threads, `recv` from one.

    The socket does not block, and every wait is a poll: uvloop makes a socket that it watches non-blocking in any case.
    """

    sock: socket.socket
    _send_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.sock.setblocking(False)
        self._poller = select.poll()
        self._poller.register(self.sock, select.POLLIN)

    def fileno(self) -> int:
        return self.sock.fileno()

    def is_readable(self) -> bool:
        """Whether `recv` would not wait for a message to begin."""
        return bool(self._poller.poll(0))

    def send(self, message: object, fds: tuple[int, ...] = (), *, timeout_s: float | None = None) -> None:
        """Send one message, with open file descriptors if given.

        Args:
            timeout_s: seconds for the other end to take it, None for ever. A message that was sent in part closes the
                channel.

        Raises:
            ChannelTimeout: the other end did not read.
            ChannelClosed: it is gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        frame = memoryview(b"M" + _HEADER.pack(len(data)) + data)
        size = len(frame)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._send_lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise ChannelTimeout(f"another thread has waited {timeout_s} s for the other end to read")
        try:
            while frame:
                try:
                    sent = socket.send_fds(self.sock, [frame[:1]], list(fds)) if fds else self.sock.send(frame)
                except BlockingIOError:
                    self._poll(select.POLLOUT, deadline, f"the other end read nothing for {timeout_s} s")
                except OSError as error:
                    raise ChannelClosed(str(error)) from error
                else:
                    frame, fds = frame[sent:], ()
        except BaseException:
            if 0 < len(frame) < size:
                self.give_up()
            raise
        finally:
            self._send_lock.release()

    def recv(
        self, timeout_s: float | None = None, watch_pidfd: int = -1, spin_s: float = 0.0
    ) -> tuple[Any, tuple[int, ...]]:
        """Receive one message and the file descriptors that came with it.

        Args:
            timeout_s: seconds to wait for the message to begin, None for ever.
            watch_pidfd: a pidfd of the process at the other end: its death ends the wait even if a forked copy of
                it keeps the socket open.
            spin_s: seconds to look again and again before going to sleep; see `spin`.

        Raises:
            ChannelTimeout: nothing arrived in time.
            ChannelClosed: the other end is gone, or stopped inside a message.
        """
        if not spin(self.sock, spin_s):
            self._wait(timeout_s, watch_pidfd)
        try:
            tag, fds, _, _ = socket.recv_fds(self.sock, 1, 4)
            for fd in fds:
                os.set_inheritable(fd, False)
            if not tag:
                raise ChannelClosed("end of stream")
            (size,) = _HEADER.unpack(self._read(_HEADER.size))
            data = self._read(size)
        except (ConnectionResetError, BrokenPipeError) as error:
            raise ChannelClosed(str(error)) from error
        except BaseException:
            self.give_up()  # the rest of a message must not be taken for the next one
            raise
        return pickle.loads(data), tuple(fds)

    def _wait(self, timeout_s: float | None, watch_pidfd: int) -> None:
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        if watch_pidfd >= 0:
            poller.register(watch_pidfd, select.POLLIN)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = dict(poller.poll(left_ms))
            if self.sock.fileno() in ready:
                return
            if watch_pidfd in ready:
                raise ChannelClosed("process ended")
            if deadline is not None and time.monotonic() >= deadline:
                raise ChannelTimeout(f"no message in {timeout_s} s")

    def give_up(self) -> None:
        """Both ends see the channel closed, also where a forked process keeps it open: after half a message, say."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _poll(self, event: int, deadline: float | None, otherwise: str) -> None:
        """Wait until the socket can go on. A peer that is gone counts as that: the next call on the socket says so."""
        poller = select.poll()
        poller.register(self.sock, event)
        if not poller.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
            raise ChannelTimeout(otherwise)

    def _read(self, size: int) -> bytes:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self.sock.recv_into(view)
            except BlockingIOError:
                try:
                    self._poll(select.POLLIN, time.monotonic() + _REST_S, "")
                except ChannelTimeout:
                    raise ChannelClosed(f"nothing came for {_REST_S:.0f} s inside a message") from None
                continue
            if count == 0:
                raise ChannelClosed("end of stream inside a message")
            view = view[count:]
        return bytes(buffer)

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            self._poller.unregister(self.sock)
        self.sock.close()
