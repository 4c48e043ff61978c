"""Runs a TransferPlan: the same few calls for shards on the CPU and on GPUs.

A transfer is made once for each plan (`prepare`), gets addresses whenever shards have moved (`bind`), and then copies
as often as wanted (`start`, `finish`). The device of the engine's parameters decides which kind it is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from spmd_engine.errors import MemoryNotOfferedError, PlanError, TransferError
from spmd_engine.planning.plan import TransferPlan
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.transfer import _native
from spmd_engine.transfer.fd_passing import PassingError
from spmd_engine.transfer.handles import OpenHandles

logger = logging.getLogger(__name__)

_MAX_THREADS = 16
_NATIVE_ERRORS = (_native.NativeError, _native.TableError)


class Transfer(Protocol):
    """A plan that can be executed."""

    def bind(self, memories: Mapping[int, ShardMemory]) -> None:
        """Take the present addresses of all shards; `memories` has every rank of the update.

        Raises:
            TransferError: a rank's memory cannot be reached. Nothing was written.
        """

    def start(self) -> None:
        """Begin to move everything. It may go on by itself, or `finish` does it.

        Raises:
            TransferError: the parameters are undefined.
        """

    def finish(self) -> float:
        """Wait until everything has moved. Returns the seconds that the copy itself took, on the device.

        Raises:
            TransferError: the parameters are undefined.
        """

    def compare(self) -> int:
        """How many elements differ from what a copy would write."""

    def wait(self) -> None:
        """Wait for work that others queued on the parameters' device in this process."""

    def close(self) -> None:
        """Give back what the transfer holds. Twice is fine."""


def prepare(plan: TransferPlan, *, rank: int, device: torch.device, handles: OpenHandles | None) -> Transfer:
    """The transfer for a plan whose destinations are on `device`.

    Args:
        plan: for this process.
        rank: global rank of this process's trainer, for messages.
        device: of the engine's parameters.
        handles: what this process has mapped; needed on a GPU.
    """
    if device.type == "cpu":
        return CpuTransfer(plan, rank)
    assert handles is not None
    return CudaTransfer(plan, rank, device, handles)


def unreachable(
    memories: Mapping[int, ShardMemory], nodes: Mapping[int, int], rank: int, device: torch.device
) -> list[int]:
    """The ranks whose shards `rank` cannot read in place: those on other nodes, and in CPU memory for a GPU.

    Args:
        memories: of every rank of the update.
        nodes: number of the node of every rank.
        device: of the engine's parameters.

    Raises:
        PlanError: shards on a GPU for an engine on the CPU.
    """
    on_gpu = [r for r, memory in memories.items() if not memory.is_cpu]
    if on_gpu and device.type == "cpu":
        raise PlanError(f"the engine computes on the CPU and the shards of ranks {on_gpu} are on GPUs: move them first")
    is_gpu = device.type != "cpu"
    return [r for r, memory in memories.items() if nodes[r] != nodes[rank] or (memory.is_cpu and is_gpu)]


def _wrong(found: _native.CompareResult, plan: TransferPlan, rank: int) -> int:
    """How many elements differ; the log of the scheduler process says where the first of them is."""
    if found.first is not None:
        row, element = found.first
        logger.error(
            "rank %d: %d elements differ, the first of them element %d of row %d of the copy table, which is a part of "
            "weight %d of the source, from the shard of rank %d",
            rank, found.wrong_elements, element, row, plan.weight[row], plan.rank[row],
        )  # fmt: skip
    return found.wrong_elements


class CpuTransfer:
    """Reads the memory of other processes with `process_vm_readv`."""

    def __init__(self, plan: TransferPlan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._ranks = np.unique(plan.rank)
        self._table: np.ndarray | None = None
        self._pids: list[int] = []
        self._threads = 1

    def bind(self, memories: Mapping[int, ShardMemory]) -> None:
        self._table = self._plan.bind({int(rank): memories[int(rank)].offset for rank in self._ranks})
        self._table["source"] = np.searchsorted(self._ranks, self._plan.rank)
        self._pids = [memories[int(rank)].pid for rank in self._ranks]
        # All ranks of the update copy at the same time, on the same cores.
        self._threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // len(memories)))

    def start(self) -> None:
        pass

    def finish(self) -> float:
        assert self._table is not None
        began = time.monotonic()
        try:
            _native.copy_cpu(self._table, pids=self._pids, threads=self._threads)
        except _NATIVE_ERRORS as error:
            raise self._failure(error) from error
        return time.monotonic() - began

    def compare(self) -> int:
        assert self._table is not None
        return self._compare(self._table, self._pids)

    def _compare(self, table: np.ndarray, pids: list[int]) -> int:
        try:
            found = _native.compare_cpu(table, pids=pids, threads=self._threads)
            return _wrong(found, self._plan, self._rank)
        except _NATIVE_ERRORS as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self._table = None

    def _failure(self, error: Exception) -> TransferError:
        return TransferError(f"rank {self._rank} could not read a shard: {error}")


class CudaTransfer:
    """One kernel launch, which reads the shards through mapped handles by a table in device memory."""

    def __init__(self, plan: TransferPlan, rank: int, device: torch.device, handles: OpenHandles) -> None:
        self._plan, self._rank, self._handles = plan, rank, handles
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._uuid = _native.device_uuid(self._device)
        self._table: _native.CopyTable | None = None
        self._bound_peers = np.zeros(0, np.uint8)
        self._opened_at = -1  # generation of the mappings that the table reads

    def bind(self, memories: Mapping[int, ShardMemory]) -> None:
        addresses = {}
        for rank in np.unique(self._plan.rank).tolist():
            wanted = np.unique(self._plan.weight[self._plan.rank == rank])
            try:
                addresses[rank] = self._handles.addresses(memories[rank], wanted)
            except PassingError as error:
                raise MemoryNotOfferedError(
                    f"rank {self._rank} did not get the file descriptors of rank {rank}'s memory: {error}"
                ) from error
            except _NATIVE_ERRORS as error:
                raise TransferError(
                    f"rank {self._rank} on {self._uuid} cannot open the memory of rank {rank} on "
                    f"{memories[rank].device}: {error}. The GPUs must be able to reach each other (nvidia-smi "
                    f"topo -p2p r), and rank {rank} must not have freed its shards"
                ) from error
        table = self._plan.bind(addresses)
        self._opened_at = self._handles.generation
        peers = self._peers(memories)
        try:
            if self._table is not None and np.array_equal(peers, self._bound_peers):
                self._table.patch(table)
            else:
                self.close()
                self._table = _native.CopyTable(table, device=self._device, peers=peers)
                self._bound_peers = peers
        except _NATIVE_ERRORS as error:
            raise TransferError(f"rank {self._rank}: its copy table was refused: {error}") from error

    def _peers(self, memories: Mapping[int, ShardMemory]) -> np.ndarray:
        """For each row of the plan 0 if it reads this device, else a number of the device that it reads."""
        devices = {rank: memories[rank].device for rank in np.unique(self._plan.rank).tolist()}
        others = sorted(set(devices.values()) - {self._uuid})
        number = {self._uuid: 0, **{uuid: 1 + i % 255 for i, uuid in enumerate(others)}}
        peers = np.zeros(len(self._plan.rank), np.uint8)
        for rank, uuid in devices.items():
            peers[self._plan.rank == rank] = number[uuid]
        return peers

    def _check_open(self) -> None:
        """Refuse to read what may be closed: a table holds addresses, and the GPU would not notice."""
        if self._opened_at != self._handles.generation:
            raise TransferError(
                f"rank {self._rank}: memory that the plan reads was closed since it was opened; this is a defect of "
                "spmd_engine: please report it"
            )

    def start(self) -> None:
        self._check_open()
        assert self._table is not None
        try:
            self._table.launch(stream=torch.cuda.current_stream(self._device).cuda_stream)
        except _NATIVE_ERRORS as error:
            raise self._failure(error) from error

    def finish(self) -> float:
        assert self._table is not None
        try:
            return self._table.elapsed_ms() / 1e3
        except _NATIVE_ERRORS as error:
            raise self._failure(error) from error

    def compare(self) -> int:
        self._check_open()
        assert self._table is not None
        try:
            found = self._table.compare(stream=torch.cuda.current_stream(self._device).cuda_stream)
            return _wrong(found, self._plan, self._rank)
        except _NATIVE_ERRORS as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

    def _failure(self, error: Exception) -> TransferError:
        return TransferError(f"rank {self._rank}: the copy on {self._uuid} failed: {error}")
