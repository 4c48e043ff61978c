"""Which of many errors is the first cause: when one rank of a job fails, the others fail after it, or before it."""

from __future__ import annotations

from dataclasses import dataclass, field

from spmd_engine.errors import CollectiveTimeoutError, EngineClosedError, RankFailedError, SchedulerDiedError

# What gloo and torch's store say on ranks that lose a peer: consequences, never causes.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "DistNetworkError",
    "DistStoreError",
    "DistError",
)
_MAX_LINE = 300


@dataclass(frozen=True)
class RankFailure:
    """How one rank failed.

    Attributes:
        rank: global rank.
        error: what it raised, or what the launcher says of its end.
        where: node address and process id of the rank.
        text: the traceback on the rank; "" if its process is gone.
        is_process_gone: its process ended, and the error is not its own.
    """

    rank: int
    error: BaseException
    where: str
    text: str = field(default="", repr=False)
    is_process_gone: bool = False

    @property
    def culprit(self) -> int:
        """The rank that this error blames."""
        blamed = self.error.rank if isinstance(self.error, SchedulerDiedError) else -1
        return blamed if blamed >= 0 else self.rank

    @property
    def is_own(self) -> bool:
        """Whether the cause lies in this very rank."""
        return self.distance <= 2

    @property
    def distance(self) -> int:
        """How far this is from a first cause.

        0: the rank's own code raised; 1: its process ended; 2: its scheduler process ended; 3: it says so of another
        rank; 4: it lost a connection, or waited too long.
        """
        if isinstance(self.error, SchedulerDiedError):
            return 2 if self.culprit == self.rank else 3
        if self.is_process_gone:
            return 1
        text = f"{type(self.error).__name__}: {self.error}"
        is_consequence = isinstance(self.error, CollectiveTimeoutError | EngineClosedError)
        return 4 if is_consequence or any(sign in text for sign in _LOST_PEER) else 0


def first_cause(failures: list[RankFailure]) -> RankFailure:
    """The failure that explains the others.

    When one rank fails, the others fail, too, some of them before its own error has come: a rank's own exception
    explains a lost peer, and the end of a process explains what others say about it.

    Args:
        failures: in the order in which they became known.
    """
    return min(failures, key=lambda failure: failure.distance)  # min keeps the order among equals


def as_error(what: str, failures: list[RankFailure], world_size: int) -> RankFailedError:
    """One error for the driver, with the first cause first.

    Args:
        what: the ranks were doing.
        failures: in the order in which they became known; at least one.
    """
    first = first_cause(failures)
    kind, lines = type(first.error).__name__, [f"{what}: rank {first.culprit} failed first"]
    if first.culprit != first.rank:
        lines[0] += f", says rank {first.rank}"
    lines[0] += f" ({first.where}): {kind}: {first.error}"
    others = [failure for failure in failures if failure is not first]
    for failure in sorted(others, key=lambda failure: failure.rank):
        summary = f"{type(failure.error).__name__}: {failure.error}".partition("\n")[0]
        lines.append(f"then rank {failure.rank} ({failure.where}): {summary[:_MAX_LINE]}")
    silent = world_size - len(failures)
    if silent:
        lines.append(f"{silent} of {world_size} ranks had returned, or said nothing")
    if first.text:
        lines.append(f"Traceback on rank {first.rank}:\n{first.text}")
    errors = {failure.rank: failure.error for failure in failures}
    return RankFailedError("\n".join(lines), rank=first.culprit, cause=first.error, errors=errors)
