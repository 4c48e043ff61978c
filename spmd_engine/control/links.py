"""Links between scheduler processes: a star over TCP, for agreement, barriers and alarms.

The scheduler process of the first rank is the hub. Every other one holds two connections to it: `data`, used by the
main thread for `exchange`, and `alarm`, watched by the watchdog thread. Frames are JSON plus raw bytes, never pickles.
"""

from __future__ import annotations

import errno
import hmac
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from spmd_engine.control.channel import spin
from spmd_engine.control.framing import Frame, frame, recv_frame
from spmd_engine.control.messages import LinkAddress

_HELLO_LIMIT = 4096
_HELLO_S = 5.0
# A node that is cut off closes nothing. The kernel asks an idle peer after so long whether it is there, so often and so
# many times (tcp(7)): 10 s until it counts as gone. It answers for a process that is busy or stopped, too.
_KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
_CUT_OFF = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
#: A file descriptor, and what is called whenever it is readable.
Beside = tuple[int, Callable[[], None]]


class PeerGone(Exception):
    """The scheduler process of `rank` closed its link."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"the scheduler process of rank {rank} closed its link")
        self.rank = rank


class LinkTimeout(Exception):
    """A rank did not reach an exchange in time."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        super().__init__(f"waited {timeout_s:.1f} s for rank {rank}")
        self.rank = rank


class Interjection(Exception):
    """The hub has told something first. What this member has sent does not count: the exchange must be made again."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame


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


class Links:
    """The links of one scheduler process to the others of `ranks`.

    Args:
        rank: this process's global rank.
        address: where the hub listens; its `ranks` are the members.
        timeout_s: how long to wait until all have joined, and later until a member reads.

    Raises:
        LinkTimeout, PeerGone: a member did not join.
    """

    def __init__(self, rank: int, address: LinkAddress, *, timeout_s: float) -> None:
        self.rank, self._timeout_s = rank, timeout_s
        self.ranks = address.ranks
        self.hub = address.ranks[0]
        self.data: dict[int, socket.socket] = {}
        self.alarms: dict[int, socket.socket] = {}
        self._pollers: dict[int, select.poll] = {}
        self._told = 0  # how often the hub has told something, or a member has heard it
        deadline = time.monotonic() + timeout_s
        if len(self.ranks) == 1:
            if address.listener_fd >= 0:
                socket.socket(fileno=address.listener_fd).close()
        elif rank == self.hub:
            self._accept(address, deadline, timeout_s)
        else:
            self._join(address, deadline, timeout_s)

    def _accept(self, address: LinkAddress, deadline: float, timeout_s: float) -> None:
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
                    raise LinkTimeout(missing[0], timeout_s) from None
                # A stranger that connects and says nothing, or a byte now and then, must not hold up the members.
                hello_by = min(deadline, time.monotonic() + _HELLO_S)
                try:
                    hello, _ = recv_frame(sock, limit=_HELLO_LIMIT, deadline=hello_by)
                    known = hmac.compare_digest(str(hello.get("token", "")), address.token)
                    rank, lane = int(hello.get("rank", -1)), hello.get("lane")
                except (EOFError, OSError, ValueError, AttributeError, TypeError):
                    known, rank, lane = False, -1, None
                if not known or rank not in self.ranks or lane not in ("data", "alarm"):
                    sock.close()
                    continue
                self._keep(sock, rank, lane)

    def _join(self, address: LinkAddress, deadline: float, timeout_s: float) -> None:
        for lane in ("data", "alarm"):
            try:
                sock = socket.create_connection(
                    (address.host, address.port), timeout=max(0.001, deadline - time.monotonic())
                )
                sock.sendall(frame({"token": address.token, "rank": self.rank, "lane": lane}))
            except TimeoutError:
                raise LinkTimeout(self.hub, timeout_s) from None
            except OSError:
                raise PeerGone(self.hub) from None
            self._keep(sock, self.hub, lane)

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

    def exchange(
        self,
        header: dict[str, Any],
        blob: bytes = b"",
        *,
        timeout_s: float,
        spin_s: float = 0.0,
        beside: Beside | None = None,
    ) -> list[Frame]:
        """All-gather: every member's frame, in the order of `ranks`. Also a barrier.

        Args:
            timeout_s: how long to wait for the others.
            spin_s: how much of that without going to sleep.
            beside: what else to read while waiting.

        Raises:
            LinkTimeout: a member did not come within `timeout_s` seconds.
            PeerGone: a member's process is gone.
            Interjection: on a member, the hub has told it something before it came.
        """
        if len(self.ranks) == 1:
            return [(header, blob)]
        deadline = time.monotonic() + timeout_s
        if self.rank != self.hub:
            self._send(self.hub, frame({"after": self._told, "header": header}, blob), deadline, timeout_s)
            merged, payload = self._recv(self.hub, deadline, timeout_s, spin_s, beside)
            if "headers" not in merged:
                self._told += 1
                raise Interjection((merged, payload))
            frames, at = [], 0
            for member, size in zip(merged["headers"], merged["sizes"], strict=True):
                frames.append((member, payload[at : at + size]))
                at += size
            return frames
        frames = [(header, blob)]
        for member in self.ranks[1:]:
            sent, data = self._recv(member, deadline, timeout_s, spin_s, beside)
            while sent["after"] != self._told:  # it had not heard yet what it should know
                sent, data = self._recv(member, deadline, timeout_s, spin_s, beside)
            frames.append((sent["header"], data))
        merged = {"headers": [h for h, _ in frames], "sizes": [len(b) for _, b in frames]}
        answer = frame(merged, b"".join(b for _, b in frames))
        for member in self.ranks[1:]:
            self._send(member, answer, deadline, timeout_s)
        return frames

    def tell(self, header: dict[str, Any], blob: bytes = b"") -> None:
        """On the hub: send something to all members, without waiting for them; `header` must not have "headers".

        Raises:
            PeerGone: a member's process is gone.
            LinkTimeout: a member did not read.
        """
        if len(self.ranks) > 1:
            self._told += 1
            data = frame(header, blob)
            deadline = time.monotonic() + self._timeout_s
            for member in self.ranks[1:]:
                self._send(member, data, deadline, self._timeout_s)

    def hear(self, *, timeout_s: float) -> Frame:
        """On a member: what the hub tells.

        Raises:
            LinkTimeout, PeerGone: see `exchange`.
        """
        found = self._recv(self.hub, time.monotonic() + timeout_s, timeout_s)
        self._told += 1
        return found

    def _send(self, member: int, data: bytes, deadline: float, timeout_s: float) -> None:
        sock, left = self.data[member], memoryview(data)
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        while left:
            try:
                left = left[sock.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if not poller.poll(_milliseconds_until(deadline)):
                    raise LinkTimeout(member, timeout_s) from None
            except OSError:
                raise PeerGone(member) from None

    def _recv(
        self, member: int, deadline: float, timeout_s: float, spin_s: float = 0.0, beside: Beside | None = None
    ) -> Frame:
        sock, poller = self.data[member], self._pollers[member]
        # Poll first: a timeout in the middle of a frame would lose the stream.
        if not spin(sock, spin_s):
            if beside is not None:
                poller = select.poll()
                poller.register(sock, select.POLLIN)
                poller.register(beside[0], select.POLLIN)
            while sock.fileno() not in (ready := [fd for fd, _ in poller.poll(_milliseconds_until(deadline))]):
                if not ready:
                    raise LinkTimeout(member, timeout_s)
                assert beside is not None
                beside[1]()
        try:
            return recv_frame(sock)
        except (EOFError, OSError):
            raise PeerGone(member) from None

    def alarm(self, header: dict[str, Any], skip: int = -1) -> None:
        """Tell all linked processes, except `skip`; those that are gone already are passed over."""
        for member, sock in list(self.alarms.items()):
            if member != skip:
                try:
                    sock.settimeout(1.0)
                    sock.sendall(frame(header))
                except OSError:
                    continue

    def close(self) -> None:
        for sock in (*self.data.values(), *self.alarms.values()):
            sock.close()
