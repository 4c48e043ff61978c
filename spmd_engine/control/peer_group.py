"""Connects scheduler processes that act together: a star over TCP, for agreement, barriers and alarms.

The scheduler process of the first rank is the root. Every other one, a member, holds two connections to it: `data`,
used by the main thread, and `alarm`, watched by the watchdog thread.
"""

from __future__ import annotations

import errno
import hmac
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from spmd_engine.control import codec, timeouts
from spmd_engine.control.channel import spin
from spmd_engine.control.framing import frame, recv_frame
from spmd_engine.control.messages import GroupAddress
from spmd_engine.errors import ErrorReport

M = TypeVar("M")

_HELLO_LIMIT = 4096
# In milliseconds the kernel's own limit for data that is not acknowledged (tcp(7)); the others in seconds.
_KEEPALIVE = {
    "TCP_KEEPIDLE": timeouts.KEEPALIVE_IDLE_S,
    "TCP_KEEPINTVL": timeouts.KEEPALIVE_INTERVAL_S,
    "TCP_KEEPCNT": timeouts.KEEPALIVE_COUNT,
    "TCP_USER_TIMEOUT": timeouts.CUT_OFF_S * 1000,
}
_CUT_OFF = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
#: A file descriptor, and what is called whenever it is readable.
Beside = tuple[int, Callable[[], None]]


class PeerGone(Exception):
    """The scheduler process of `rank` closed its connection."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"the scheduler process of rank {rank} closed its connection")
        self.rank = rank


class PeerTimeout(Exception):
    """A rank did not come in time."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        super().__init__(f"waited {timeout_s:.1f} s for rank {rank}")
        self.rank = rank


class BroadcastFirst(Exception):
    """The root has broadcast something first. What this member has sent does not count: it must be sent again.

    Attributes:
        data: what the root has broadcast, encoded.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data


class _Hello(msgspec.Struct, frozen=True):
    token: str
    rank: int
    lane: str


class _Contribution(msgspec.Struct, frozen=True, tag=True):
    """A member's part of an all-gather, and how many broadcasts it has heard before."""

    after: int
    data: bytes


class _Gathered(msgspec.Struct, frozen=True, tag=True):
    """The parts of all ranks, in their order."""

    parts: list[bytes]


class _Broadcast(msgspec.Struct, frozen=True, tag=True):
    data: bytes


class Alarm(msgspec.Struct, frozen=True, tag=True):
    """The sender ends, and the receiver shall."""

    error: ErrorReport


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The engine of `rank` was shut down by its trainer."""

    rank: int


_FromRoot = _Gathered | _Broadcast
News = Alarm | Goodbye


def listen(host: str) -> socket.socket:
    """A listening socket on `host`, on a port that the system chooses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    return listener


def watch_for_silence(sock: socket.socket) -> None:
    """Let the kernel notice that the other end's node, or the way to it, is gone.

    For connections whose other end always reads: one that does not read counts as gone, too.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_cut_off(error: Exception) -> bool:
    """Whether a socket failed because its other end was silent, rather than because that has closed it."""
    return isinstance(error, OSError) and error.errno in _CUT_OFF


def _milliseconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic()) * 1000


class _Lives:
    """Watches processes while something else is waited for.

    Args:
        pids: by rank; those that cannot be watched are left out.
    """

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._ranks: dict[int, int] = {}
        self._ended: int | None = None
        for rank, pid in pids.items():
            try:
                self._ranks[os.pidfd_open(pid)] = rank
            except ProcessLookupError:
                self._ended = rank
            except (OSError, AttributeError):  # a kernel, a container or a Python without pidfd_open
                pass

    def __enter__(self) -> _Lives:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._ranks:
            os.close(fd)

    def wait(self, sock: socket.socket, timeout_s: float) -> int | None:
        """Until `sock` can be read, a process has ended, or the time is over. The rank whose process has ended."""
        if self._ended is not None:
            return self._ended
        poller = select.poll()
        for fd in (sock.fileno(), *self._ranks):
            poller.register(fd, select.POLLIN)
        return next((self._ranks[fd] for fd, _ in poller.poll(timeout_s * 1000) if fd in self._ranks), None)


class PeerGroup:
    """The connections of one scheduler process to the others of `ranks`.

    Args:
        rank: this process's global rank.
        address: where the root listens; its `ranks` are the members.
        timeout_s: how long to wait until all have joined, and later until a member reads.

    Raises:
        PeerTimeout, PeerGone: a member did not join.
    """

    def __init__(self, rank: int, address: GroupAddress, *, timeout_s: float) -> None:
        self.rank, self._timeout_s = rank, timeout_s
        self.ranks = address.ranks
        self.root = address.ranks[0]
        self.data: dict[int, socket.socket] = {}
        self.alarms: dict[int, socket.socket] = {}
        self._pollers: dict[int, select.poll] = {}
        self._broadcasts = 0  # sent by the root, or received by a member
        deadline = time.monotonic() + timeout_s
        if len(self.ranks) == 1:
            if address.listener_fd >= 0:
                socket.socket(fileno=address.listener_fd).close()
        elif rank == self.root:
            self._accept(address, deadline, timeout_s)
        else:
            self._join(address, deadline, timeout_s)

    def _accept(self, address: GroupAddress, deadline: float, timeout_s: float) -> None:
        listener = socket.socket(fileno=address.listener_fd)
        with listener, _Lives(address.trainers) as trainers:
            while len(self.data) + len(self.alarms) < 2 * (len(self.ranks) - 1):
                ended = trainers.wait(listener, max(0.001, deadline - time.monotonic()))
                if ended is not None:  # its scheduler process ends with it, and may not have got here
                    raise PeerGone(ended)
                listener.settimeout(0)
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    if time.monotonic() < deadline:
                        continue
                    missing = [r for r in self.ranks[1:] if r not in self.data]
                    raise PeerTimeout(missing[0], timeout_s) from None
                # A stranger that connects and says nothing, or a byte now and then, must not hold up the members.
                hello_by = min(deadline, time.monotonic() + timeouts.HELLO_S)
                try:
                    hello = codec.decode(recv_frame(sock, limit=_HELLO_LIMIT, deadline=hello_by), _Hello)
                    is_known = hmac.compare_digest(hello.token.encode(), address.token.encode())
                except (EOFError, OSError, ValueError, codec.DecodeError):
                    sock.close()
                    continue
                if not is_known or hello.rank not in self.ranks or hello.lane not in ("data", "alarm"):
                    sock.close()
                    continue
                self._keep(sock, hello.rank, hello.lane)

    def _join(self, address: GroupAddress, deadline: float, timeout_s: float) -> None:
        for lane in ("data", "alarm"):
            try:
                sock = socket.create_connection(
                    (address.host, address.port), timeout=max(0.001, deadline - time.monotonic())
                )
                sock.sendall(frame(codec.encode(_Hello(address.token, self.rank, lane))))
            except TimeoutError:
                raise PeerTimeout(self.root, timeout_s) from None
            except OSError:
                raise PeerGone(self.root) from None
            self._keep(sock, self.root, lane)

    def _keep(self, sock: socket.socket, rank: int, lane: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if lane == "alarm":
            watch_for_silence(sock)  # the watchdog thread reads there whatever the main thread does
            self.alarms[rank] = sock
            return
        sock.settimeout(None)
        self.data[rank] = sock
        self._pollers[rank] = select.poll()
        self._pollers[rank].register(sock, select.POLLIN)

    def all_gather(self, message: M, *, timeout_s: float, spin_s: float = 0.0, beside: Beside | None = None) -> list[M]:
        """Every rank's message, of one type on all of them, in the order of `ranks`. Also a barrier.

        Args:
            timeout_s: how long to wait for the others.
            spin_s: how much of that without going to sleep.
            beside: what else to read while waiting.

        Raises:
            PeerTimeout: a rank did not come within `timeout_s` seconds.
            PeerGone: a rank's process is gone.
            BroadcastFirst: on a member, the root has broadcast something before it came.
        """
        if len(self.ranks) == 1:
            return [message]
        deadline = time.monotonic() + timeout_s
        data = codec.encode(message)
        if self.rank != self.root:
            mine = codec.encode(_Contribution(self._broadcasts, data))
            self._send(self.root, frame(mine), deadline, timeout_s)
            answer: _FromRoot = codec.decode(self._recv(self.root, deadline, timeout_s, spin_s, beside), _FromRoot)
            if isinstance(answer, _Broadcast):
                self._broadcasts += 1
                raise BroadcastFirst(answer.data)
            parts = answer.parts
        else:
            parts = [data]
            for member in self.ranks[1:]:
                sent = self._recv_contribution(member, deadline, timeout_s, spin_s, beside)
                while sent.after != self._broadcasts:  # it had not heard yet what it should know
                    sent = self._recv_contribution(member, deadline, timeout_s, spin_s, beside)
                parts.append(sent.data)
            gathered = frame(codec.encode(_Gathered(parts)))
            for member in self.ranks[1:]:
                self._send(member, gathered, deadline, timeout_s)
        kind = type(message)
        return [codec.decode(part, kind) for part in parts]

    def _recv_contribution(
        self, member: int, deadline: float, timeout_s: float, spin_s: float, beside: Beside | None
    ) -> _Contribution:
        return codec.decode(self._recv(member, deadline, timeout_s, spin_s, beside), _Contribution)

    def broadcast(self, message: object) -> None:
        """On the root: send a message to all members, without waiting for them.

        Raises:
            PeerGone: a member's process is gone.
            PeerTimeout: a member did not read.
        """
        if len(self.ranks) > 1:
            self._broadcasts += 1
            data = frame(codec.encode(_Broadcast(codec.encode(message))))
            deadline = time.monotonic() + self._timeout_s
            for member in self.ranks[1:]:
                self._send(member, data, deadline, self._timeout_s)

    def recv_broadcast(self, kind: type[M], *, timeout_s: float) -> M:
        """On a member: the message of type `kind` that the root broadcasts.

        Raises:
            PeerTimeout, PeerGone: see `all_gather`.
        """
        found = codec.decode(self._recv(self.root, time.monotonic() + timeout_s, timeout_s), _Broadcast)
        self._broadcasts += 1
        return codec.decode(found.data, kind)

    def _send(self, member: int, data: bytes, deadline: float, timeout_s: float) -> None:
        sock, left = self.data[member], memoryview(data)
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        while left:
            try:
                left = left[sock.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if not poller.poll(_milliseconds_until(deadline)):
                    raise PeerTimeout(member, timeout_s) from None
            except OSError:
                raise PeerGone(member) from None

    def _recv(
        self, member: int, deadline: float, timeout_s: float, spin_s: float = 0.0, beside: Beside | None = None
    ) -> bytes:
        sock, poller = self.data[member], self._pollers[member]
        # Poll first: a timeout in the middle of a frame would lose the stream.
        if not spin(sock, spin_s):
            if beside is not None:
                poller = select.poll()
                poller.register(sock, select.POLLIN)
                poller.register(beside[0], select.POLLIN)
            while sock.fileno() not in (ready := [fd for fd, _ in poller.poll(_milliseconds_until(deadline))]):
                if not ready:
                    raise PeerTimeout(member, timeout_s)
                assert beside is not None
                beside[1]()
        try:
            return recv_frame(sock)
        except (EOFError, OSError):
            raise PeerGone(member) from None

    def alarm(self, news: News, skip: int = -1) -> None:
        """Tell all connected processes, except `skip`; those that are gone already are passed over."""
        data = frame(codec.encode(news))
        for member, sock in list(self.alarms.items()):
            if member != skip:
                try:
                    sock.settimeout(timeouts.ALARM_S)
                    sock.sendall(data)
                except OSError:
                    continue

    @staticmethod
    def recv_alarm(sock: socket.socket) -> News:
        """What came over one of `alarms`.

        Raises:
            EOFError, OSError, ValueError, codec.DecodeError: nothing that could be understood.
        """
        sock.settimeout(timeouts.ALARM_S)
        news: News = codec.decode(recv_frame(sock), News)
        return news

    def close(self) -> None:
        for sock in (*self.data.values(), *self.alarms.values()):
            sock.close()
