"""Which allocations and chunks shards lie in, and how runs of chunks are opened, on pretended device memory."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from dataclasses import replace

import numpy as np
import pytest

from spmd_engine.control import codec
from spmd_engine.control.messages import Descriptors
from spmd_engine.errors import TransferError
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.trainer.weight_updates import WeightUpdates
from spmd_engine.transfer import _native, fd_passing
from spmd_engine.transfer.fd_passing import DescriptorServer, PassingError
from spmd_engine.transfer.handles import NOWHERE, Exporter, OpenHandles

KIB = 1 << 10


class Device:
    """Allocations as (base, size, is a chunk); each chunk is a file that holds its number."""

    def __init__(self, *pieces: tuple[int, int, bool]) -> None:
        self.pieces = list(pieces)
        self.ids = list(range(1, len(pieces) + 1))

    def _find(self, address: int) -> int:
        return next(i for i, (base, size, _) in enumerate(self.pieces) if base <= address < base + size)

    def export_allocation(self, address: int) -> _native.ExportedAllocation:
        number = self._find(address)
        base, size, is_chunk = self.pieces[number]
        return _native.ExportedAllocation(base, size, b"" if is_chunk else bytes([number]) * 64)

    def allocation_ids(self, addresses: list[int]) -> list[int]:
        return [self.ids[self._find(address)] for address in addresses]

    def export_descriptors(self, addresses: list[int]) -> list[int]:
        made = []
        for address in addresses:
            with tempfile.TemporaryFile() as file:
                file.write(str(self._find(address)).encode())
                file.flush()
                made.append(os.dup(file.fileno()))
        return made


class OneMapping:
    """In place of IpcMapping: allocation number n is at n + 1 TiB."""

    closed: list[int] = []

    def __init__(self, handle: bytes, *, device: int) -> None:
        self.base = int(handle[0] + 1) << 40

    def close(self) -> None:
        OneMapping.closed.append(self.base)


class Mapping:
    """In place of ChunkMapping: reads the numbers of the chunks. The n-th one is at n MiB."""

    made: list[Mapping] = []
    limit = 1 << 30

    def __init__(self, sizes: tuple[int, ...], *, device: int) -> None:
        Mapping.made.append(self)
        self.sizes, self.chunks, self.is_closed = sizes, [], False
        self.base = len(Mapping.made) << 20

    @property
    def mapped(self) -> int:
        return len(self.chunks)

    def map(self, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            if self.mapped == self.limit:
                raise _native.CudaError("no more")
            self.chunks.append(int(os.pread(descriptor, 9, 0)))
        assert self.mapped <= len(self.sizes)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def device(monkeypatch):
    # cudaMalloc, a gap, three chunks, a gap, a chunk, and one right behind what cudaMalloc made.
    made = Device(
        (100 * KIB, 10 * KIB, False),
        (200 * KIB, 2 * KIB, True),
        (202 * KIB, 2 * KIB, True),
        (204 * KIB, 20 * KIB, True),
        (300 * KIB, 2 * KIB, True),
        (400 * KIB, 10 * KIB, False),
        (410 * KIB, 2 * KIB, True),
    )
    for name in ("export_allocation", "allocation_ids", "export_descriptors"):
        monkeypatch.setattr(_native, name, getattr(made, name))
    monkeypatch.setattr(_native, "device_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(_native, "IpcMapping", OneMapping)
    monkeypatch.setattr(OneMapping, "closed", [])
    monkeypatch.setattr(_native, "ChunkMapping", Mapping)
    monkeypatch.setattr(Mapping, "made", [])
    monkeypatch.setattr(fd_passing, "BATCH", 2)
    return made


def shards(*places: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and sizes from KiB."""
    table = (np.array(places, float) * KIB).astype(np.uint64)
    return table[:, 0], table[:, 1]


# Two from cudaMalloc, an empty one, one over two chunks, one in the second of them, one over the third and two alone.
ALL = shards((400, 10), (102, 8), (0, 0), (201, 2), (202.5, 1), (204, 20), (300, 1), (411, 1))


def offered(exporter: Exporter, memory) -> DescriptorServer:
    left, right = socket.socketpair()
    counts = {handle: len(sizes) for handle, sizes in zip(memory.handles, memory.chunks, strict=True) if sizes}
    with left, right:
        thread = threading.Thread(target=lambda: exporter.send_descriptors(left, timeout_s=10.0))
        thread.start()
        server = DescriptorServer.receive(right, counts, timeout_s=10.0)
        thread.join()
    return server


def test_a_run_is_as_long_as_the_adjoining_chunks_that_shards_touch(device):
    memory = Exporter().export(*ALL, device=0)
    assert memory.chunks == ((), (2 * KIB, 2 * KIB, 20 * KIB), (2 * KIB,), (), (2 * KIB,))
    assert memory.allocation.tolist() == [3, 0, NOWHERE, 1, 1, 1, 2, 4]
    assert memory.offset.tolist() == [0, 2 * KIB, 0, KIB, 2.5 * KIB, 4 * KIB, 0, KIB]
    assert len(set(memory.handles)) == 5 and {len(handle) for handle in memory.handles} == {64}
    middle = Exporter().export(*shards((202, 1), (300, 1)), device=0)
    assert middle.chunks == ((2 * KIB,), (2 * KIB,))
    assert Exporter().export(*shards((0, 0)), device=0).handles == ()


def test_a_chunk_that_was_mapped_anew_has_another_handle_and_the_others_keep_theirs(device):
    exporter = Exporter()
    first = exporter.export(*ALL, device=0)
    assert exporter.export(*ALL, device=0) is first
    device.ids[2] = 99
    second = exporter.export(*ALL, device=0)
    assert [a == b for a, b in zip(first.handles, second.handles, strict=True)] == [True, False, True, True, True]
    addresses, sizes = ALL
    assert exporter.export(addresses, sizes.copy(), device=0) is second
    longer = sizes.copy()
    longer[0] -= 1
    assert exporter.export(addresses, longer, device=0) is not second
    assert Exporter().export(*ALL, device=0).handles[1] != second.handles[1]


def test_runs_and_handles_are_opened_once_and_closed(device):
    exporter = Exporter()
    memory = exporter.export(*ALL, device=0)
    server = offered(exporter, memory)
    received = codec.decode(codec.encode(memory), ShardMemory)
    received = replace(received, offered_at=server.address)
    opened = OpenHandles(0)
    found = opened.addresses(received, np.array([1, 2, 3, 5, 7]))
    assert [mapping.chunks for mapping in Mapping.made] == [[1, 2, 3], [6]]
    expected = [0, (1 << 40) + 2 * KIB, 0, (1 << 20) + KIB, 0, (1 << 20) + 4 * KIB, 0, (2 << 20) + KIB]
    assert found.tolist() == expected
    assert len(opened) == 3
    opened.addresses(received, np.arange(8))
    assert [mapping.chunks for mapping in Mapping.made] == [[1, 2, 3], [6], [4]]
    server.close()
    assert opened.addresses(received, np.array([3, 6])).tolist()[3:7:3] == [(1 << 20) + KIB, 3 << 20]
    opened.keep_only([memory.handles[1], memory.handles[3]])
    assert [mapping.is_closed for mapping in Mapping.made] == [False, True, True]
    assert OneMapping.closed == [1 << 40]
    opened.close()
    opened.close()
    assert Mapping.made[0].is_closed and OneMapping.closed == [1 << 40, 6 << 40] and len(opened) == 0


def test_what_cannot_be_opened_leaves_nothing_behind(device):
    exporter = Exporter()
    memory = exporter.export(*ALL, device=0)
    opened, before = OpenHandles(0), len(os.listdir("/proc/self/fd"))
    with pytest.raises(PassingError, match="nobody offers"):
        opened.addresses(memory, np.array([3, 7]))
    assert len(opened) == 0 and all(mapping.is_closed for mapping in Mapping.made)

    server = offered(exporter, memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mapping, "limit", 1)
        with pytest.raises(_native.CudaError, match="no more"):
            opened.addresses(type(memory)(**{**vars(memory), "offered_at": server.address}), np.array([3, 7]))
    server.close()
    assert len(opened) == 0 and all(mapping.is_closed for mapping in Mapping.made)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_generation_grows_whenever_something_is_closed(device, monkeypatch):
    memory = Exporter().export(*ALL, device=0)
    opened = OpenHandles(0)
    opened.addresses(memory, np.array([0, 1]))
    opened.keep_only(memory.handles)
    assert opened.generation == 0, "nothing was closed"
    opened.keep_only([memory.handles[3]])
    assert opened.generation == 1
    opened.addresses(memory, np.array([0, 1]))
    assert opened.generation == 1, "what is open stays where it is when more is opened"

    def fail(mapping: OneMapping) -> None:
        raise _native.CudaError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(OneMapping, "close", fail)
        with pytest.raises(_native.CudaError, match="lost"):
            opened.keep_only([memory.handles[3]])
    assert opened.generation == 2, "nobody knows what is still mapped"
    opened.close()
    assert opened.generation == 3 and len(opened) == 0
    opened.close()
    assert opened.generation == 3


class Process:
    """In place of a scheduler process that takes descriptors, or is gone."""

    def __init__(self, *, is_alive: bool) -> None:
        self.is_alive, self.servers, self.thread = is_alive, [], None

    def send(self, message: Descriptors, fds: tuple[int, ...]) -> None:
        if self.is_alive:
            sock = socket.socket(fileno=os.dup(fds[0]))
            self.thread = threading.Thread(target=self._take, args=(sock, message.counts))
            self.thread.start()

    def _take(self, sock: socket.socket, counts: dict[bytes, int]) -> None:
        with sock:
            self.servers.append(DescriptorServer.receive(sock, counts, timeout_s=10.0))


def test_a_rank_passes_its_descriptors_on_or_says_that_it_cannot(device):
    before = len(os.listdir("/proc/self/fd"))
    for is_alive in (True, False):
        process = Process(is_alive=is_alive)
        updates = WeightUpdates(3, (3,), process, 10.0, None)
        memory = updates._exporter.export(*ALL, device=0)
        if is_alive:
            updates._pass_descriptors(memory)
            process.thread.join()
            (server,) = process.servers
            counts = {memory.handles[1]: 3}
            texts = []
            for batch in fd_passing.fetch(server.address, counts):
                texts += [os.pread(descriptor, 9, 0) for descriptor in batch]
                fd_passing.close_all(batch)
            assert texts == [b"1", b"2", b"3"]
            server.close()
        else:
            with pytest.raises(TransferError, match="rank 3 could not pass its shards' memory"):
                updates._pass_descriptors(memory)
    assert len(os.listdir("/proc/self/fd")) == before
