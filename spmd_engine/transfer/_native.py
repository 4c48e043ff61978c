# SPDX-License-Identifier: Apache-2.0
"""The native module: block copies between processes and devices, and memory that another process can open.

The only importer of ``spmd_engine._C``. It knows addresses, bytes, devices and streams, not tensors; importing it
starts no thread, makes no CUDA context and does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType

try:
    import spmd_engine._C as _C
except ImportError as error:
    raise ImportError(
        f"spmd_engine's native module cannot be loaded ({error}). Build it with `pip install -e .` in the source tree, "
        "or reinstall the package; SPMD_ENGINE_CUDA=ON|OFF|AUTO chooses the CUDA backend."
    ) from error

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "BLOCK_COPY_DTYPE",
    "ChunkMapping",
    "CompareResult",
    "CopyStats",
    "CopyTable",
    "CudaError",
    "ElementType",
    "ExportedAllocation",
    "IpcMapping",
    "NativeError",
    "NotExportableError",
    "PosixError",
    "SourceError",
    "SourceFaultError",
    "SourceGoneError",
    "SourcePermissionError",
    "TableError",
    "allocation_ids",
    "allow_ptrace_by_any",
    "compare_cpu",
    "copy_cpu",
    "device_uuid",
    "export_allocation",
    "export_descriptors",
    "has_cuda",
    "pin",
    "prefetch",
    "snapshot",
    "unpin",
]

NativeError: type[RuntimeError] = _C.NativeError
TableError: type[ValueError] = _C.TableError
PosixError: type[RuntimeError] = _C.PosixError
SourceError: type[RuntimeError] = _C.SourceError
SourceGoneError: type[RuntimeError] = _C.SourceGoneError
SourcePermissionError: type[RuntimeError] = _C.SourcePermissionError
SourceFaultError: type[RuntimeError] = _C.SourceFaultError
CudaError: type[RuntimeError] = _C.CudaError
NotExportableError: type[RuntimeError] = _C.NotExportableError


@dataclass(frozen=True)
class CopyStats:
    """What a copy moved: bytes read from the sources, and rows of the table."""

    bytes_read: int
    blocks: int


@dataclass(frozen=True)
class CompareResult:
    """How many elements differ, and the first that does: (row of the table, element in that block, row-major)."""

    wrong_elements: int
    first: tuple[int, int] | None


@dataclass(frozen=True)
class ExportedAllocation:
    """A whole device allocation, and the 64-byte handle that opens it in another process.

    Without a handle (`b""`) it is a chunk of CUDA's virtual memory management: see `export_descriptors`.
    """

    base: int
    size: int
    handle: bytes


def _checked(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not isinstance(table, np.ndarray) or table.dtype != BLOCK_COPY_DTYPE:
        got = getattr(table, "dtype", type(table).__name__)
        raise TableError(f"a table is a numpy array of BLOCK_COPY_DTYPE, got {got}")
    return table


def copy_cpu(table: npt.NDArray[Any], *, pids: Sequence[int], threads: int = 1) -> CopyStats:
    """Copies blocks from the memory of processes on this host into this process.

    Args:
        table: rows of `BLOCK_COPY_DTYPE`; ``dst`` are addresses here, ``src`` addresses in ``pids[source]``.
        pids: process ids; 0 or this process' own id means this process.
        threads: how many threads copy; 1 means the caller's own.

    Raises:
        TableError: a row must not be executed; nothing was copied.
        SourceGoneError, SourcePermissionError, SourceFaultError, SourceError: a source could not be read. Has ``pid``,
            ``address``, ``bytes``, ``block`` and ``errno``. Destinations are undefined afterwards.
    """
    return CopyStats(**_C.copy_cpu(_checked(table), list(pids), threads))


def compare_cpu(table: npt.NDArray[Any], *, pids: Sequence[int], threads: int = 1) -> CompareResult:
    """Compares bit for bit what `copy_cpu` would write with what lies there. Arguments and errors as there."""
    return CompareResult(**_C.compare_cpu(_checked(table), list(pids), threads))


def allow_ptrace_by_any() -> bool:
    """Lets processes of the same user read this process' memory where Yama's ``ptrace_scope`` is 1.

    Returns:
        False where the kernel has no Yama, and so nothing needs allowing.
    """
    return bool(_C.allow_ptrace_by_any())


def snapshot(modules: list[Any], mapping: dict[str, Any], tensor_type: type, sharded_type: type) -> tuple[bytes, bytes]:
    """Everything that modules and a mapping register, and where its tensors are; equal if nothing has changed.

    For each module and the mapping: how many entries, each with the hash of its name and its identity; for a tensor
    the address, device, size, strides and dtype of its data, and for one of `sharded_type` (torch's DTensor) also the
    identities of its sharding and of its local part. Values do not matter.

    Returns:
        That, and the addresses that were visited, for `prefetch`.

    Args:
        tensor_type: torch's Tensor, which tells by DLPack's C exchange API (torch 2.10 and later) where one is.
        sharded_type: torch's DTensor.

    Raises:
        TypeError, AttributeError, BufferError, RuntimeError: something there is no ordinary module or tensor.
    """
    seen, visited = _C.snapshot(modules, mapping, tensor_type, sharded_type)
    return seen, visited


def prefetch(visited: bytes) -> None:
    """Fetches into the caches what `snapshot` visited, all at once; it does not matter if it is there no more."""
    _C.prefetch(visited)


def has_cuda() -> bool:
    """Whether the CUDA backend was built. Says nothing about a driver or a device."""
    return bool(_C.has_cuda)


def _cuda(name: str) -> Any:
    if not has_cuda():
        raise NativeError(f"{name}: spmd_engine was built without CUDA; rebuild it with SPMD_ENGINE_CUDA=ON")
    return getattr(_C, name)


def export_allocation(address: int) -> ExportedAllocation:
    """Exports the whole device allocation, or finds the chunk, that `address` (anywhere in it) belongs to.

    The exporter must keep an allocation for as long as another process has it open.

    Raises:
        NotExportableError: its allocator did not make it shareable; the message says what to do.
        CudaError: any other failure; has ``code`` and ``name``.
    """
    base, size, handle = _cuda("export_allocation")(address)
    return ExportedAllocation(base=base, size=size, handle=handle)


def allocation_ids(addresses: Sequence[int]) -> list[int]:
    """For each device address the number of its allocation, unique for the life of this process; 0 if it is free.

    Memory that was freed and allocated again at the same address has another number; so has a chunk that was mapped
    again. Takes well under a microsecond each.
    """
    ids: list[int] = _cuda("allocation_ids")(addresses)
    return ids


def export_descriptors(addresses: Sequence[int]) -> list[int]:
    """One new file descriptor for the chunk at each address, for `ChunkMapping` in another process.

    The caller closes them. A descriptor keeps its chunk's memory, even when the exporter has freed it. Takes about
    0.1 ms each.

    Raises:
        CudaError: no chunk is mapped there, or it cannot be exported; no descriptor is left open.
    """
    descriptors: list[int] = _cuda("export_descriptors")(addresses)
    return descriptors


def pin(address: int, size: int, *, device: int) -> None:
    """Lets GPUs copy from and to memory of the CPU at full speed; it must stay mapped until `unpin`.

    Raises:
        CudaError: it cannot be pinned: a limit, or no memory.
    """
    _cuda("pin")(device, address, size)


def unpin(address: int, *, device: int) -> None:
    """Ends `pin`. No copy may still run."""
    _cuda("unpin")(device, address)


class IpcMapping:
    """An exported allocation of another process, mapped for use by `device`. It is unmapped when this object ends.

    Open a handle once and keep it: this takes milliseconds. A process cannot open what it exported itself.

    Args:
        handle: the 64 bytes of an `ExportedAllocation`.
        device: ordinal of this process, which reads the allocation.

    Raises:
        CudaError: it cannot be mapped; for example its owner has freed it, or is gone.
        NativeError: a handle has another length.
    """

    def __init__(self, handle: bytes, *, device: int) -> None:
        self._mapping = _cuda("IpcMapping")(device, handle)

    @property
    def base(self) -> int:
        """Address of the allocation in this process; 0 once closed."""
        return int(self._mapping.base)

    def close(self) -> None:
        """Unmaps it. No copy from it may still run. Twice is fine."""
        self._mapping.close()


class ChunkMapping:
    """Chunks of another process, mapped side by side in one range of addresses. For one thread at a time.

    Args:
        sizes: bytes of each chunk, as the exporter has them.
        device: ordinal of this process, which reads the chunks.

    Raises:
        CudaError: no addresses are left, or a size is none that a chunk can have.
    """

    def __init__(self, sizes: Sequence[int], *, device: int) -> None:
        self._mapping = _cuda("ChunkMapping")(device, sizes)

    @property
    def base(self) -> int:
        """Address of the first chunk; 0 once closed."""
        return int(self._mapping.base)

    @property
    def mapped(self) -> int:
        """How many chunks are mapped."""
        return int(self._mapping.mapped)

    def map(self, descriptors: Sequence[int]) -> None:
        """Maps the chunks that follow those already mapped. The descriptors stay open, and are not needed afterwards.

        Raises:
            CudaError: a descriptor names no chunk, or one of another size, or `device` cannot reach it.
        """
        self._mapping.map(descriptors)

    def close(self) -> None:
        """Unmaps all chunks. No copy from them may still run. Twice is fine."""
        self._mapping.close()


def device_uuid(device: int) -> str:
    """The UUID of an ordinal of this process, as nvidia-smi prints it (``GPU-...``)."""
    return str(_cuda("device_uuid")(device))


class CopyTable:
    """Block copies kept in device memory and executed by one kernel launch. For one thread at a time.

    Args:
        table: rows of `BLOCK_COPY_DTYPE`, with addresses that `device` can reach.
        device: ordinal of this process.
        peers: for each row 0 if the source lies on `device`, else a number (to 255) of the device that it lies on. Such
            rows are copied by threads of their own, evenly from all of them, so that all links work all the time.
        tile_bytes, far_tile_bytes: how much a thread block copies at a time, from `device` and from others. Large tiles
            in few thread blocks keep the memory of an H200 at 94 % of the rate of one large copy.

    Raises:
        TableError: a row must not be executed.
        CudaError: a CUDA call failed.
    """

    def __init__(
        self,
        table: npt.NDArray[Any],
        *,
        device: int,
        peers: Sequence[int] | npt.NDArray[Any] | None = None,
        tile_bytes: int = 256 << 10,
        far_tile_bytes: int = 128 << 10,
    ) -> None:
        of_rows = np.zeros(len(table), dtype=np.uint8) if peers is None else np.asarray(peers, dtype=np.uint8)
        self._table = _cuda("CopyTable")(device, _checked(table), of_rows, tile_bytes, far_tile_bytes)

    @property
    def tiles(self) -> int:
        """How many tiles the table was cut into."""
        return int(self._table.tiles)

    @property
    def bytes_read(self) -> int:
        """Bytes one launch reads from the sources."""
        return int(self._table.bytes_read)

    def patch(self, table: npt.NDArray[Any]) -> None:
        """Replaces the addresses. Everything but ``src``, ``dst`` and ``source`` must be as before.

        Waits for launches of this table that still run.
        """
        self._table.patch(_checked(table))

    def launch(self, *, stream: int = 0) -> None:
        """Starts the copy on a stream of the table's device (a ``cudaStream_t`` as an integer) and returns at once.

        A launch on another stream than the one before starts when that one has ended.
        """
        self._table.launch(stream)

    def elapsed_ms(self) -> float:
        """Waits for the last launch and returns its time on the device in milliseconds."""
        return float(self._table.elapsed_ms())

    def compare(self, *, stream: int = 0) -> CompareResult:
        """Compares bit for bit what `launch` would write with what lies there, and waits for the answer."""
        return CompareResult(**self._table.compare(stream))

    def close(self) -> None:
        """Waits for the last launch and frees the device memory. Twice is fine."""
        self._table.close()

    def __enter__(self) -> CopyTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
