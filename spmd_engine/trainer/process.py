"""The scheduler process of this trainer rank: how it is started, heard, and ended."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from spmd_engine.control import timeouts
from spmd_engine.control.channel import Channel, ChannelClosed, ChannelTimeout
from spmd_engine.control.messages import FOR_THE_TRAINER, Packing, Shutdown, Start, ToTrainer

logger = logging.getLogger(__name__)

LOG_TAIL_BYTES = 4000
# How a process that crashes begins; stacks of all its threads, and a list of all its modules, follow.
_CRASHES = ("terminate called", "Fatal Python error")
_CRASH_BYTES = 64 << 10


class ProcessDied(Exception):
    """The scheduler process ended without saying why."""


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """A process that is started in here does not hear `FOR_THE_TRAINER` until it has chosen to."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SchedulerProcess:
    """A running `python -m spmd_engine.scheduler`, the child of this process.

    Args:
        start: its first message; `start.group.listener_fd` and `start.store_fd`, if any, are handed over and closed
            here, and `start.scratch` is removed when the process has ended.
        env: its whole environment.
        log: open file for what it prints, from `open_log`; closed when the process has ended.

    Attributes:
        on_packing: takes the socket over which the process asks for shards to be packed.
    """

    def __init__(self, start: Start, *, env: dict[str, str], log: IO[bytes]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.rank = start.rank
        self._scratch = start.scratch
        self.log = log
        handed_over = [fd for fd in (start.group.listener_fd, start.store_fd) if fd >= 0]
        # -P: a package of the same name in the working directory is not ours.
        command = [sys.executable, "-P", "-m", "spmd_engine.scheduler", str(theirs.fileno())]
        try:
            with _blocked():
                self._popen = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *handed_over),
                )
        except BaseException:
            ours.close()
            self.log.close()
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            theirs.close()
            for fd in handed_over:
                os.close(fd)
        self.pid = self._popen.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except (OSError, AttributeError):  # not offered by this kernel or Python: a closed socket still tells
            self._pidfd = -1
        self._owner_pid = os.getpid()
        self.channel = Channel[ToTrainer](ours, ToTrainer)
        self.on_packing: Callable[[socket.socket], None] = lambda sock: sock.close()
        self._timeout_s = start.timeout_s
        self.send(start)

    def send(self, message: object, fds: tuple[int, ...] = ()) -> None:
        """Send a message. A process that is gone is noticed by the next `recv`, which knows more.

        Raises:
            ChannelTimeout: the process did not read for `timeout_s` seconds.
        """
        with contextlib.suppress(ChannelClosed):
            self.channel.send(message, fds, timeout_s=self._timeout_s)

    def recv(self, *, timeout_s: float, spin_s: float = 0.0) -> ToTrainer:
        """The next message. Arguments as for `Channel.recv`.

        Raises:
            ChannelTimeout: nothing in `timeout_s` seconds.
            ProcessDied: the process ended.
        """
        while True:
            try:
                message, fds = self.channel.recv(timeout_s, self._pidfd, spin_s)
            except ChannelClosed:
                raise ProcessDied from None
            if not isinstance(message, Packing):
                return message
            # If nobody takes the socket it is closed, and the scheduler process fails the update, on all ranks.
            if not fds:
                logger.error("rank %d cannot pack its shards: too many files are open (ulimit -n)", self.rank)
                continue
            sock = socket.socket(fileno=fds[0])
            try:
                self.on_packing(sock)
            except RuntimeError as error:  # there is no thread left
                sock.close()
                logger.error("rank %d cannot pack its shards: %s", self.rank, error)

    def wait(self, timeout_s: float) -> int | None:
        """Exit status once the process has ended, None if it still runs after `timeout_s` seconds."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def is_stopped(self) -> bool:
        """Whether the process is stopped, by SIGSTOP or a debugger."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
        return False

    def log_tail(self) -> str:
        """The end of the log; of a crash, how it begins."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self.log.fileno()).st_size
            text = os.pread(self.log.fileno(), _CRASH_BYTES, max(0, size - _CRASH_BYTES)).decode(errors="replace")
            crashes = [at for word in _CRASHES if (at := text.find(word)) >= 0]
            if crashes:
                text = text[: min(crashes) + LOG_TAIL_BYTES // 2]
            return text[-LOG_TAIL_BYTES:].strip()
        return ""

    def stop(self, *, grace_s: float) -> None:
        """End the process: asked first, killed after `grace_s` seconds. Safe to call again.

        One that hangs in a call of the kernel, of the GPU's driver, say, is left behind.
        """
        if os.getpid() != self._owner_pid:  # a forked copy of the trainer must not end its parent's engine
            return
        if self._popen.poll() is None and grace_s > 0:
            with contextlib.suppress(ChannelClosed, ChannelTimeout):
                self.channel.send(Shutdown(), timeout_s=grace_s)
            self.wait(grace_s)
        if self._popen.poll() is None:
            self._popen.kill()
        if self.wait(timeouts.KILL_S) is None:
            logger.error("rank %d: scheduler process %d does not end: it hangs in the kernel", self.rank, self.pid)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self.channel.close()
        self.log.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def open_log(log_dir: str | os.PathLike[str] | None, rank: int) -> IO[bytes]:
    """A new log in `log_dir`, for its owner alone; without one, a file without a name that vanishes with the processes
    that have it open."""
    if log_dir is None:
        return tempfile.TemporaryFile(prefix="spmd-engine-")
    directory = Path(log_dir)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    prefix = f"scheduler-rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-"
    fd, _ = tempfile.mkstemp(prefix=prefix, suffix=".log", dir=directory)
    return open(fd, "w+b")
