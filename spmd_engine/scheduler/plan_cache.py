"""Keeps the last few layouts and their plans, each until SGLang replaces a parameter that it writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spmd_engine.control.messages import KNOWN_LAYOUTS
from spmd_engine.planning.layout import SourceLayout
from spmd_engine.planning.plan import TransferPlan
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.transfer import bucketed, direct
from spmd_engine.transfer.fingerprint import Fingerprint
from spmd_engine.transfer.handles import OpenHandles

#: Of each rank of an update the number of its node, and whether its shards are in CPU memory.
SourceTopology = tuple[tuple[int, bool], ...]
#: A plan is for one layout, and for one topology: what cannot be read in place takes another plan.
PlanKey = tuple[str, SourceTopology]


@dataclass
class Prepared:
    """A plan, and what it needs to run.

    Attributes:
        plan: of what is read in place.
        buffers: whole weights for the fallback.
        converted: those of them that the loader knows under other names.
        record_s, plan_s: seconds that recording and planning took.
        transfer: runs `plan`.
        bucketed: moves what cannot be read in place; None if there is nothing.
        has_constants: the loader fills some elements by itself.
        derivations: what derives tensors that are no parameters.
        target: of SGLang's parameters; a loader that replaces one makes the plan void.
        opened_at: generation of the opened memory whose addresses the plan holds; -1 before it holds any.
    """

    layout: SourceLayout
    plan: TransferPlan
    buffers: dict[str, torch.Tensor]
    converted: frozenset[str]
    record_s: float
    plan_s: float
    transfer: direct.Transfer
    bucketed: bucketed.BucketedTransfer | None
    has_constants: bool
    derivations: list[Callable[[], Any]]
    target: Fingerprint
    opened_at: int = -1

    def close(self) -> None:
        self.transfer.close()
        if self.bucketed is not None:
            self.bucketed.close()


class Places:
    """Where the shards of all ranks are, and what of it this process has mapped.

    A plan holds addresses of one `generation`: it grows when shards move and when a mapping is closed, and a plan of
    an earlier generation must be opened again before it may run.

    Args:
        handles: what this process has mapped; None on the CPU, where nothing need be.
    """

    def __init__(self, handles: OpenHandles | None) -> None:
        self.handles = handles
        self._moves = 0
        self._memories: dict[int, ShardMemory] = {}

    @property
    def generation(self) -> int:
        """Grows when shards move, and when something that was mapped is closed."""
        return self._moves + (0 if self.handles is None else self.handles.generation)

    def take(self, told: Mapping[int, ShardMemory | None]) -> None:
        """Remember where shards are now, of each rank whose shards have moved."""
        for rank, memory in told.items():
            if memory is not None:
                self._memories[rank] = memory
                self._moves += 1

    def of(self, ranks: tuple[int, ...]) -> dict[int, ShardMemory]:
        """Where the shards of some ranks are, in their order."""
        return {rank: self._memories[rank] for rank in ranks}

    def keep_only(self, handles: list[bytes]) -> None:
        """Close what is mapped of other memory."""
        if self.handles is not None:
            self.handles.keep_only(handles)

    def close(self) -> None:
        """Close all that is mapped, so that its owners can free it."""
        self.keep_only([])


class PlanCache:
    """The plans of the last few layouts, which hold tables and buffers on the device, and the layouts themselves.

    All ranks use the same layouts in the same order, so all of them drop the same ones.
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[PlanKey, Prepared] = OrderedDict()
        self._layouts: OrderedDict[str, tuple[SourceLayout, frozenset[str]]] = OrderedDict()
        self._topologies: dict[str, SourceTopology] = {}  # the last one of each layout
        # How often SGLang may have replaced parameters, and when that was looked at last.
        self._changes, self._inspected = 1, 0

    def learn(self, key: str, layout: SourceLayout | None, optional: frozenset[str]) -> None:
        """Take a layout, or use one that is known: it is now the last one to be dropped."""
        if layout is not None:
            self._layouts[key] = (layout, optional)
        self._layouts.move_to_end(key)
        while len(self._layouts) > KNOWN_LAYOUTS:
            dropped, _ = self._layouts.popitem(last=False)
            self._topologies.pop(dropped, None)
            self.drop(dropped)

    def layout(self, key: str) -> tuple[SourceLayout, frozenset[str]]:
        """A layout that was learnt, and the names of weights in it that need not be used."""
        return self._layouts[key]

    def latest(self, key: str) -> Prepared | None:
        """The plan with which a layout was moved last."""
        return self._plans.get((key, self._topologies.get(key, ())))

    def get(self, key: PlanKey) -> Prepared | None:
        return self._plans.get(key)

    def use(self, key: PlanKey, prepared: Prepared) -> None:
        """Keep a plan, with which its layout is moved now."""
        self._plans[key] = prepared
        self._topologies[key[0]] = key[1]

    def all(self) -> list[Prepared]:
        """The plans that are kept."""
        return list(self._plans.values())

    def drop(self, layout: str) -> None:
        """Drop all plans for a layout."""
        self._drop([key for key in self._plans if key[0] == layout])

    def drop_bucketed(self) -> None:
        """Drop all plans that use buckets: they share a network and a packer, which have failed."""
        self._drop([key for key, prepared in self._plans.items() if prepared.bucketed is not None])

    def parameters_may_change(self) -> None:
        """SGLang runs, or a loader: either may replace parameters."""
        self._changes += 1

    def drop_stale(self, model: torch.nn.Module) -> None:
        """Drop plans whose parameters SGLang has replaced."""
        if self._inspected != self._changes:
            self._drop([key for key, prepared in self._plans.items() if not prepared.target.holds(model)])
            self._inspected = self._changes

    def _drop(self, keys: list[PlanKey]) -> None:
        for key in keys:
            self._plans.pop(key).close()
