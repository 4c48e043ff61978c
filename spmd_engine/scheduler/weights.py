"""Updates the weights of one scheduler process: record and plan once, then copy, then commit on all ranks."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch

from spmd_engine.control.agreement import AllGather, Failure, Outcome, attempt, raise_first
from spmd_engine.control.calls import CallBody, Explain, UpdateWeights
from spmd_engine.control.channel import Channel
from spmd_engine.control.messages import Start, ToScheduler
from spmd_engine.errors import SpmdEngineError, WeightsInconsistentError
from spmd_engine.planning import bucket_plan
from spmd_engine.planning.layout import SourceLayout, Weight, contiguous_strides
from spmd_engine.planning.plan import RecordedCopy, TransferPlan, build_plan, numbered
from spmd_engine.planning.read_sets import PackedReadSets, pack, read_sets_of, unpack_distinct
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.scheduler.adapter import memory as sglang_memory
from spmd_engine.scheduler.adapter import model as sglang_model
from spmd_engine.scheduler.bucket_setup import BucketSetup
from spmd_engine.scheduler.plan_cache import Places, PlanCache, PlanKey, Prepared
from spmd_engine.scheduler.recording.checkpoint_format import CheckpointFormat
from spmd_engine.scheduler.recording.loading import (
    Loads,
    Prerecording,
    adapt_to_loader,
    check_all_used,
    record,
    write_constants,
)
from spmd_engine.scheduler.recording.recording import DTYPES
from spmd_engine.stats import UpdateStats
from spmd_engine.transfer import direct
from spmd_engine.transfer.fd_passing import DescriptorServer, PassingError
from spmd_engine.transfer.fingerprint import Fingerprint
from spmd_engine.transfer.handles import OpenHandles

logger = logging.getLogger(__name__)


class UpdateNews(msgspec.Struct, frozen=True):
    """What the other ranks must know of a rank before an update.

    Attributes:
        is_new: the rank has no plan for the layout.
        is_open: its plan holds the present addresses of the shards.
        memory: where the rank's shards are; None if they are where they were.
        version: its weight version.
        node: identity of its node.
    """

    is_new: bool
    is_open: bool
    memory: ShardMemory | None
    version: int
    node: str


#: In calls that are no update.
NO_NEWS = UpdateNews(False, False, None, 0, "")


class _Read(msgspec.Struct, frozen=True):
    """What a rank's plan reads, or why it has none."""

    error: Failure
    used: PackedReadSets


class WeightsKeeper:
    """Owns the weights of one scheduler process: their version, the plans, and whether they are consistent.

    Attributes:
        version: number of the last update that was committed.
        device: of the parameters.
        checkpoint_format: of the trainer's names and shapes to those that the model's loader knows.
    """

    def __init__(self, scheduler: Any, start: Start, channel: Channel[ToScheduler]) -> None:
        self.version = start.weight_version
        self._scheduler, self._rank, self._node = scheduler, start.rank, start.node
        self._plans = PlanCache()
        self.device = next(sglang_model.model_of(scheduler).parameters()).device
        handles = None if self.device.type == "cpu" else OpenHandles(self.device.index or 0)
        self._places = Places(handles)
        self._buckets = BucketSetup(start, channel, device=self.device, handles=handles)
        self._offered: DescriptorServer | None = None
        self._broken: str | None = None
        if start.is_restart:
            self._broken = "the engine was restarted with the weights of its checkpoint: call update_weights first"
        self._are_lost = False  # the parameters' contents, constants included
        self.checkpoint_format = CheckpointFormat(sglang_model.hf_config_of(scheduler))
        self._prerecording: Prerecording | None = None
        self._attempt = partial(attempt, rank=start.rank, device=self.device)

    def prerecord(self) -> None:
        """Record how the first weights will load, while there is nothing else to do, if that takes long."""
        try:
            if self.checkpoint_format.is_known_to_fuse:
                self._prerecording = Prerecording(sglang_model.model_of(self._scheduler), self.checkpoint_format)
        except Exception as error:  # of whatever kind: the update itself will tell
            logger.info("rank %d: how the first weights will load cannot be recorded ahead: %s", self._rank, error)

    def prerecorded(self, layout: SourceLayout) -> Loads | None:
        """How the weights of a layout load, if that is known before any update."""
        return self._prerecording.loads(sglang_model.model_of(self._scheduler), layout) if self._prerecording else None

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
        self._places.close()

    def parameters_may_change(self) -> None:
        """SGLang runs from now on."""
        self._plans.parameters_may_change()

    def drop_stale_plans(self) -> None:
        """Drop plans whose parameters SGLang has replaced."""
        self._plans.drop_stale(sglang_model.model_of(self._scheduler))

    def layout_of(self, call: CallBody) -> SourceLayout:
        """The layout that an update or an explanation is about."""
        if isinstance(call, Explain):
            return call.layout
        assert isinstance(call, UpdateWeights)
        return self._plans.layout(call.key)[0]

    def announce(self, call: UpdateWeights) -> UpdateNews:
        """What the other ranks must know before this update: what this one has prepared, and where its shards are."""
        self._plans.learn(call.key, call.layout, call.optional)
        memory = call.memory
        if memory is not None and self._offered is not None:
            memory = replace(memory, offered_at=self._offered.address)
        self.drop_stale_plans()
        prepared = self._plans.latest(call.key)
        return UpdateNews(
            is_new=prepared is None,
            is_open=prepared is not None and prepared.opened_at == self._places.generation,
            memory=memory,
            version=self.version,
            node=self._node,
        )

    def update(
        self,
        call: UpdateWeights,
        news: list[UpdateNews],
        gather: AllGather,
        enter: Callable[[str], None],
        *,
        flush: bool,
        wait_s: float,
    ) -> UpdateStats:
        """One collective weight update. All shards are final.

        Args:
            news: what all ranks have announced, in the order of `call.holders`.
            gather: over the scheduler processes of `call.holders`; also a barrier.
            enter: told of each phase as it begins.
            flush: drop the prefix cache. If it sleeps, that has been done, and its memory must not be touched.
            wait_s: seconds that the announcements took.

        Raises:
            PlanError: nothing was written.
            TransferError: shards cannot be reached, and nothing was written; or the copy failed on some rank, and
                `generate` refuses until an update succeeds.
        """
        ranks = call.holders
        self._places.take(dict(zip(ranks, (one.memory for one in news), strict=True)))
        nodes = numbered({rank: one.node for rank, one in zip(ranks, news, strict=True)})
        key = (call.key, tuple((nodes[rank], memory.is_cpu) for rank, memory in self._places.of(ranks).items()))
        # What any rank needs, all do: each step ends in an all-gather that all must reach.
        if any(one.is_new for one in news):
            self._plans.drop(call.key)
        prepared = self._plans.get(key)
        is_new = prepared is None
        if prepared is None:
            enter("plan")
            prepared = self._prepare_together(key, ranks, nodes, gather, call.bucket_bytes)
        self._plans.use(key, prepared)
        opening = time.monotonic()
        if is_new or any(one.memory is not None or not one.is_open for one in news):
            enter("bind")
            self._open_together(prepared, ranks, gather)

        enter("copy")
        copying = time.monotonic()
        verify, done = call.verify, list[tuple[float, int | None]]()
        assert prepared.opened_at == self._places.generation  # its addresses are those of memory that is mapped
        ready = prepared
        error = self._attempt(lambda: self._begin(ready, flush=flush))
        wrong, is_over = 0, False
        if prepared.bucketed is not None:

            def agree(failure: Failure) -> bool:
                return any(outcome.error is not None for outcome in gather(Outcome(failure)))

            error, is_over, wrong = prepared.bucketed.run(agree, self._attempt, error, verify=verify)
        if error is None and not is_over:
            error = self._attempt(lambda: done.append(self._end(ready, verify=verify)))
        enter("commit")
        copied = time.monotonic()
        self._plans.parameters_may_change()  # by a loader
        tried = max(one.version for one in news) + 1  # a death at a commit may have left ranks behind
        outcomes = gather(Outcome(error))
        if prepared.bucketed is not None and any(outcome.error is not None for outcome in outcomes):
            self._buckets.forget_network(ranks)
            self._plans.drop_bucketed()
        self._finish(outcomes, tried)
        device_s, wrong_in_place = done[0]
        return UpdateStats(
            weight_version=self.version,
            planned=is_new,
            local_bytes=prepared.plan.local_bytes,
            remote_bytes=prepared.plan.remote_bytes,
            network_bytes=prepared.bucketed.plan.network_bytes if prepared.bucketed else 0,
            staged_bytes=prepared.bucketed.plan.staged_bytes if prepared.bucketed else 0,
            block_copies=len(prepared.plan.table),
            fallback_weights=tuple(sorted(prepared.buffers)),
            wrong_elements=None if wrong_in_place is None else wrong_in_place + wrong,
            record_s=prepared.record_s if is_new else 0.0,
            plan_s=prepared.plan_s if is_new else 0.0,
            wait_s=wait_s,
            bind_s=copying - opening,
            copy_s=copied - copying,
            device_s=device_s,
            commit_s=time.monotonic() - copied,
        )

    # ---- before the copy ----

    def _open_together(self, prepared: Prepared, ranks: tuple[int, ...], gather: AllGather) -> None:
        """Open what has moved, on all ranks, before any of them writes."""
        memories = self._places.of(ranks)

        def open_memory() -> None:
            shards = [handle for memory in memories.values() for handle in memory.handles]
            buckets = [b for p in self._plans.all() if p.bucketed is not None for b in p.bucketed.buckets()]
            self._places.keep_only([*shards, *buckets])  # what has moved is closed before its successor is opened
            prepared.transfer.bind(memories)
            if prepared.bucketed is not None:
                prepared.bucketed.bind(memories)

        raise_first(gather(Outcome(self._attempt(open_memory))))
        prepared.opened_at = self._places.generation

    def _prepare_together(
        self, key: PlanKey, ranks: tuple[int, ...], nodes: Mapping[int, int], gather: AllGather, bucket_bytes: int
    ) -> Prepared:
        """Record and plan on all ranks; none keeps a plan that another could not make."""
        made: list[tuple[Prepared, TransferPlan, PackedReadSets]] = []
        memories = self._places.of(ranks)
        layout, optional = self._plans.layout(key[0])
        error = self._attempt(lambda: made.append(self._prepare(layout, memories, nodes)))
        reads = gather(_Read(error, made[0][2] if made else PackedReadSets([], [])))
        raise_first(reads)
        check_all_used(layout, optional, unpack_distinct((read.used for read in reads), layout.names()))
        prepared, rest, _ = made[0]
        # The same on all ranks: whether any of them has something that it cannot read in place.
        if any(direct.unreachable(memories, nodes, rank, self.device) for rank in ranks):
            prepared.bucketed = self._buckets.prepare(rest, memories, nodes, gather, bucket_bytes)
        return prepared

    def _prepare(
        self, layout: SourceLayout, memories: Mapping[int, ShardMemory], nodes: Mapping[int, int]
    ) -> tuple[Prepared, TransferPlan, PackedReadSets]:
        """Record and plan. Returns also what of the plan cannot be read in place, and what is read at all."""
        model = sglang_model.model_of(self._scheduler)
        staged = direct.unreachable(memories, nodes, self._rank, self.device)
        loads = self.prerecorded(layout)
        self._prerecording = None  # the plan has it all
        planning = began = time.monotonic()
        if loads is None:
            loads = record(model, layout, self.checkpoint_format)
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
        shapes = {name: weight.shape for name, weight in by_name.items()}
        used = pack(read_sets_of([*loads.copies, *whole], shapes), layout.names())
        prepared = Prepared(
            layout=layout,
            plan=plan,
            buffers=buffers,
            converted=loads.converted & frozenset(loads.fallback),
            record_s=planning - began,
            plan_s=time.monotonic() - planning,
            has_constants=loads.has_constants,
            derivations=sglang_model.derivations(model),
            target=Fingerprint(model, model.parameters()),
            transfer=direct.prepare(plan, rank=self._rank, device=self.device, handles=self._places.handles),
            bucketed=None,
        )
        return prepared, rest, used

    # ---- the copy and after ----

    def _begin(self, prepared: Prepared, *, flush: bool) -> None:
        """Begin to copy what is read in place."""
        if self._are_lost and prepared.has_constants:
            write_constants(sglang_model.model_of(self._scheduler), prepared.layout, self.checkpoint_format)
        prepared.transfer.wait()  # SGLang's own streams may still read the old weights
        prepared.transfer.start()
        if flush:
            sglang_memory.flush_cache(self._scheduler)  # while a GPU copies; it names tokens by the old weights

    def _end(self, prepared: Prepared, *, verify: bool) -> tuple[float, int | None]:
        """Wait for it, then run the fallback; seconds of the copy itself, and wrong elements if `verify`."""
        model = sglang_model.model_of(self._scheduler)
        device_s = prepared.transfer.finish()
        # Before the fallback, whose loaders may work in place.
        wrong = prepared.transfer.compare() if verify else None
        if prepared.buffers:
            named = adapt_to_loader(prepared.buffers, prepared.converted, self.checkpoint_format)
            with torch.no_grad(), sglang_model.keep_addresses(model):
                model.load_weights(iter(named.items()))  # type: ignore[operator]
        if prepared.derivations:
            with torch.no_grad(), sglang_model.keep_addresses(model):
                for derive in prepared.derivations:
                    derive()
        prepared.transfer.wait()
        return device_s, wrong

    def _finish(self, outcomes: list[Outcome], tried: int) -> None:
        try:
            raise_first(outcomes)
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
