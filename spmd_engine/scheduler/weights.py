"""The scheduler process's side of `update_weights`: record and plan once, then copy, then commit on all ranks."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from spmd_engine.control.agreement import Exchange, Failure, attempt, raise_first
from spmd_engine.control.channel import Channel
from spmd_engine.control.framing import Frame
from spmd_engine.control.messages import Start
from spmd_engine.errors import SpmdEngineError, WeightsInconsistentError
from spmd_engine.planning import bucket_plan
from spmd_engine.planning.layout import SourceLayout, Weight, contiguous_strides
from spmd_engine.planning.plan import RecordedCopy, TransferPlan, build_plan, numbered
from spmd_engine.planning.read_sets import ReadSet, from_numbers, read_sets_of, to_numbers
from spmd_engine.scheduler.adapter import memory as sglang_memory
from spmd_engine.scheduler.adapter import model as sglang_model
from spmd_engine.scheduler.bucket_setup import Staging
from spmd_engine.scheduler.recording.checkpoint_format import Conversion
from spmd_engine.scheduler.recording.loading import (
    Foresight,
    Loads,
    as_loaded,
    check_all_used,
    recorded,
    write_constants,
)
from spmd_engine.scheduler.recording.recording import DTYPES
from spmd_engine.stats import UpdateStats
from spmd_engine.transfer import direct
from spmd_engine.transfer.bucketed import BucketedTransfer
from spmd_engine.transfer.fd_passing import DescriptorServer, PassingError
from spmd_engine.transfer.fingerprint import Probe
from spmd_engine.transfer.handles import OpenHandles, ShardMemory

logger = logging.getLogger(__name__)

# Of each rank of an update the number of its node, and whether its shards are in CPU memory.
Situation = tuple[tuple[int, bool], ...]


@dataclass
class _Prepared:
    """What the first update with a layout leaves for the later ones."""

    layout: SourceLayout
    plan: TransferPlan  # of what is read in place
    buffers: dict[str, torch.Tensor]  # whole weights for the fallback
    converted: frozenset[str]  # those of them that the loader knows under other names
    used: dict[str, ReadSet]
    record_s: float
    plan_s: float
    transfer: direct.Transfer
    staged: BucketedTransfer | None  # what cannot be read in place
    has_constants: bool  # the loader fills some elements by itself
    derivations: list[Callable[[], Any]]  # of tensors that are no parameters
    target: Probe  # a loader that replaces a parameter makes the plan void
    is_bound: bool = False  # to the present addresses of the shards

    def close(self) -> None:
        self.transfer.close()
        if self.staged is not None:
            self.staged.close()


class WeightsKeeper:
    """Owns the weights of one scheduler process: their version, the plans, and whether they are consistent.

    Attributes:
        version: number of the last update that was committed.
        device: of the parameters.
        conversion: of the trainer's names and shapes to those that the model's loader knows.
        is_inspected: whether all plans are known to fit the parameters that SGLang has now.
    """

    def __init__(self, scheduler: Any, start: Start, channel: Channel) -> None:
        self.version = start.weight_version
        self.is_inspected = False
        self._scheduler, self._rank = scheduler, start.rank
        self._layouts: dict[str, tuple[SourceLayout, frozenset[str]]] = {}
        # By layout, and by where the shards were: what cannot be read in place takes another plan.
        self._prepared: dict[tuple[str, Situation], _Prepared] = {}
        self._situations: dict[str, Situation] = {}  # the last one of each layout
        self._memories: dict[int, ShardMemory] = {}  # of each rank, as it last said
        self._node = start.node
        self.device = next(sglang_model.model_of(scheduler).parameters()).device
        self._handles = None if self.device.type == "cpu" else OpenHandles(self.device.index or 0)
        self._staging = Staging(start, channel, device=self.device, handles=self._handles)
        self._offered: DescriptorServer | None = None
        self._broken: str | None = None
        if start.is_restart:
            self._broken = "the engine was restarted with the weights of its checkpoint: call update_weights first"
        self._are_lost = False  # the parameters' contents, constants included
        self.conversion = Conversion(sglang_model.hf_config_of(scheduler))
        self._foresight: Foresight | None = None
        self._attempt = partial(attempt, rank=start.rank, device=self.device)

    def foresee(self) -> None:
        """Record how the first weights will load, while there is nothing else to do, if that takes long."""
        try:
            if self.conversion.is_known_to_fuse:
                self._foresight = Foresight(sglang_model.model_of(self._scheduler), self.conversion)
        except Exception as error:  # of whatever kind: the update itself will tell
            logger.info("rank %d: how the first weights will load cannot be foreseen: %s", self._rank, error)

    def foreseen(self, layout: SourceLayout) -> Loads | None:
        """How the weights of a layout load, if that is known before any update."""
        return self._foresight.loads(sglang_model.model_of(self._scheduler), layout) if self._foresight else None

    def offer(self, counts: Mapping[bytes, int], sock: socket.socket) -> None:
        """Take the file descriptors of this rank's memory from the trainer, and offer them until `withdraw`."""
        self.withdraw()
        try:
            with sock:
                self._offered = DescriptorServer.receive(sock, counts)
        except PassingError:
            logger.exception("rank %d: the file descriptors of the weights did not come", self._rank)

    def withdraw(self) -> None:
        """Stop offering them: all who need them have them, or the update has failed."""
        if self._offered is not None:
            self._offered.close()
            self._offered = None

    def check_consistent(self) -> None:
        """Raise if the last update failed half-way."""
        if self._broken is not None:
            raise WeightsInconsistentError(self._broken)

    def lose_contents(self) -> None:
        """The memory of the parameters was released: what they held is gone."""
        self._are_lost = True
        self._broken = "the memory of the weights was released, and their contents with it: call update_weights first"

    def unmap(self) -> None:
        """Close the trainers' memory, so that they can free it. The next update opens it again, for the same plans."""
        for prepared in self._prepared.values():
            prepared.is_bound = False
        if self._handles is not None:
            self._handles.close()

    def inspect(self) -> None:
        """Drop plans whose parameters SGLang has replaced. It cannot do so from here to the next call."""
        if self.is_inspected:
            return
        model = sglang_model.model_of(self._scheduler)
        for key in [key for key, prepared in self._prepared.items() if not prepared.target.holds(model)]:
            self._prepared.pop(key).close()
        self.is_inspected = True

    def layout_of(self, payload: dict[str, Any]) -> SourceLayout:
        """The layout that the payload of an update or a survey names; it is remembered."""
        if payload["layout"] is not None:
            self._layouts[payload["key"]] = payload["layout"]
        return self._layouts[payload["key"]][0]

    def announce(self, payload: dict[str, Any]) -> Frame:
        """What the other ranks must know before this update: what this one has prepared, and where its shards are.

        Args:
            payload: from `spmd_engine.trainer.weight_updates`.
        """
        key = payload["key"]
        self.layout_of(payload)
        memory: ShardMemory | None = payload["memory"]
        if memory is not None and self._offered is not None:
            memory = replace(memory, offered_at=self._offered.address)
        described, places = (None, b"") if memory is None else memory.to_frame()
        self.inspect()
        prepared = self._prepared.get((key, self._situations.get(key, ())))
        news = {
            "is_new": prepared is None,
            "is_bound": prepared is not None and prepared.is_bound,
            "memory": described,
            "version": self.version,
            "node": self._node,
        }
        return news, places

    def update(
        self,
        payload: dict[str, Any],
        frames: list[Frame],
        exchange: Exchange,
        enter: Callable[[str], None],
        *,
        flush: bool,
        wait_s: float,
    ) -> UpdateStats:
        """One collective weight update. All shards are final.

        Args:
            payload: from `spmd_engine.trainer.weight_updates`.
            frames: what all ranks have announced.
            exchange: all-gather over the scheduler processes of `payload["ranks"]`; also a barrier.
            enter: told of each phase as it begins.
            flush: drop the prefix cache. If it sleeps, that has been done, and its memory must not be touched.
            wait_s: seconds that the announcements took.

        Raises:
            PlanError: nothing was written.
            TransferError: shards cannot be reached, and nothing was written; or the copy failed on some rank, and
                `generate` refuses until an update succeeds.
        """
        ranks, key = tuple(payload["ranks"]), payload["key"]
        self._take_places(ranks, frames)
        nodes = numbered({rank: str(state["node"]) for rank, (state, _) in zip(ranks, frames, strict=True)})
        situation: Situation = tuple((nodes[rank], self._memories[rank].is_cpu) for rank in ranks)
        # What any rank needs, all do: each step ends in an exchange that all must reach.
        if any(state["is_new"] for state, _ in frames):
            self._forget(key)
        is_new = (key, situation) not in self._prepared
        if is_new:
            enter("plan")
            made = self._prepare_together(key, ranks, nodes, exchange, payload["bucket_bytes"])
            self._prepared[key, situation] = made
        self._situations[key] = situation
        prepared = self._prepared[key, situation]
        binding = time.monotonic()
        if is_new or any(state["memory"] is not None or not state["is_bound"] for state, _ in frames):
            enter("bind")
            self._bind_together(prepared, ranks, exchange)

        enter("copy")
        copying = time.monotonic()
        verify, done = bool(payload["verify"]), list[tuple[float, int | None]]()
        error = self._attempt(lambda: self._begin(prepared, flush=flush))
        wrong, is_over = 0, False
        if prepared.staged is not None:

            def agree(failure: Failure) -> bool:
                return any(state["error"] is not None for state, _ in exchange({"error": failure}, b""))

            error, is_over, wrong = prepared.staged.run(agree, self._attempt, error, verify=verify)
        if error is None and not is_over:
            error = self._attempt(lambda: done.append(self._end(prepared, verify=verify)))
        enter("commit")
        copied = time.monotonic()
        self.is_inspected = False
        tried = max(state["version"] for state, _ in frames) + 1  # a death at a commit may have left ranks behind
        outcome = exchange({"error": error}, b"")
        if prepared.staged is not None and any(state["error"] is not None for state, _ in outcome):
            self._staging.forget_network(ranks)
            # Those for other layouts use the same network and the same link to the packer.
            for one in [one for one, other in self._prepared.items() if other.staged is not None]:
                self._prepared.pop(one).close()
        self._finish(outcome, ranks, tried)
        device_s, wrong_in_place = done[0]
        return UpdateStats(
            weight_version=self.version,
            planned=is_new,
            local_bytes=prepared.plan.local_bytes,
            remote_bytes=prepared.plan.remote_bytes,
            network_bytes=prepared.staged.plan.network_bytes if prepared.staged else 0,
            staged_bytes=prepared.staged.plan.staged_bytes if prepared.staged else 0,
            block_copies=len(prepared.plan.table),
            fallback_weights=tuple(sorted(prepared.buffers)),
            wrong_elements=None if wrong_in_place is None else wrong_in_place + wrong,
            record_s=prepared.record_s if is_new else 0.0,
            plan_s=prepared.plan_s if is_new else 0.0,
            wait_s=wait_s,
            bind_s=copying - binding,
            copy_s=copied - copying,
            device_s=device_s,
            commit_s=time.monotonic() - copied,
        )

    # ---- before the copy ----

    def _take_places(self, ranks: tuple[int, ...], frames: list[Frame]) -> None:
        """Remember where the shards of all ranks are now."""
        for rank, (state, places) in zip(ranks, frames, strict=True):
            if state["memory"] is not None:
                self._memories[rank] = ShardMemory.from_frame(state["memory"], places)
                for prepared in self._prepared.values():
                    prepared.is_bound = False

    def _bind_together(self, prepared: _Prepared, ranks: tuple[int, ...], exchange: Exchange) -> None:
        """Open what has moved, on all ranks, before any of them writes."""
        memories = {rank: self._memories[rank] for rank in ranks}
        for one in self._prepared.values():  # others may read what is closed now
            one.is_bound = False

        def bind() -> None:
            if self._handles is not None:  # what has moved is closed before its successor is opened
                shards = [handle for memory in memories.values() for handle in memory.handles]
                buckets = [b for p in self._prepared.values() if p.staged is not None for b in p.staged.buckets()]
                self._handles.keep_only([*shards, *buckets])
            prepared.transfer.bind(memories)
            if prepared.staged is not None:
                prepared.staged.bind(memories)

        raise_first(exchange({"error": self._attempt(bind)}, b""), ranks)
        prepared.is_bound = True

    def _forget(self, key: str) -> None:
        """Drop all plans for a layout."""
        for one in [one for one in self._prepared if one[0] == key]:
            self._prepared.pop(one).close()

    def _prepare_together(
        self, key: str, ranks: tuple[int, ...], nodes: Mapping[int, int], exchange: Exchange, bucket_bytes: int
    ) -> _Prepared:
        """Record and plan on all ranks; none keeps a plan that another could not make."""
        made: list[tuple[_Prepared, TransferPlan]] = []
        memories = {rank: self._memories[rank] for rank in ranks}
        error = self._attempt(lambda: made.append(self._prepare(key, memories, nodes)))
        layout, optional = self._layouts[key]
        names = [weight.name for weight in layout.weights]
        used = to_numbers(made[0][0].used if made else {}, names)
        frames = exchange({"error": error}, json.dumps(used).encode())
        raise_first(frames, ranks)
        said = dict.fromkeys(blob for _, blob in frames)  # ranks of all replicas read the same
        check_all_used(layout, optional, [from_numbers(json.loads(blob), names) for blob in said])
        prepared, rest = made[0]
        # The same on all ranks: whether any of them has something that it cannot read in place.
        if any(direct.unreachable(memories, nodes, rank, self.device) for rank in ranks):
            prepared.staged = self._staging.prepare(rest, memories, nodes, exchange, bucket_bytes)
        return prepared

    def _prepare(
        self, key: str, memories: Mapping[int, ShardMemory], nodes: Mapping[int, int]
    ) -> tuple[_Prepared, TransferPlan]:
        """Record and plan. Returns also what of the plan cannot be read in place."""
        layout, _ = self._layouts[key]
        model = sglang_model.model_of(self._scheduler)
        staged = direct.unreachable(memories, nodes, self._rank, self.device)
        loads = self.foreseen(layout)
        self._foresight = None  # the plan has it all
        planning = began = time.monotonic()
        if loads is None:
            loads = recorded(model, layout, self.conversion)
            planning = time.monotonic()
        by_name = {weight.name: weight for weight in layout.weights}
        buffers = {
            name: torch.empty(by_name[name].shape, dtype=DTYPES[by_name[name].dtype], device=self.device)
            for name in loads.fallback
        }
        whole = [_whole(by_name[name], buffer) for name, buffer in sorted(buffers.items())]
        everything = build_plan(layout, [*loads.copies, *whole], rank=self._rank, nodes=nodes)
        plan, rest = (
            bucket_plan.split(everything, staged, rank=self._rank) if staged else (everything, bucket_plan.NOTHING)
        )
        used = read_sets_of([*loads.copies, *whole], {name: weight.shape for name, weight in by_name.items()})
        prepared = _Prepared(
            layout=layout,
            plan=plan,
            buffers=buffers,
            converted=loads.converted & frozenset(loads.fallback),
            used=used,
            record_s=planning - began,
            plan_s=time.monotonic() - planning,
            has_constants=loads.has_constants,
            derivations=sglang_model.derivations(model),
            target=Probe(model, model.parameters()),
            transfer=direct.prepare(plan, rank=self._rank, device=self.device, handles=self._handles),
            staged=None,
        )
        return prepared, rest

    # ---- the copy and after ----

    def _begin(self, prepared: _Prepared, *, flush: bool) -> None:
        """Begin to copy what is read in place."""
        if self._are_lost and prepared.has_constants:
            write_constants(sglang_model.model_of(self._scheduler), prepared.layout, self.conversion)
        prepared.transfer.wait()  # SGLang's own streams may still read the old weights
        prepared.transfer.start()
        if flush:
            sglang_memory.flush_cache(self._scheduler)  # while a GPU copies; it names tokens by the old weights

    def _end(self, prepared: _Prepared, *, verify: bool) -> tuple[float, int | None]:
        """Wait for it, then run the fallback; seconds of the copy itself, and wrong elements if `verify`."""
        model = sglang_model.model_of(self._scheduler)
        device_s = prepared.transfer.finish()
        # Before the fallback, whose loaders may work in place.
        wrong = prepared.transfer.compare() if verify else None
        if prepared.buffers:
            named = as_loaded(prepared.buffers, prepared.converted, self.conversion)
            with torch.no_grad(), sglang_model.addresses_kept(model):
                model.load_weights(iter(named.items()))  # type: ignore[operator]
        if prepared.derivations:
            with torch.no_grad(), sglang_model.addresses_kept(model):
                for derive in prepared.derivations:
                    derive()
        prepared.transfer.wait()
        return device_s, wrong

    def _finish(self, frames: list[Frame], ranks: tuple[int, ...], tried: int) -> None:
        try:
            raise_first(frames, ranks)
        except SpmdEngineError as error:
            self._broken = (
                f"weight version {tried} failed half-way on some rank, so the weights are a mixture: {error}. "
                "Call update_weights again before generate"
            )
            raise
        self._broken, self._are_lost = None, False
        self.version = tried


def _whole(weight: Weight, buffer: torch.Tensor) -> RecordedCopy:
    return RecordedCopy(
        weight=weight.name,
        sizes=weight.shape,
        src_offset=0,
        src_strides=contiguous_strides(weight.shape),
        dst_address=buffer.data_ptr(),
        dst_strides=contiguous_strides(weight.shape),
        dst_dtype=weight.dtype,
        parameter=f"the fallback buffer of {weight.name}",
    )
