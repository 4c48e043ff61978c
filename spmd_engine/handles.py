"""Memory that another process can reach: export on the trainer's side, open and close on the scheduler's.

On a GPU a trainer rank names whole allocations by CUDA IPC handles, and each shard by an allocation and an offset in
it. On the CPU a process id and an address do. No torch here: only addresses, devices and bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spmd_engine import _native

CPU = "cpu"
HANDLE_BYTES = 64
# Allocation number of a shard that holds nothing.
NOWHERE = np.iinfo(np.uint32).max


@dataclass(frozen=True, eq=False)
class ShardMemory:
    """Where the shards of one rank lie, in words that other processes understand.

    Attributes:
        device: "cpu", or the UUID of the GPU that holds them.
        pid: process id of the rank.
        handles: one of `HANDLE_BYTES` bytes for each allocation; none on the CPU.
        allocation: index into `handles` for each weight of the layout, uint32; `NOWHERE` for an empty shard.
        offset: bytes from the start of the allocation for each weight, uint64; on the CPU the address itself.
    """

    device: str
    pid: int
    handles: tuple[bytes, ...]
    allocation: np.ndarray = field(repr=False)
    offset: np.ndarray = field(repr=False)

    @property
    def is_cpu(self) -> bool:
        return self.device == CPU

    def same_as(self, other: ShardMemory | None) -> bool:
        """Whether both name the same bytes, so that what was opened and planned for one serves the other."""
        if self is other:
            return True
        return (
            other is not None
            and (self.device, self.pid, self.handles) == (other.device, other.pid, other.handles)
            and np.array_equal(self.allocation, other.allocation)
            and np.array_equal(self.offset, other.offset)
        )

    def to_frame(self) -> tuple[dict[str, Any], bytes]:
        """As JSON-able values and bytes, for `Links.exchange`."""
        header = {"device": self.device, "pid": self.pid, "handles": len(self.handles), "weights": len(self.offset)}
        return header, b"".join(self.handles) + self.allocation.tobytes() + self.offset.tobytes()

    @staticmethod
    def from_frame(header: dict[str, Any], blob: bytes) -> ShardMemory:
        """What `to_frame` made.

        Raises:
            ValueError: the sizes do not fit together.
        """
        handles, weights = int(header["handles"]), int(header["weights"])
        if len(blob) != HANDLE_BYTES * handles + 12 * weights:
            raise ValueError(f"{len(blob)} bytes cannot hold {handles} handles and the places of {weights} weights")
        return ShardMemory(
            device=str(header["device"]),
            pid=int(header["pid"]),
            handles=tuple(blob[i * HANDLE_BYTES :][:HANDLE_BYTES] for i in range(handles)),
            allocation=np.frombuffer(blob, np.uint32, weights, HANDLE_BYTES * handles),
            offset=np.frombuffer(blob, np.uint64, weights, HANDLE_BYTES * handles + 4 * weights),
        )


def export_shards(addresses: np.ndarray, *, device: int | None) -> ShardMemory:
    """Make this process's shards known to others.

    Args:
        addresses: of the shards, uint64; 0 for an empty one.
        device: CUDA ordinal that holds all of them, None for the CPU.

    Raises:
        NotExportableError: the allocator cannot share this memory; the message says what to do.
        CudaError: any other failure.
    """
    if device is None:
        return ShardMemory(CPU, os.getpid(), (), np.zeros(len(addresses), np.uint32), addresses)
    exported: list[_native.ExportedAllocation] = []
    for address in np.unique(addresses[addresses > 0]).tolist():
        if not exported or address >= exported[-1].base + exported[-1].size:
            exported.append(_native.export_allocation(address))
    allocation = np.full(len(addresses), NOWHERE, np.uint32)
    offset = np.zeros(len(addresses), np.uint64)
    if exported:
        held = addresses > 0
        starts = np.array([one.base for one in exported], np.uint64)
        index = np.searchsorted(starts, addresses[held], side="right") - 1
        allocation[held] = index
        offset[held] = addresses[held] - starts[index]
    handles = tuple(one.handle for one in exported)
    return ShardMemory(_native.device_uuid(device), os.getpid(), handles, allocation, offset)


class Exporter:
    """`export_shards`, but what has not moved since the last time is not exported again."""

    def __init__(self) -> None:
        self._addresses = np.zeros(0, np.uint64)
        self._probes: list[int] = []  # an address in each allocation
        self._ids: list[int] = []
        self._last: ShardMemory | None = None

    def export(self, addresses: np.ndarray, *, device: int | None) -> ShardMemory:
        """The same object as the last time if nothing has moved. Arguments and errors as for `export_shards`."""
        if self._last is not None and self._is_unmoved(addresses, device):
            return self._last
        self._last = None
        memory = export_shards(addresses, device=device)
        _, first = np.unique(memory.allocation[addresses > 0], return_index=True)
        self._probes = [] if device is None else addresses[addresses > 0][first].tolist()
        self._ids = _native.allocation_ids(self._probes) if self._probes else []
        self._addresses, self._last = addresses, memory
        return memory

    def _is_unmoved(self, addresses: np.ndarray, device: int | None) -> bool:
        assert self._last is not None
        return (
            self._last.is_cpu == (device is None)
            and np.array_equal(addresses, self._addresses)
            # An address alone does not tell: memory may have been freed and allocated again at the same one.
            and (not self._probes or _native.allocation_ids(self._probes) == self._ids)
        )


class OpenHandles:
    """Allocations of other processes that this process has mapped. Each is opened once and kept.

    Args:
        device: CUDA ordinal, in this process, that reads from them.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._bases: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._bases)

    def open(self, handle: bytes) -> int:
        """Address of the allocation in this process. Milliseconds the first time.

        Raises:
            CudaError: it cannot be mapped; for example its owner has freed it, or is gone.
        """
        base = self._bases.get(handle)
        if base is None:
            base = self._bases[handle] = _native.open_handle(handle, device=self._device)
        return base

    def addresses(self, memory: ShardMemory, wanted: np.ndarray) -> np.ndarray:
        """Addresses in this process of the shards of a rank, opening what is not open yet.

        Args:
            wanted: indices of the weights whose shards will be read; the others get address 0.
        """
        bases = np.zeros(len(memory.handles) + 1, np.uint64)
        used = memory.allocation[wanted]
        for number in np.unique(used[used != NOWHERE]).tolist():
            bases[number] = self.open(memory.handles[number])
        found = np.zeros(len(memory.offset), np.uint64)
        found[wanted] = bases[np.minimum(used, len(memory.handles))] + memory.offset[wanted]
        return found

    def keep_only(self, handles: Iterable[bytes]) -> None:
        """Close all others. No copy from them may still run."""
        kept = frozenset(handles)
        for handle in [handle for handle in self._bases if handle not in kept]:
            _native.close_handle(self._bases.pop(handle))

    def close(self) -> None:
        """Close all of them. Twice is fine."""
        self.keep_only(())
