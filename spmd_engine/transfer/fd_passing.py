"""File descriptors from process to process: from a trainer rank to its scheduler process, and from there to the others.

Descriptors cross Unix sockets only, so they need a way beside the links. They go in batches, each acknowledged before
the next: a process that passes thousands on needs a few at a time, and the kernel refuses a user who has too many in
flight (unix(7): ETOOMANYREFS). No torch and no CUDA here.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import resource
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Generator, Mapping, Sequence

from spmd_engine.control import codec, timeouts
from spmd_engine.control.framing import frame, recv_frame

logger = logging.getLogger(__name__)

#: Descriptors in one message; the kernel allows 253.
BATCH = 64
_HELLO_LIMIT = 4096
_SPARE_DESCRIPTORS = 512
_MORE, _GOT = b"D", b"A"
_GONE = "the other process is gone, or refused"
_INT = struct.Struct("i")


class PassingError(Exception):
    """Descriptors did not arrive: the other side is gone, too slow, or refuses."""


def send_batch(sock: socket.socket, descriptors: Sequence[int], *, timeout_s: float = timeouts.DESCRIPTORS_S) -> None:
    """Send up to `BATCH` descriptors and wait until they have arrived. They stay open here.

    Raises:
        PassingError: they have not.
    """
    deadline = time.monotonic() + timeout_s
    sock.settimeout(timeout_s)
    try:
        while True:
            try:
                socket.send_fds(sock, [_MORE], list(descriptors))
                break
            except OSError as error:
                # All processes of this user have too many descriptors in flight; they will arrive.
                if error.errno != errno.ETOOMANYREFS or time.monotonic() > deadline:
                    raise
                time.sleep(timeouts.DESCRIPTORS_RETRY_S)
        answer = sock.recv(1)
    except OSError as error:
        raise PassingError(f"{len(descriptors)} descriptors were not taken: {_reason(error, timeout_s)}") from error
    if answer != _GOT:
        raise PassingError(f"{len(descriptors)} descriptors were not taken: {_GONE}")


def receive_batch(sock: socket.socket, *, timeout_s: float = timeouts.DESCRIPTORS_S) -> list[int]:
    """Receive what one `send_batch` sends. The caller closes the descriptors.

    Raises:
        PassingError: nothing came, or not all of it; no descriptor is left open.
    """
    sock.settimeout(timeout_s)
    descriptors: list[int] = []
    try:
        # Not socket.recv_fds, which ignores flags.
        space = socket.CMSG_SPACE(BATCH * _INT.size)
        text, extra, flags, _ = sock.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors += [fd for (fd,) in _INT.iter_unpack(data[: len(data) - len(data) % _INT.size])]
        if flags & socket.MSG_CTRUNC:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise PassingError(
                f"this process may have only {soft} files open (hard limit {hard}), too few for the descriptors of the "
                "weights: raise it with ulimit -n"
            )
        if text != _MORE or not descriptors:
            raise PassingError(f"no descriptors came: {_GONE}")
        sock.sendall(_GOT)
    except (OSError, PassingError) as error:
        close_all(descriptors)
        if isinstance(error, PassingError):
            raise
        raise PassingError(f"no descriptors came: {_reason(error, timeout_s)}") from error
    return descriptors


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that this process owns."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class DescriptorServer:
    """Gives descriptors to other processes of this user on this host, from a thread of its own, until it is closed.

    Args:
        descriptors: under the name that a process asks for; owned by the server from now on.

    Attributes:
        address: what `fetch` needs; it holds a secret.
    """

    def __init__(
        self, descriptors: Mapping[bytes, Sequence[int]], *, timeout_s: float = timeouts.DESCRIPTORS_S
    ) -> None:
        self._descriptors, self._timeout_s = dict(descriptors), timeout_s
        self._token = secrets.token_hex(16)
        name = f"spmd-engine-{secrets.token_hex(16)}"
        self.address = f"{name}/{self._token}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{name}")  # the abstract namespace: leaves no file behind
        self._listener.listen(1024)
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._serving: socket.socket | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="spmd_engine-descriptors", daemon=True)
        self._thread.start()

    @staticmethod
    def receive(
        sock: socket.socket, counts: Mapping[bytes, int], *, timeout_s: float = timeouts.DESCRIPTORS_S
    ) -> DescriptorServer:
        """A server of what comes over `sock` in batches: `counts` descriptors for each name, in that order.

        Raises:
            PassingError: they have not come.
        """
        total = sum(counts.values())
        _make_room(total)
        came: list[int] = []
        try:
            while len(came) < total:
                came += receive_batch(sock, timeout_s=timeout_s)
            if len(came) > total:
                raise PassingError(f"{len(came)} descriptors came, of {total} that were announced")
        except BaseException:
            close_all(came)
            raise
        left = iter(came)
        return DescriptorServer(
            {name: [next(left) for _ in range(count)] for name, count in counts.items()}, timeout_s=timeout_s
        )

    def close(self) -> None:
        """Stop, and close the descriptors. Those who received them keep theirs. Twice is fine."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._wake.close()
            if self._serving is not None:
                with contextlib.suppress(OSError):
                    self._serving.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._woken.close()
        for descriptors in self._descriptors.values():
            close_all(descriptors)

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        while True:
            poller.poll()
            with self._lock:
                if self._is_closed:
                    return
                sock, _ = self._listener.accept()
                self._serving = sock
            with sock:
                try:
                    self._answer(sock)
                except (EOFError, OSError, ValueError, KeyError, codec.DecodeError, PassingError) as error:
                    if not self._is_closed:
                        logger.warning("a process that asked for descriptors was dropped: %r", error)
                finally:
                    with self._lock:
                        self._serving = None

    def _answer(self, sock: socket.socket) -> None:
        """Serve one process. The others wait meanwhile; it takes milliseconds."""
        _check_same_user(sock)
        sock.settimeout(min(timeouts.HELLO_S, self._timeout_s))
        token = codec.decode(recv_frame(sock, limit=_HELLO_LIMIT), str)
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            raise PassingError("it showed a wrong token")
        wanted = codec.decode(recv_frame(sock), list[bytes])
        chosen = [descriptor for name in wanted for descriptor in self._descriptors[name]]
        for start in range(0, len(chosen), BATCH):
            send_batch(sock, chosen[start : start + BATCH], timeout_s=self._timeout_s)


def fetch(
    address: str, counts: Mapping[bytes, int], *, timeout_s: float = timeouts.DESCRIPTORS_S
) -> Generator[list[int], None, None]:
    """Ask a `DescriptorServer`, of another process or this one, for descriptors.

    Args:
        address: of the server.
        counts: how many descriptors the server has under each name.
        timeout_s: for each step of the other side.

    Yields:
        The next descriptors, in the order of `counts`, with no respect to where one name ends. The caller closes them.

    Raises:
        PassingError: the server is gone, belongs to another user, or has no such name.
    """
    if not address:
        raise PassingError("nobody offers them")
    name, _, token = address.partition("/")
    left = sum(counts.values())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(f"\0{name}")
            _check_same_user(sock)
            sock.sendall(frame(codec.encode(token)))
            sock.sendall(frame(codec.encode(list(counts))))
        except OSError as error:
            raise PassingError(f"they cannot be asked for: {_reason(error, timeout_s)}") from error
        while left > 0:
            descriptors = receive_batch(sock, timeout_s=timeout_s)
            left -= len(descriptors)
            yield descriptors


def _check_same_user(sock: socket.socket) -> None:
    """Refuse a process of another user at the other end.

    Raises:
        PassingError: it is one.
    """
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.geteuid():
        raise PassingError(f"the process at the other end belongs to user {user}, this one to {os.geteuid()}")


def _make_room(count: int) -> None:
    """Let this process have `count` more files open, as far as its hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + _SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reason(error: OSError, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {timeout_s:g} s"
    return _GONE if isinstance(error, ConnectionError) else str(error)
