"""Carries messages between a trainer rank and its own scheduler process, over an inherited Unix socket pair.

Both ends are processes of one user, and nobody else can reach the socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from spmd_engine.control import codec, timeouts

_HEADER = struct.Struct("<Q")
In = TypeVar("In")


class ChannelClosed(Exception):
    """The other end of the channel is gone."""


class ChannelTimeout(Exception):
    """Nothing arrived in time."""


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
class Channel(Generic[In]):
    """One end of the socket pair. `send` may be called from several threads, `recv` from one.

    Args:
        receives: type of the messages that come, a Struct or a union of tagged ones.

    The socket does not block, and every wait is a poll: uvloop makes a socket that it watches non-blocking in any case.
    """

    sock: socket.socket
    receives: Any
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
            EncodeError: the message cannot be told; nothing was sent.
        """
        data = codec.encode(message)
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
    ) -> tuple[In, tuple[int, ...]]:
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
        message: In = codec.decode(data, self.receives)
        return message, tuple(fds)

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
                    self._poll(select.POLLIN, time.monotonic() + timeouts.MESSAGE_PAUSE_S, "")
                except ChannelTimeout:
                    raise ChannelClosed(f"nothing came for {timeouts.MESSAGE_PAUSE_S:.0f} s inside a message") from None
                continue
            if count == 0:
                raise ChannelClosed("end of stream inside a message")
            view = view[count:]
        return bytes(buffer)

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            self._poller.unregister(self.sock)
        self.sock.close()
