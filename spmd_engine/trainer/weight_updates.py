"""The trainer's side of `update_weights`: describe the source, meet the other ranks once, send what changed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from spmd_engine.control.calls import Explain, UpdateWeights
from spmd_engine.control.digest import digest
from spmd_engine.control.messages import KNOWN_LAYOUTS, Descriptors
from spmd_engine.errors import ConfigError, PlanError, TransferError
from spmd_engine.planning.layout import SourceLayout
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.trainer.names import Rename
from spmd_engine.trainer.process import SchedulerProcess
from spmd_engine.trainer.rendezvous import Rendezvous
from spmd_engine.trainer.scheduler_client import CollectiveCall
from spmd_engine.trainer.sources import Source, SourceReader, ranks_of
from spmd_engine.transfer import _native
from spmd_engine.transfer.fd_passing import PassingError
from spmd_engine.transfer.handles import Exporter
from spmd_engine.transfer.packing import Packer

T = TypeVar("T")

_BUCKET_BYTES, _LEAST_BUCKET_BYTES = 32 << 20, 4096


@dataclass(frozen=True)
class PreparedUpdate:
    """What one `update_weights` sends, and what must outlive it.

    Attributes:
        body: for the own scheduler process.
        memory: where the shards are.
        source: keeps the shards alive.
        describe_s: seconds that making this took.
    """

    body: UpdateWeights
    memory: ShardMemory = field(repr=False)
    source: Source = field(repr=False)
    describe_s: float


class WeightUpdates:
    """State that lasts between the weight updates of one engine, on the trainer's side.

    Attributes:
        last_holders: ranks of all replicas that made the last update or explanation.
    """

    def __init__(
        self,
        rank: int,
        replica: tuple[int, ...],
        process: SchedulerProcess,
        timeout_s: float,
        device: int | None,
    ) -> None:
        self._rank, self._replica, self._device = rank, replica, device
        self._process, self._timeout_s = process, timeout_s
        self._connected = {replica}
        self.last_holders = replica  # of the last update or explanation
        self._known: dict[str, None] = {}  # layouts that the scheduler process has, the last used last
        self._known_before: dict[str, None] = {}  # the same, before the update that runs
        self._reader, self._exporter = SourceReader(rank), Exporter()
        self._key: tuple[SourceLayout, frozenset[str], str] | None = None
        self._last: tuple[str, ShardMemory] | None = None
        self._packer = Packer(rank)
        process.on_packing = self._packer.start
        self._ptrace_allowed = False

    def prepare(
        self,
        call: CollectiveCall,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        verify: bool,
        running: str,
        rename: Rename | None,
    ) -> PreparedUpdate:
        """Describe `source` for the scheduler process. Arguments as for `SpmdEngine.update_weights`.

        Raises:
            CollectiveMismatchError: another rank of the replica made another call.
            PlanError: see `sources.SourceReader.read`; or the shards' memory cannot be shared between processes.
            TransferError: the scheduler process did not take the memory's file descriptors.
            CollectiveTimeoutError: a rank that holds shards did not come to the first update.
        """
        began = time.monotonic()
        described, memory = self._meet(call, source, rename, self._export, running)
        key = self._key_of(described)
        moved = self._last is None or self._last[0] != key or not memory.same_as(self._last[1])
        # Until this update commits: the scheduler process may take the new places and then refuse the update.
        self._last = None
        if moved:
            self._pass_descriptors(memory)
        is_known = key in self._known
        # Until it commits: the scheduler process may drop another layout for this one, and then refuse the update.
        self._known_before, self._known = self._known, {}
        body = UpdateWeights(
            holders=call.holders,
            key=key,
            layout=None if is_known else described.layout,
            optional=described.optional,
            memory=memory if moved else None,
            verify=verify,
            running=running,
            bucket_bytes=_bucket_bytes(),
            weights=len(described.layout.weights),
        )
        device = self._device if described.device is None else described.device
        if device is not None and torch.cuda.is_initialized():  # what is in CPU memory may have come from a GPU
            # The shards are final once what this thread has queued is done. Other streams may go on.
            torch.cuda.current_stream(device).synchronize()
        return PreparedUpdate(body, memory, described, time.monotonic() - began)

    def prepare_explain(
        self,
        call: CollectiveCall,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        rename: Rename | None,
    ) -> Explain:
        """Describe `source` for an explanation.

        Raises:
            CollectiveMismatchError: another rank of the replica made another call.
            PlanError: see `sources.SourceReader.read`.
            CollectiveTimeoutError: a rank that holds shards did not come to the first call.
        """
        described, _ = self._meet(call, source, rename, lambda _: None, "wait")
        key = self._key_of(described)
        return Explain(call.holders, key, described.layout, described.optional, described.device is None)

    def _meet(
        self,
        call: CollectiveCall,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        rename: Rename | None,
        make: Callable[[Source], T],
        running: str,
    ) -> tuple[Source, T]:
        """Describe `source`, make something of the description, and connect the ranks that hold shards.

        Raises:
            SpmdEngineError: this rank, or another one, refuses the source.
        """
        done: tuple[Source, T] | None = None
        refusal = None
        try:
            described = self._reader.read(source, rename)
            done = described, make(described)
            holders = set(described.layout.ranks())
        except Exception as error:  # of whatever kind: the other ranks wait
            refusal, holders = error, _holders_of(source)
        ranks = tuple(sorted({*self._replica, *holders}))
        call.holders = self._replica if set(ranks) == set(self._replica) else ranks
        self.last_holders = call.holders
        if call.holders not in self._connected:
            why = "for the first time" if refusal is None else f"refused: {type(refusal).__name__}: {refusal}"
            # Ranks of other replicas may be waiting to connect: they must hear of a refusal, too.
            self._connect(call, refusal, f"{call.name}(...) {why}", running)
        if done is None:
            assert refusal is not None
            raise refusal
        return done

    def forget_places(self) -> None:
        """The scheduler process closes the memory of all shards: say again where they are at the next update."""
        self._last = None

    def commit(self, update: PreparedUpdate) -> None:
        """Remember what the scheduler process now knows."""
        key = update.body.key
        self._known = {name: None for name in self._known_before if name != key} | {key: None}
        while len(self._known) > KNOWN_LAYOUTS:
            del self._known[next(iter(self._known))]
        self._last = (key, update.memory)

    def _connect(self, call: CollectiveCall, refusal: Exception | None, what: str, running: str) -> None:
        """Connect the scheduler processes of all ranks that hold shards, once for each set of ranks."""
        ranks = call.holders
        rendezvous = Rendezvous(ranks, self._rank, "update")
        number = rendezvous.next_number()
        try:
            number = call.meet(what, ranks, number=number, running=running)
        except BaseException as error:  # the other replicas may be waiting already
            rendezvous.give_up(number, error)
            raise
        note = {"refusal": None if refusal is None else f"{type(refusal).__name__}: {refusal}"}
        meeting = rendezvous.meet(note, timeout_s=self._timeout_s, watch=call.check_failed, number=number)
        fd = meeting.group.listener_fd
        try:
            self._process.send(meeting.group, fds=(fd,) if fd >= 0 else ())
        finally:
            if fd >= 0:
                os.close(fd)
        self._connected.add(ranks)
        for rank, note in zip(ranks, meeting.notes, strict=True):
            if note["refusal"] and refusal is None:
                raise PlanError(f"rank {rank} refused: {note['refusal']}")

    def _key_of(self, described: Source) -> str:
        """Equal on two ranks if and only if they describe the same layout."""
        last = self._key
        if last is None or last[0] is not described.layout or last[1] != described.optional:
            key = digest([described.layout.plain(), sorted(described.optional)])
            self._key = last = (described.layout, described.optional, key)
        return last[2]

    def _export(self, described: Source) -> ShardMemory:
        """Let the scheduler processes read the shards.

        Raises:
            PlanError: their allocator cannot share them.
        """
        if described.device is None and not self._ptrace_allowed:
            _native.allow_ptrace_by_any()  # where Yama restricts ptrace to descendants
            self._ptrace_allowed = True
        try:
            # A thread of its own has no device yet: CUDA would take the first one, and leave a context there.
            with contextlib.nullcontext() if described.device is None else torch.cuda.device(described.device):
                return self._exporter.export(described.addresses, described.sizes, device=described.device)
        except _native.NativeError as error:
            raise PlanError(f"rank {self._rank} cannot share its shards with other processes: {error}") from error

    def packing(self) -> contextlib.AbstractContextManager[None]:
        """While the shards of an update last: this rank may have to pack them."""
        return self._packer.working()

    def _pass_descriptors(self, memory: ShardMemory) -> None:
        """Give the scheduler process the file descriptors that `memory` needs, if any; it offers them to the others.

        Raises:
            TransferError: it did not take them, or a chunk was freed meanwhile.
        """
        counts = {handle: len(sizes) for handle, sizes in zip(memory.handles, memory.chunks, strict=True) if sizes}
        if not counts:
            return
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._process.send(Descriptors(counts), fds=(theirs.fileno(),))
            try:
                self._exporter.send_descriptors(ours, timeout_s=self._timeout_s)
            except (PassingError, _native.NativeError) as error:
                raise TransferError(
                    f"rank {self._rank} could not pass its shards' memory to its scheduler process: {error}"
                ) from error


def _bucket_bytes() -> int:
    """Size of the buckets of what cannot be read in place.

    Raises:
        ConfigError: the environment has no such size.
    """
    text = os.environ.get("SPMD_ENGINE_BUCKET_BYTES", str(_BUCKET_BYTES))
    if not text.isdecimal() or int(text) < _LEAST_BUCKET_BYTES:
        raise ConfigError(f"SPMD_ENGINE_BUCKET_BYTES must be {_LEAST_BUCKET_BYTES} or more, is {text!r}")
    return int(text)


def _holders_of(source: object) -> set[int]:
    """The ranks that hold `source`, as far as it can be told of one that was refused; else all that there are."""
    try:
        return ranks_of(source)
    except Exception:
        return set(range(dist.get_world_size()))
