"""Says where the shards of a rank lie, in words that other processes understand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
        chunks: for each allocation the bytes of each of its chunks; () for what cudaMalloc made.
        allocation: index into `handles` for each weight of the layout, uint32; `NOWHERE` for an empty shard.
        offset: bytes from the start of the allocation for each weight, uint64; on the CPU the address itself.
        offered_at: address of the `DescriptorServer` that has the chunks' descriptors under the handles; "" if none.
    """

    device: str
    pid: int
    handles: tuple[bytes, ...]
    chunks: tuple[tuple[int, ...], ...] = field(repr=False)
    allocation: np.ndarray = field(repr=False)
    offset: np.ndarray = field(repr=False)
    offered_at: str = field(default="", repr=False)

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

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together, as another process may tell them (ValueError)."""
        if len(self.chunks) != len(self.handles) or any(len(handle) != HANDLE_BYTES for handle in self.handles):
            raise ValueError(f"{len(self.handles)} handles with chunks for {len(self.chunks)}")
        if self.allocation.dtype != np.uint32 or self.offset.dtype != np.uint64:
            raise ValueError(f"places of types {self.allocation.dtype} and {self.offset.dtype}")
        if self.allocation.shape != self.offset.shape or self.offset.ndim != 1:
            raise ValueError(f"places of shapes {self.allocation.shape} and {self.offset.shape}")
