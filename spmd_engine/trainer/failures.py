"""Explains why a scheduler process says nothing any more, with what the other ranks know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from spmd_engine.control import timeouts
from spmd_engine.control.messages import Failed
from spmd_engine.errors import CollectiveTimeoutError, SchedulerDiedError, SpmdEngineError
from spmd_engine.trainer.process import SchedulerProcess
from spmd_engine.trainer.rendezvous import Rendezvous, bounded


class Failures:
    """Makes the errors of one engine, and leaves word for the other ranks in the store where they meet.

    Args:
        rank: global rank of the trainer.
        process: its scheduler process.
        rendezvous: of the ranks of the replica.
    """

    def __init__(self, rank: int, process: SchedulerProcess, rendezvous: Rendezvous) -> None:
        self._rank, self._process, self._rendezvous = rank, process, rendezvous

    def post(self, key: str, value: dict[str, Any]) -> None:
        """Leave word for the other ranks, if the store still answers."""
        _bounded(lambda: self._rendezvous.post(f"{key}/{self._rank}", value))

    def own_death(self, phase: str) -> SchedulerDiedError:
        status = self._process.wait(timeouts.EXIT_STATUS_S)
        report = {"exit_status": status, "log_tail": self._process.log_tail()}
        self.post("died", report)
        return _died(self._rank, f"the scheduler process of rank {self._rank} ended during {phase}", report)

    def death_of_others(self, phase: str) -> SchedulerDiedError | None:
        """Of a process of another rank, if one has died: until they are connected, the processes do not notice it."""
        for rank in self._rendezvous.ranks:
            if rank != self._rank:
                report = _bounded(partial(self._rendezvous.poll, f"died/{rank}"))
                if report is not None:
                    return _died(rank, f"the scheduler process of rank {rank} ended during {phase}", report)
        return None

    def peer_failure(self, message: Failed) -> SpmdEngineError:
        error = message.error.to_exception()
        if isinstance(error, SchedulerDiedError):
            rank = error.rank
            report = _bounded(lambda: _await_key(self._rendezvous, f"died/{rank}"))
            return _died(rank, str(error), report or {})
        return error

    def no_answer(self, phase: str, timeout_s: float) -> CollectiveTimeoutError:
        """Why a scheduler process says nothing: it, or one that it waits for, is stopped; or it is not known."""
        mine = {"is_stopped": self._process.is_stopped(), "pid": self._process.pid}
        self.post("hung", mine)
        reports = {self._rank: mine}
        if not mine["is_stopped"]:  # this rank's process may wait for another one, whose rank finds out about now
            reports.update(bounded(self._reports_of_others, timeout_s=2 * timeouts.EXPLANATION_S) or {})
        stopped = [(rank, report["pid"]) for rank, report in reports.items() if report["is_stopped"]]
        cause = "".join(f"; that of rank {rank} (pid {pid}) is stopped (SIGSTOP, a debugger)" for rank, pid in stopped)
        return CollectiveTimeoutError(
            f"rank {self._rank}: its scheduler process (pid {self._process.pid}) gave no answer to {phase} within "
            f"{timeout_s:.0f} s{cause}. End of its log:\n{self._process.log_tail()}"
        )

    def _reports_of_others(self) -> dict[int, dict[str, Any]]:
        """What the other ranks say of their processes, until one of them is stopped, or all have."""
        missing = {rank for rank in self._rendezvous.ranks if rank != self._rank}
        reports: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + timeouts.EXPLANATION_S
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if (report := self._rendezvous.poll(f"hung/{rank}")) is not None:
                    reports[rank] = report
                    missing.discard(rank)
                    if report["is_stopped"]:
                        return reports
            time.sleep(0.02)
        return reports


def copy_of(error: Exception) -> Exception:
    """One more of the same kind: an exception that several raise would collect the tracebacks of all of them."""
    copy = type(error)(*error.args)
    vars(copy).update(vars(error))
    return copy


def _died(rank: int, what: str, report: Mapping[str, Any]) -> SchedulerDiedError:
    status, tail = report.get("exit_status"), str(report.get("log_tail", ""))
    how = "" if status is None else f" ({'signal ' + str(-status) if status < 0 else 'exit status ' + str(status)})"
    text = f"{what}{how}"
    if "cause" in report:
        text += f": {report['cause']}"
    if tail:
        text += f". End of its log:\n{tail}"
    return SchedulerDiedError(text, rank=rank, exit_status=status, log_tail=tail)


def _await_key(rendezvous: Rendezvous, key: str) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeouts.EXPLANATION_S
    while (found := rendezvous.poll(key)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _bounded(call: Callable[[], Any]) -> Any:
    return bounded(call, timeout_s=timeouts.EXPLANATION_S)
