"""The errors a user can catch. Every one says what happened, on which rank, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The kinds of an engine's memory that can be released: SGLang's names.
MEMORY_TAGS = ("weights", "kv_cache", "cuda_graph")


class SpmdEngineError(RuntimeError):
    """Base of all errors that spmd_engine raises."""


class ConfigError(SpmdEngineError):
    """The engine cannot start with these arguments. Nothing is left running."""


class CollectiveMismatchError(SpmdEngineError):
    """The ranks of a replica made different calls. Raised on all of them; the engine stays usable."""


class CollectiveTimeoutError(SpmdEngineError):
    """A rank did not reach the call, or the call did not finish, within `timeout_s`.

    The engine is closed, unless this call had not begun: then another thread's call of this rank goes on.
    """


class EngineBusyError(SpmdEngineError):
    """Another thread of this rank was inside a call of the engine, or its requests are paused.

    Raised on all ranks; the engine stays usable.
    """


class EngineClosedError(SpmdEngineError):
    """The engine was shut down, here or on another rank of its replica."""


class InvalidRequestError(SpmdEngineError, ValueError):
    """A prompt or sampling parameter that SGLang cannot serve. The engine stays usable."""


class PlanError(SpmdEngineError, ValueError):
    """A weight source does not fit the engine's parameters. Nothing was written; the old weights still serve."""


class TransferError(SpmdEngineError):
    """Moving the weights failed after a correct plan, for example because shards could not be read."""


class MemoryNotOfferedError(TransferError):
    """File descriptors of a trainer's memory, of expandable segments, could not be fetched. `update_weights` has tried
    twice: where the engine of another replica had closed that memory while it slept, they had to be offered again."""


class WeightsInconsistentError(SpmdEngineError):
    """The parameters hold no complete weight version: an update failed after it had begun to write, their memory was
    released without a backup, or the engine was restarted. `generate` refuses until an update succeeds."""


class MemoryOccupationError(SpmdEngineError):
    """A release or a resume that does not fit what is released, or for which there is no memory.

    Raised on all ranks of the replica; nothing was changed, and the engine stays usable.
    """


class AsleepError(MemoryOccupationError):
    """A call that needs memory which is released. Raised on all ranks; the engine stays usable."""


class SchedulerError(SpmdEngineError):
    """SGLang raised inside a scheduler process. The engine is closed."""


class SchedulerDiedError(SpmdEngineError):
    """A scheduler process, or the trainer rank that owned it, ended unexpectedly. The engine is closed.

    Attributes:
        rank: the global rank whose process ended first, as far as it is known.
        exit_status: `subprocess` return code of the scheduler process (negative: the signal), or None if unknown.
        log_tail: the end of that process's log, or "" if it could not be had.
    """

    def __init__(self, message: str, *, rank: int = -1, exit_status: int | None = None, log_tail: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_status = exit_status
        self.log_tail = log_tail


class RankFailedError(SpmdEngineError):
    """A rank of a job on Ray failed, and its error came to the driver.

    Attributes:
        rank: the global rank that failed first, as far as it is known.
        cause: its exception, or that of a rank which says so.
        errors: the exceptions of all ranks that had one, by rank.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int = -1,
        cause: BaseException | None = None,
        errors: Mapping[int, BaseException] | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause
        self.errors = dict(errors or {})


def as_utf8(text: str) -> str:
    """A text that can be told to another process: half of a surrogate pair, in a user's own message, is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class ErrorReport:
    """An error on its way from one process to another.

    Attributes:
        kind: class name in this module.
        message: what `str(error)` shows.
        rank: the global rank where the error arose, -1 if all ranks.
    """

    kind: str
    message: str
    rank: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", as_utf8(self.message))

    def to_exception(self) -> SpmdEngineError:
        """The typed exception; an unknown kind becomes a `SchedulerError`."""
        cls = globals().get(self.kind)
        if not (isinstance(cls, type) and issubclass(cls, SpmdEngineError)):
            return SchedulerError(f"{self.kind}: {self.message}")
        if cls is SchedulerDiedError:
            return SchedulerDiedError(self.message, rank=self.rank)
        return cls(self.message)
