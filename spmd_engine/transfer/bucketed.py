"""Runs a BucketPlan: pack into buckets, move the buckets, unpack, with all ranks of an update in step."""

from __future__ import annotations

import datetime
import errno
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from spmd_engine.control import peer_group
from spmd_engine.control.agreement import Attempt, Failure
from spmd_engine.errors import TransferError
from spmd_engine.planning.bucket_plan import ARRIVED, BUCKETS, PACKED, BucketPlan, Step
from spmd_engine.planning.dtypes import ITEM_SIZES, ElementType
from spmd_engine.planning.plan import TransferPlan
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.transfer import _native, direct
from spmd_engine.transfer.handles import Exporter, OpenHandles
from spmd_engine.transfer.packing import PackLink, SharedMemory

logger = logging.getLogger(__name__)


class Network:
    """The scheduler processes of an update as a process group of torch.distributed: NCCL for GPUs, gloo for the CPU.

    Args:
        ranks: global ranks, in an order that all of them know.
        rank: this one.
        host: this node's address on the way to the others.
        device: of the buckets.
        store: where the ranks find one another.
        timeout_s: seconds that one move of the buckets may take.
    """

    def __init__(
        self, ranks: Sequence[int], rank: int, *, host: str, device: torch.device, store: dist.Store, timeout_s: float
    ) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_s)
        made: Any = dist.ProcessGroupGloo if device.type == "cpu" else dist.ProcessGroupNCCL
        options = made._Options() if device.type == "cpu" else made.Options()
        if device.type == "cpu":
            options._devices = [made.create_device(hostname=host)]
        options._timeout = self._timeout
        self._group = made(store, ranks.index(rank), len(ranks), options)

    def all_to_all(
        self, arrived: torch.Tensor, packed: torch.Tensor, receives: Sequence[int], sends: Sequence[int]
    ) -> Callable[[], None]:
        """Begin to send and receive so many bytes to and from every rank. Returns what waits for the end.

        Raises:
            RuntimeError: a connection broke.
        """
        work = self._group.alltoall_base(arrived, packed, list(receives), list(sends))
        return lambda: work.wait(self._timeout)


def serve_store(host: str, timeout_s: float) -> tuple[dist.Store, int]:
    """A store for a `Network`, on `host` at a port of the system's choice."""
    sock = peer_group.listen(host)
    port = int(sock.getsockname()[1])
    return _store(host, port, timeout_s, master_listen_fd=sock.detach()), port


def join_store(host: str, port: int, timeout_s: float) -> dist.Store:
    """The store that another rank serves."""
    return _store(host, port, timeout_s)


def _store(host: str, port: int, timeout_s: float, **kwargs: Any) -> dist.Store:
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=bool(kwargs), wait_for_workers=False, timeout=timeout, **kwargs)


@dataclass(frozen=True)
class BucketOffer:
    """The buckets of a rank.

    Attributes:
        buckets: where they are.
        steps: how many steps the rank needs.
    """

    buckets: ShardMemory
    steps: int


class BucketedTransfer:
    """The staged part of an update, on one rank.

    It is made in three moves, as every rank must know of the others' buckets: `offer`, `accept`, `bind`.

    Args:
        plan: for this rank.
        rank: global rank of this process's trainer.
        device: of the engine's parameters, and of the buckets.
        handles: what this process has mapped; needed on a GPU.
        trainer: packs the shards of this rank if they are in CPU memory; None if they are not.
    """

    def __init__(
        self,
        plan: BucketPlan,
        *,
        rank: int,
        device: torch.device,
        handles: OpenHandles | None,
        trainer: PackLink | None,
    ) -> None:
        self.plan = plan
        self._rank, self._device, self._handles, self._trainer = rank, device, handles, trainer
        packs = any(len(step.pack.table) for step in plan.steps)
        arrives = any(any(step.receives) for step in plan.steps)
        needed = [(packs and number in PACKED) or (arrives and number in ARRIVED) for number in range(BUCKETS)]
        size = max((max(step.kept + sum(step.sends), sum(step.receives)) for step in plan.steps), default=0)
        self._buckets = [torch.empty(size if need else 0, dtype=torch.uint8, device=device) for need in needed]
        self._packed = [self._buckets[number] for number in PACKED]
        self._shared: SharedMemory | None = None  # with the trainer
        self._copies: torch.cuda.Stream | None = None
        if trainer is not None and packs:
            self._shared = trainer.share(len(PACKED), size, device=_index(device))
            self._packed = self._shared.buckets
            if device.type == "cuda":
                self._copies = torch.cuda.Stream(device)
            else:
                for number, bucket in zip(PACKED, self._packed, strict=True):
                    self._buckets[number] = bucket
        # How many steps before a bucket is sent it begins to be packed, and must be. What goes to a GPU first is packed
        # into a bucket of the CPU as soon as that has been copied, and copied as soon as all ranks have sent.
        self._begins_ahead, self._ends_ahead = (len(PACKED), 2) if self._copies is not None else (1, 1)
        self._memories: dict[int, ShardMemory] = {}
        self._network: Network | None = None
        self._rounds = 0
        self._packs: list[direct.Transfer | None] = []
        self._unpacks: list[direct.Transfer | None] = []

    def offer(self) -> BucketOffer:
        """What the other ranks must know of this one's buckets."""
        if self._device.type == "cpu":
            _native.allow_ptrace_by_any()  # other ranks of this node read them
        addresses = np.array([bucket.data_ptr() for bucket in self._buckets], np.uint64)
        sizes = np.array([bucket.nbytes for bucket in self._buckets], np.uint64)
        memory = Exporter().export(addresses, sizes, device=_index(self._device))
        if self._handles is not None:
            self._handles.own(memory, addresses)
        return BucketOffer(memory, len(self.plan.steps))

    def accept(self, offers: Mapping[int, BucketOffer], network: Network | None) -> None:
        """Take what every rank has offered.

        Args:
            offers: by rank.
            network: between all of them, if any rank sends to another node.
        """
        self._memories = {r: offer.buckets for r, offer in offers.items()}
        self._rounds = max(offer.steps for offer in offers.values())
        self._network = network
        for number, step in enumerate(self.plan.steps):
            base = self._packed[number % len(PACKED)].data_ptr()
            table = step.pack.table.copy()
            table["dst"] += np.uint64(base)
            pack = TransferPlan(table, step.pack.rank, step.pack.weight, 0, 0)
            if self._shared is None:
                self._packs.append(self._transfer(pack))
            else:
                assert self._trainer is not None
                sent = self._buckets[PACKED[number % len(PACKED)]]
                self._packs.append(TrainerTransfer(pack, self._rank, self._trainer, self._shared, sent, base))
            self._unpacks.append(self._transfer(step.unpack))

    def _transfer(self, plan: TransferPlan) -> direct.Transfer | None:
        if not len(plan.table):
            return None
        return direct.prepare(plan, rank=self._rank, device=self._device, handles=self._handles)

    def bind(self, memories: Mapping[int, ShardMemory]) -> None:
        """Take the present addresses of all shards.

        Raises:
            TransferError: memory cannot be reached. Nothing was written.
        """
        for pack, unpack in zip(self._packs, self._unpacks, strict=True):
            if pack is not None:
                pack.bind(memories)
            if unpack is not None:
                unpack.bind(self._memories)

    def buckets(self) -> list[bytes]:
        """Handles of the buckets of all ranks, which must stay open."""
        return [handle for memory in self._memories.values() for handle in memory.handles]

    def run(
        self, agree: Callable[[Failure], bool], attempt: Attempt, failure: Failure, *, verify: bool
    ) -> tuple[Failure, bool, int]:
        """Move everything. All ranks take the same number of steps, or stop after the same one.

        Args:
            agree: tells all ranks of this one's failure, and whether any rank has one. Also a barrier.
            attempt: runs an action; returns how it failed, if it did.
            failure: of what came before, on this rank.
            verify: compare what is sent, once it lies where it is sent from, and what was unpacked.

        Returns:
            The failure of this rank; whether that of some rank stopped all; and how many elements differ.
        """
        wrong = [0]

        def fill() -> None:
            for number in range(self._begins_ahead):
                self._begin_pack(number)
            for number in range(self._ends_ahead):
                self._end_pack(number)
                if number == 0:
                    self._upload(number)
            self._synchronize()

        if failure is None:
            failure = attempt(fill)
        try:
            for number in range(self._rounds + 1):
                if agree(failure):
                    return failure, True, wrong[0]
                failure = attempt(lambda at=number: self._turn(at, wrong, verify))  # type: ignore[misc]
            return failure, False, wrong[0]
        finally:
            if self._trainer is not None:
                self._trainer.drain()

    def _turn(self, number: int, wrong: list[int], verify: bool) -> None:
        """Everybody has step `number` in the bucket that it is sent from, and has unpacked the one before the last."""
        wait = self._send(number)
        try:
            if verify and self._step(number) is not None and (pack := self._packs[number]) is not None:
                wrong[0] += pack.compare()
            unpacking = self._begin_unpack(number - 1)
            self._upload(number + 1)
            self._begin_pack(number + self._begins_ahead)
            if unpacking is not None:
                unpacking.finish()
                if verify:
                    wrong[0] += unpacking.compare()
            self._end_pack(number + self._ends_ahead)
        finally:  # also after a failure: nobody may free a bucket that is being read
            wait()
            self._synchronize()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _step(self, number: int) -> Step | None:
        return self.plan.steps[number] if 0 <= number < len(self.plan.steps) else None

    def _begin_pack(self, number: int) -> None:
        if self._step(number) is not None and (pack := self._packs[number]) is not None:
            pack.start()

    def _end_pack(self, number: int) -> None:
        if self._step(number) is not None and (pack := self._packs[number]) is not None:
            pack.finish()

    def _upload(self, number: int) -> None:
        """Begin to copy what was packed on the CPU for a GPU. On a stream of its own: others may wait for theirs."""
        step = self._step(number)
        if step is None or self._copies is None:
            return
        slot, size = number % len(PACKED), step.kept + sum(step.sends)
        with torch.cuda.stream(self._copies):
            self._buckets[PACKED[slot]][:size].copy_(self._packed[slot][:size], non_blocking=True)

    def _send(self, number: int) -> Callable[[], None]:
        if self._network is None or number >= self._rounds:
            return lambda: None
        step = self._step(number)
        world = len(self._memories)
        sends, receives = (step.sends, step.receives) if step else ((0,) * world, (0,) * world)
        kept = step.kept if step else 0
        packed = self._buckets[PACKED[number % len(PACKED)]][kept : kept + sum(sends)]
        arrived = self._buckets[ARRIVED[number % len(ARRIVED)]][: sum(receives)]
        try:
            wait = self._network.all_to_all(arrived, packed, receives, sends)
        except RuntimeError as error:
            raise self._broken(error) from error

        def wait_for_it() -> None:
            try:
                wait()
            except RuntimeError as error:
                raise self._broken(error) from error

        return wait_for_it

    def _broken(self, error: Exception) -> TransferError:
        return TransferError(f"rank {self._rank}: weights did not come over the network: {error}")

    def _begin_unpack(self, number: int) -> direct.Transfer | None:
        if self._step(number) is None or (unpack := self._unpacks[number]) is None:
            return None
        unpack.start()
        return unpack

    def close(self) -> None:
        """Give back what the transfer holds. Twice is fine."""
        for one in (*self._packs, *self._unpacks):
            if one is not None:
                one.close()
        self._buckets, self._packed = [], []
        if self._shared is not None:
            assert self._trainer is not None
            self._trainer.unshare(self._shared)
            self._shared = None


def _index(device: torch.device) -> int | None:
    """CUDA ordinal, None for the CPU."""
    return None if device.type == "cpu" else device.index or 0


class TrainerTransfer(direct.CpuTransfer):
    """Blocks that the trainer copies into memory which it shares with this process.

    Shards that are not mapped would end the trainer: their ends are looked at from here whenever they have moved.
    Memory that goes away under a tensor later ends it, a truncated file, say, as any other use of the tensor would.

    Args:
        shared: where the blocks go.
        sent: the bucket, there or on a GPU, in which they are sent later.
        base: address of the bucket in `shared`.
    """

    def __init__(
        self, plan: TransferPlan, rank: int, trainer: PackLink, shared: SharedMemory, sent: torch.Tensor, base: int
    ) -> None:
        super().__init__(plan, rank)
        self._trainer, self._shared, self._sent, self._base = trainer, shared, sent, base

    def bind(self, memories: Mapping[int, ShardMemory]) -> None:
        super().bind(memories)
        assert self._table is not None
        if not self._trainer.may_look or not len(self._table):
            return
        ends = np.repeat(self._table, 2)
        rows = self._table["rows"].astype(np.int64) - 1
        row_bytes = self._table["row_elems"].astype(np.int64) * ITEM_SIZES[self._table["src_dtype"]]
        ends["src"][1::2] += (rows * self._table["src_pitch"] + row_bytes - 1).astype(np.uint64)
        seen = np.zeros(1, np.uint8)
        ends["dst"], ends["rows"], ends["row_elems"] = seen.ctypes.data, 1, 1
        ends["src_dtype"] = ends["dst_dtype"] = ElementType.RAW8
        try:
            _native.copy_cpu(ends, pids=self._pids)
        except _native.SourceError as error:
            if not isinstance(error, _native.SourcePermissionError) and getattr(error, "errno", 0) != errno.ENOSYS:
                raise self._failure(error) from error
            self._trainer.may_look = False
            logger.warning(
                "rank %d cannot look at the trainer's shards: whether they are mapped is not checked, and `verify` "
                "compares with what the trainer packed: %s",
                self._rank,
                error,
            )

    def start(self) -> None:
        assert self._table is not None
        self._trainer.begin(self._shared, self._table, threads=self._threads)

    def finish(self) -> float:
        began = time.monotonic()
        self._trainer.end()
        return time.monotonic() - began

    def compare(self) -> int:
        """As for `CpuTransfer`, in the bucket that is sent; with what was packed, if the shards cannot be looked at."""
        assert self._table is not None
        sent, table, pids = self._sent.cpu(), self._table.copy(), self._pids
        if not self._trainer.may_look:
            for field in ("", "_pitch", "_dtype"):
                table[f"src{field}"] = table[f"dst{field}"]
            pids = [0]  # this process
        table["dst"] += np.uint64(sent.data_ptr())
        table["dst"] -= np.uint64(self._base)
        return self._compare(table, pids)
