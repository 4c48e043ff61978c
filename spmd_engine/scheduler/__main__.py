"""Entry of a scheduler process: `python -m spmd_engine.scheduler FD`, started by `spmd_engine.trainer.process`."""

from __future__ import annotations

import gc
import io
import signal
import socket
import sys
import time
import traceback
from typing import Any

from spmd_engine.control import timeouts
from spmd_engine.control.channel import Channel
from spmd_engine.control.messages import FOR_THE_TRAINER, PROTOCOL, Ready, Start, ToScheduler
from spmd_engine.control.peer_group import PeerGone, PeerGroup, PeerTimeout
from spmd_engine.errors import ErrorReport, SpmdEngineError
from spmd_engine.scheduler.watchdog import Watchdog


class _LossyFile(io.FileIO):
    """A log whose writer goes on when the disk is full: what cannot be written is lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def main() -> None:
    sys.stdout, sys.stderr = (io.TextIOWrapper(_LossyFile(fd, "w", closefd=False), write_through=True) for fd in (1, 2))  # type: ignore[type-var]
    for number in FOR_THE_TRAINER:  # blocked so far
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_TRAINER)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    channel = Channel[ToScheduler](sock, ToScheduler)
    start, _ = channel.recv(timeouts.FIRST_MESSAGE_S)
    if not isinstance(start, Start) or start.protocol != PROTOCOL:
        raise SystemExit(f"expected Start of protocol {PROTOCOL}, got {start!r}")
    watchdog = Watchdog(
        start.rank, channel, replica=start.group.ranks, trainer_pid=start.trainer_pid, scratch=start.scratch
    )
    watchdog.start()
    try:
        try:
            replica = PeerGroup(start.rank, start.group, timeout_s=start.timeout_s)
        except (PeerTimeout, PeerGone) as error:
            watchdog.die(ErrorReport("SchedulerDiedError", f"no connection to a peer: {error}", error.rank))
        watchdog.watch(replica)
        _serve(start, channel, replica, watchdog)
    except SpmdEngineError as error:
        watchdog.die(ErrorReport(type(error).__name__, str(error), start.rank))
    except BaseException as error:
        traceback.print_exc()
        time.sleep(timeouts.CAUSE_FIRST_S if start.nnodes == 1 else timeouts.CAUSE_FIRST_OVER_NODES_S)
        where = traceback.extract_tb(error.__traceback__)[-1]
        watchdog.die(
            ErrorReport(
                "SchedulerError",
                f"the scheduler process of rank {start.rank} raised {type(error).__name__}: {error} "
                f"({where.filename}:{where.lineno})",
                start.rank,
            )
        )


def _serve(start: Start, channel: Channel[ToScheduler], replica: PeerGroup, watchdog: Watchdog) -> None:
    from spmd_engine.scheduler.adapter import starting
    from spmd_engine.scheduler.receiver import Receiver

    receiver = Receiver(start, channel, replica, watchdog)
    scheduler = starting.make_scheduler(start, receiver=receiver, sink=receiver.outputs)
    receiver.attach(scheduler)
    # What SGLang has imported and built stays for good; traversing it would pause a rollout for half a second.
    gc.collect()
    gc.freeze()
    channel.send(Ready(receiver.memory()))
    receiver.prerecord()
    scheduler.run_event_loop()


if __name__ == "__main__":
    main()
