"""Lets scheduler processes that act together fail together: all of them hear of a failure before any of them raises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec
import torch

from spmd_engine.errors import ErrorReport, SpmdEngineError

logger = logging.getLogger(__name__)

M = TypeVar("M")
#: What went wrong on a rank, None if nothing did.
Failure = ErrorReport | None
#: `attempt` for one process.
Attempt = Callable[[Callable[[], object]], Failure]


class AllGather(Protocol):
    """All-gather of a message over the scheduler processes that act together; also a barrier."""

    def __call__(self, message: M) -> list[M]: ...


class Outcome(msgspec.Struct, frozen=True):
    """How a step went on one rank."""

    error: Failure = None


class HasError(Protocol):
    """A message of a rank that may have failed."""

    @property
    def error(self) -> Failure: ...


class Announcement(msgspec.Struct, frozen=True):
    """What a rank is about to do in a collective call.

    Attributes:
        call: name of the call.
        digest, summary, is_overlapped: of the `Call`.
        ranks: of all replicas that make it together; () for the own replica.
        refusal: why this rank cannot make it now.
        error: what the rank's replica has found out already, so that other replicas hear of it.
        tokens: digest of the tokens that this rank has made; see `Outputs.digest`.
    """

    call: str
    digest: str
    summary: str
    is_overlapped: bool
    ranks: tuple[int, ...]
    refusal: Failure
    tokens: str
    error: Failure = None


def attempt(action: Callable[[], object], *, rank: int, device: torch.device) -> Failure:
    """Run `action`; its failure, for the other ranks to hear.

    Args:
        rank: of this process, for the message.
        device: which the action may use; after a failure nothing runs on it any more.

    Raises:
        torch.AcceleratorError: the GPU is lost to this process, as after a kernel that failed: another one must
            take its place.
    """
    failure: Failure = None
    try:
        action()
    except SpmdEngineError as error:
        failure = ErrorReport(type(error).__name__, str(error), rank)
    except Exception as error:
        logger.exception("weight update failed")
        failure = ErrorReport("TransferError", f"rank {rank}: {type(error).__name__}: {error}", rank)
    if failure is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return failure


def raise_first(outcomes: Sequence[HasError]) -> None:
    """Raise the failure of the first rank that has one: the same on all of them."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error.to_exception()


def verdict(ranks: tuple[int, ...], announced: Sequence[Announcement]) -> ErrorReport | None:
    """What the ranks' announcements of a call amount to: None if all make the same one, alone."""
    each = list(zip(ranks, announced, strict=True))
    for rank, one in each:
        if one.error is not None:
            return ErrorReport(one.error.kind, f"rank {rank}: {one.error.message}", rank)
    if len({(one.call, one.digest) for one in announced}) > 1:
        calls = "; ".join(f"rank {rank}: {one.summary}" for rank, one in each)
        return ErrorReport(
            "CollectiveMismatchError",
            f"the ranks made different calls, or passed different arguments to the same one: {calls}. "
            "All ranks must make the same calls in the same order",
        )
    for rank, one in each:
        if one.refusal is not None:
            return ErrorReport(one.refusal.kind, f"rank {rank}: {one.refusal.message}", rank)
    overlapped = [rank for rank, one in each if one.is_overlapped]
    if overlapped:
        return ErrorReport(
            "EngineBusyError",
            f"{announced[0].summary} was called on rank {overlapped[0]} while another call of its engine was running; "
            "wait for that one to return",
        )
    return None
