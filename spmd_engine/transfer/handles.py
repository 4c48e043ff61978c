"""Memory that another process can reach: export on the trainer's side, open and close on the scheduler's.

On a GPU a trainer rank names whole allocations by handles, and each shard by an allocation and an offset in it. What
cudaMalloc made is one allocation, with a CUDA IPC handle. Torch's expandable segments consist of chunks, which other
processes open by file descriptors (`fd_passing`): there a run of adjoining chunks counts as one allocation. On the CPU
a process id and an address do. No torch here: only addresses, devices and bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from spmd_engine.planning.shard_memory import CPU, HANDLE_BYTES, NOWHERE, ShardMemory
from spmd_engine.transfer import _native, fd_passing


@dataclass
class _Allocation:
    """One that holds shards: from cudaMalloc, with a handle, or a run of adjoining chunks, without."""

    base: int
    end: int
    handle: bytes
    sizes: list[int]  # of the chunks; none from cudaMalloc

    @property
    def starts(self) -> list[int]:
        """Addresses of what can be freed by itself: each chunk, or the whole."""
        return [self.base + before for before in np.cumsum([0, *self.sizes[:-1]]).tolist()]


def _allocations_of(addresses: np.ndarray, sizes: np.ndarray) -> list[_Allocation]:
    """The allocations that hold these shards, by address. Runs have no more chunks than the shards touch.

    Raises:
        NotExportableError: the allocator cannot share this memory; the message says what to do.
        CudaError: any other failure.
    """
    found: list[_Allocation] = []
    order = np.argsort(addresses, kind="stable")
    for begin, size in zip(addresses[order].tolist(), sizes[order].tolist(), strict=True):
        at = max(begin, found[-1].end if found else 0)
        while at < begin + size:
            piece = _native.export_allocation(at)
            is_chunk = not piece.handle
            at = piece.base + piece.size
            if is_chunk and found and found[-1].sizes and found[-1].end == piece.base:
                found[-1].sizes.append(piece.size)
                found[-1].end = at
            else:
                found.append(_Allocation(piece.base, at, piece.handle, [piece.size] if is_chunk else []))
    return found


class Exporter:
    """Makes this process's shards known to others; what has not moved since the last time is not exported again."""

    def __init__(self) -> None:
        self._addresses = np.zeros(0, np.uint64)
        self._sizes = np.zeros(0, np.uint64)
        self._probes: list[int] = []  # an address in each allocation, or in each chunk of it
        self._ids: list[int] = []
        self._chunks: list[int] = []  # an address in each chunk, in the order of the handles
        self._last: ShardMemory | None = None
        self._secret = secrets.token_bytes(32)

    def export(self, addresses: np.ndarray, sizes: np.ndarray, *, device: int | None) -> ShardMemory:
        """Where the shards are: the same object as the last time if nothing has moved.

        Args:
            addresses: of the shards, uint64; 0 for an empty one.
            sizes: of the shards in bytes, uint64.
            device: CUDA ordinal that holds all of them, None for the CPU.

        Raises:
            NotExportableError: the allocator cannot share this memory; the message says what to do.
            CudaError: any other failure.
        """
        if self._last is not None and self._is_unmoved(addresses, sizes, device):
            return self._last
        self._last = None
        self._probes, self._ids, self._chunks = [], [], []
        if device is None:
            memory = ShardMemory(CPU, os.getpid(), (), (), np.zeros(len(addresses), np.uint32), addresses)
        else:
            memory = self._export(addresses, sizes, device)
        self._addresses, self._sizes, self._last = addresses, sizes, memory
        return memory

    def _export(self, addresses: np.ndarray, sizes: np.ndarray, device: int) -> ShardMemory:
        held = addresses > 0
        found = _allocations_of(addresses[held], sizes[held])
        handles = []
        for one in found:
            ids = _native.allocation_ids(one.starts)
            handles.append(one.handle or self._name_run(one, ids))
            self._probes += one.starts
            self._ids += ids
            self._chunks += one.starts if one.sizes else []
        allocation = np.full(len(addresses), NOWHERE, np.uint32)
        offset = np.zeros(len(addresses), np.uint64)
        if found:
            bases = np.array([one.base for one in found], np.uint64)
            index = np.searchsorted(bases, addresses[held], side="right") - 1
            allocation[held] = index
            offset[held] = addresses[held] - bases[index]
        chunks = tuple(tuple(one.sizes) for one in found)
        return ShardMemory(_native.device_uuid(device), os.getpid(), tuple(handles), chunks, allocation, offset)

    def _name_run(self, run: _Allocation, ids: list[int]) -> bytes:
        """A handle that is the same for the same chunks at the same place, and for nothing else in any process."""
        content = np.array([run.base, *run.sizes, *ids], np.uint64).tobytes()
        return hashlib.blake2b(content, key=self._secret, digest_size=HANDLE_BYTES).digest()

    def _is_unmoved(self, addresses: np.ndarray, sizes: np.ndarray, device: int | None) -> bool:
        assert self._last is not None
        return (
            self._last.is_cpu == (device is None)
            and (addresses is self._addresses or np.array_equal(addresses, self._addresses))
            and (sizes is self._sizes or np.array_equal(sizes, self._sizes))
            # An address alone does not tell: memory may have been freed and allocated again at the same one.
            and (not self._probes or _native.allocation_ids(self._probes) == self._ids)
        )

    def send_descriptors(self, sock: socket.socket, *, timeout_s: float) -> None:
        """Send the descriptors of all chunks of the last export, for `DescriptorServer.receive`.

        Raises:
            PassingError: the other side did not take them.
            CudaError: a chunk was freed since.
        """
        for start in range(0, len(self._chunks), fd_passing.BATCH):
            descriptors = _native.export_descriptors(self._chunks[start : start + fd_passing.BATCH])
            try:
                fd_passing.send_batch(sock, descriptors, timeout_s=timeout_s)
            finally:
                fd_passing.close_all(descriptors)


class OpenHandles:
    """Allocations of other processes that this process has mapped. Each is opened once and kept.

    Args:
        device: CUDA ordinal, in this process, that reads from them.

    Attributes:
        generation: grows when anything is closed. Addresses that were had in an earlier one must not be read any more.
    """

    def __init__(self, device: int) -> None:
        self.generation = 0
        self._device = device
        self._mappings: dict[bytes, _native.IpcMapping | _native.ChunkMapping] = {}
        self._own: dict[bytes, int] = {}

    def own(self, memory: ShardMemory, addresses: np.ndarray) -> None:
        """Take memory of this process itself, at `addresses`, for open: it cannot open its own handles."""
        held = memory.allocation != NOWHERE
        for number, base in zip(memory.allocation[held], addresses[held] - memory.offset[held], strict=True):
            self._own[memory.handles[number]] = int(base)

    def __len__(self) -> int:
        return len(self._mappings)

    def addresses(self, memory: ShardMemory, wanted: np.ndarray) -> np.ndarray:
        """Addresses in this process of the shards of a rank, opening what is not open yet: milliseconds the first time.

        Args:
            wanted: indices of the weights whose shards will be read; the others get address 0.

        Raises:
            CudaError: memory cannot be mapped; for example its owner has freed it, or is gone.
            PassingError: the descriptors of chunks cannot be had.
        """
        used = memory.allocation[wanted]
        numbers = np.unique(used[used != NOWHERE]).tolist()
        known = self._own.keys() | self._mappings.keys()
        missing = [number for number in numbers if memory.handles[number] not in known]
        for number in missing:
            if not memory.chunks[number]:
                handle = memory.handles[number]
                self._mappings[handle] = _native.IpcMapping(handle, device=self._device)
        runs = {memory.handles[number]: memory.chunks[number] for number in missing if memory.chunks[number]}
        if runs:
            self._open_runs(runs, memory.offered_at)
        bases = np.zeros(len(memory.handles) + 1, np.uint64)
        for number in numbers:
            handle = memory.handles[number]
            bases[number] = self._mappings[handle].base if handle in self._mappings else self._own[handle]
        found = np.zeros(len(memory.offset), np.uint64)
        found[wanted] = bases[np.minimum(used, len(memory.handles))] + memory.offset[wanted]
        return found

    def _open_runs(self, runs: dict[bytes, tuple[int, ...]], offered_at: str) -> None:
        """Map the chunks of several runs, given by the sizes of their chunks, as their descriptors come in."""
        mappings = {handle: _native.ChunkMapping(sizes, device=self._device) for handle, sizes in runs.items()}
        counts = {handle: len(sizes) for handle, sizes in runs.items()}
        try:
            left = [(mappings[handle], count) for handle, count in reversed(counts.items())]
            with contextlib.closing(fd_passing.fetch(offered_at, counts)) as batches:
                for descriptors in batches:
                    try:
                        _map_next(descriptors, left)
                    finally:
                        fd_passing.close_all(descriptors)
        except BaseException:
            for mapping in mappings.values():
                mapping.close()
            raise
        self._mappings.update(mappings)

    def keep_only(self, handles: Iterable[bytes]) -> None:
        """Close all others, in a new generation if there are any. No copy from them may still run."""
        kept = frozenset(handles)
        closing = [handle for handle in self._mappings if handle not in kept]
        if closing:
            self.generation += 1  # before the first is closed, and also if one cannot be
        for handle in closing:
            self._mappings.pop(handle).close()

    def close(self) -> None:
        """Close all of them. Twice is fine."""
        self.keep_only(())


def _map_next(descriptors: list[int], left: list[tuple[_native.ChunkMapping, int]]) -> None:
    """Map chunks into the mappings that are not full yet, given with their numbers of chunks, the next one last."""
    at = 0
    while at < len(descriptors):
        mapping, count = left[-1]
        taken = descriptors[at : at + count - mapping.mapped]
        mapping.map(taken)
        at += len(taken)
        if mapping.mapped == count:
            left.pop()
