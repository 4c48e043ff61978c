"""The trainer's side of `update_weights`: describe the source, meet the other ranks once, send what changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from spmd_engine import _native
from spmd_engine.digest import digest
from spmd_engine.errors import PlanError
from spmd_engine.layout import SourceLayout
from spmd_engine.process import SchedulerProcess
from spmd_engine.rendezvous import Rendezvous
from spmd_engine.sources import Source, describe, ranks_of


@dataclass(frozen=True)
class UpdateRequest:
    """What one `update_weights` sends.

    Attributes:
        payload: for the own scheduler process.
        agreed: what all ranks must have in common.
        summary: for messages.
        source: keeps the shards alive.
    """

    payload: dict[str, Any]
    agreed: Any
    summary: str
    source: Source = field(repr=False)


class WeightUpdates:
    """State that lasts between the weight updates of one engine, on the trainer's side."""

    def __init__(self, rank: int, replica: tuple[int, ...], process: SchedulerProcess, timeout_s: float) -> None:
        self._rank, self._replica = rank, replica
        self._process, self._timeout_s = process, timeout_s
        self._linked = {replica}
        self._known: set[str] = set()  # layouts that the scheduler process has
        self._last: tuple[str, np.ndarray] | None = None
        self._ptrace_allowed = False
        self.last_ranks = replica

    def prepare(
        self,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        verify: bool,
        watch: Callable[[], None],
    ) -> UpdateRequest:
        """Describe `source` for the scheduler process.

        Raises:
            PlanError: see `sources.describe`.
            CollectiveTimeoutError: a rank that holds shards did not come to the first update.
        """
        ranks = tuple(sorted({*self._replica, *ranks_of(source)}))
        self.last_ranks = self._replica if set(ranks) == set(self._replica) else ranks
        described, refusal = None, None
        try:
            described = describe(source, self._rank)
        except PlanError as error:
            refusal = error
        # Ranks of other replicas may be waiting to link: they must hear of a refusal, too.
        self._link(self.last_ranks, refusal, watch)
        if described is None:
            assert refusal is not None
            raise refusal
        self._allow_reading()
        key = digest([_plain(described.layout), sorted(described.optional)])
        moved = self._last is None or self._last[0] != key or not np.array_equal(self._last[1], described.addresses)
        payload = {
            "ranks": self.last_ranks,
            "key": key,
            "layout": None if key in self._known else described.layout,
            "optional": described.optional,
            "pid": os.getpid(),
            "addresses": described.addresses if moved else None,
            "verify": verify,
        }
        summary = f"{len(described.layout.weights)} weights over ranks {list(self.last_ranks)}, layout {key[:8]}, verify={verify}"
        return UpdateRequest(payload, [self.last_ranks, key, verify], summary, described)

    def committed(self, request: UpdateRequest) -> None:
        """Remember what the scheduler process now knows."""
        self._known.add(request.payload["key"])
        self._last = (request.payload["key"], request.source.addresses)

    def _link(self, ranks: tuple[int, ...], refusal: PlanError | None, watch: Callable[[], None]) -> None:
        """Connect the scheduler processes of all ranks that hold shards, once for each set of ranks."""
        if ranks in self._linked:
            return
        note = {"refusal": None if refusal is None else str(refusal)}
        meeting = Rendezvous(ranks, self._rank, "update").meet(note, timeout_s=self._timeout_s, watch=watch)
        if len({note["node"] for note in meeting.notes}) > 1:
            raise PlanError(f"the ranks {list(ranks)} that hold shards are on several nodes, which is not supported yet")
        fd = meeting.link.listener_fd
        self._process.send(meeting.link, fds=(fd,) if fd >= 0 else ())
        if fd >= 0:
            os.close(fd)
        self._linked.add(ranks)
        for rank, note in zip(ranks, meeting.notes, strict=True):
            if note["refusal"] and refusal is None:
                raise PlanError(f"rank {rank} refused: {note['refusal']}")

    def _allow_reading(self) -> None:
        """Let the scheduler processes read this process's memory where Yama restricts ptrace to descendants."""
        if not self._ptrace_allowed:
            _native.allow_ptrace_by_any()
            self._ptrace_allowed = True


def _plain(layout: SourceLayout) -> list[Any]:
    """The layout as plain values for a digest."""
    meshes = [[mesh.shape, mesh.ranks] for mesh in layout.meshes]
    weights = [[w.name, w.shape, w.dtype, w.mesh, [repr(p) for p in w.placements]] for w in layout.weights]
    return [meshes, weights]
