"""The thread of a scheduler process that watches its trainer rank and its peers, and reports the first failure.

It must not wait for the main thread, which may sit in a collective of SGLang for ever once a peer is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from spmd_engine.control import timeouts
from spmd_engine.control.channel import Channel, ChannelClosed, ChannelTimeout
from spmd_engine.control.codec import DecodeError
from spmd_engine.control.messages import Failed, ToScheduler
from spmd_engine.control.peer_group import Alarm, Goodbye, PeerGroup, is_cut_off
from spmd_engine.errors import ErrorReport


class Watchdog(threading.Thread):
    """Ends this process, with a report to its trainer rank and to all peers, when one of them is gone.

    Args:
        rank: this process's global rank.
        channel: to the trainer rank.
        replica: ranks without which this process cannot generate.
        trainer_pid: process id of the trainer rank.
        scratch: directory that is removed if the trainer rank can no longer do it.
    """

    def __init__(
        self, rank: int, channel: Channel[ToScheduler], *, replica: tuple[int, ...], trainer_pid: int, scratch: str
    ) -> None:
        super().__init__(name="spmd_engine-watchdog", daemon=True)
        self.rank = rank
        self.departed: set[int] = set()  # ranks that shut their engine down
        self.is_generating: Callable[[], bool] = lambda: False
        self._channel = channel
        self._replica = replica
        self._trainer_pid = trainer_pid
        self._scratch = scratch
        self._groups: list[PeerGroup] = []
        self._dying = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        try:
            self._trainer = os.pidfd_open(trainer_pid)
        except (OSError, AttributeError):
            self._trainer = -1
        if os.getppid() != trainer_pid:
            os._exit(1)

    def watch(self, group: PeerGroup) -> None:
        """Watch this group, too."""
        self._groups.append(group)
        os.write(self._wake_write, b"+")

    def run(self) -> None:
        while True:
            poller = select.poll()
            poller.register(self._wake_read, select.POLLIN)
            poller.register(self._channel, select.POLLRDHUP)
            if self._trainer >= 0:
                poller.register(self._trainer, select.POLLIN)
            peers = {}
            for group in self._groups:
                for member, sock in group.alarms.items():
                    if member not in self.departed:
                        poller.register(sock, select.POLLIN)
                        peers[sock.fileno()] = (group, member, sock)
            for fd, _ in poller.poll():
                if fd == self._wake_read:
                    os.read(fd, 1)
                elif fd in (self._trainer, self._channel.fileno()):
                    self._trainer_gone()
                else:
                    self._hear(*peers[fd])

    def _hear(self, group: PeerGroup, member: int, sock: socket.socket) -> None:
        try:
            news = group.recv_alarm(sock)
        except (EOFError, OSError, ValueError, DecodeError) as error:
            what = f"the scheduler process of rank {member} ended unexpectedly"
            if is_cut_off(error):
                what = (
                    f"the scheduler process of rank {member} cannot be reached any more from rank {self.rank} "
                    f"({error}): its node is down, or the network between the two is"
                )
            self.die(ErrorReport("SchedulerDiedError", what, member))
            return
        if group.rank == group.root:
            group.alarm(news, skip=member)
        if isinstance(news, Goodbye):
            left = news.rank
            self.departed.add(left)
            if left in self._replica and self.is_generating():
                message = f"rank {left} shut its engine down in the middle of a call of rank {self.rank}"
                self.die(ErrorReport("EngineClosedError", message, left))
        else:
            self.die(news.error, forward=False)

    def _trainer_gone(self) -> None:
        # A trainer that goes away after `Shutdown` does no harm: the main thread ends this process by itself.
        shutil.rmtree(self._scratch, ignore_errors=True)
        message = f"the trainer process of rank {self.rank} (pid {self._trainer_pid}) ended"
        self.die(ErrorReport("SchedulerDiedError", message, self.rank))

    def die(self, error: ErrorReport, *, forward: bool = True) -> NoReturn:
        """Report `error` to the trainer rank and, unless it came from there, to the peers; then end this process."""
        if not self._dying.acquire(blocking=False):
            threading.Event().wait()  # another thread is reporting an earlier failure
        if forward:
            for group in self._groups:
                group.alarm(Alarm(error))
        with contextlib.suppress(ChannelClosed, ChannelTimeout):
            self._channel.send(Failed(error), timeout_s=timeouts.LAST_WORDS_S)
        print(f"[spmd_engine] rank {self.rank} ends: {error.kind}: {error.message}", file=sys.stderr, flush=True)
        os._exit(1)

    def leave(self) -> None:
        """Tell the peers that this process ends because its trainer rank said so; then end it."""
        self._dying.acquire()
        for group in self._groups:
            group.alarm(Goodbye(self.rank))
        os._exit(0)
