"""How scheduler processes that act together fail together: all of them hear of a failure before any of them raises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from spmd_engine.control.framing import Frame
from spmd_engine.errors import ErrorReport, SpmdEngineError

logger = logging.getLogger(__name__)

#: All-gather of a header and a blob over the scheduler processes that act together; also a barrier.
Exchange = Callable[[dict[str, Any], bytes], list[Frame]]
#: [kind, message] of what went wrong on a rank, None if nothing did.
Failure = list[str] | None
#: `attempt` for one process.
Attempt = Callable[[Callable[[], object]], Failure]


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
        failure = [type(error).__name__, str(error)]
    except Exception as error:
        logger.exception("weight update failed")
        failure = ["TransferError", f"rank {rank}: {type(error).__name__}: {error}"]
    if failure is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return failure


def raise_first(frames: list[Frame], ranks: tuple[int, ...]) -> None:
    """Raise the failure of the first rank that has one: the same on all of them.

    Args:
        frames: what every rank has sent, "error" in its header.
    """
    for rank, (header, _) in zip(ranks, frames, strict=True):
        if header["error"] is not None:
            kind, message = header["error"]
            raise ErrorReport(kind, message, rank).to_exception()


def verdict(ranks: tuple[int, ...], frames: list[Frame]) -> ErrorReport | None:
    """What the ranks' announcements of a call amount to: None if all made the same one, alone."""
    headers = [header for header, _ in frames]
    for rank, header in zip(ranks, headers, strict=True):
        if header.get("error"):
            kind, message = header["error"]
            return ErrorReport(kind, f"rank {rank}: {message}", rank)
    if len({(header["kind"], header["digest"]) for header in headers}) > 1:
        calls = "; ".join(f"rank {rank}: {h['summary']}" for rank, h in zip(ranks, headers, strict=True))
        return ErrorReport(
            "CollectiveMismatchError",
            f"the ranks made different calls, or passed different arguments to the same one: {calls}. "
            "All ranks must make the same calls in the same order",
        )
    for rank, header in zip(ranks, headers, strict=True):
        if header.get("refusal"):
            kind, message = header["refusal"]
            return ErrorReport(kind, f"rank {rank}: {message}", rank)
    overlapped = [rank for rank, header in zip(ranks, headers, strict=True) if header["overlapped"]]
    if overlapped:
        return ErrorReport(
            "EngineBusyError",
            f"{headers[0]['summary']} was called on rank {overlapped[0]} while another call of its engine was running; "
            "wait for that one to return",
        )
    return None
