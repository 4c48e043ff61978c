# SPDX-License-Identifier: Apache-2.0
"""Memory of torch's expandable segments: exported by file descriptors, opened in another process, and not mistaken."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from spmd_engine.control import codec
from spmd_engine.transfer import _native, fd_passing
from spmd_engine.transfer.fd_passing import DescriptorServer
from spmd_engine.transfer.handles import Exporter, ShardMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="spmd_engine was built without CUDA"),
]
MIB = 1 << 20
# Opens what a frame on standard input names; then, for each line "weight elements", prints the sum of that shard.
OPENER = """
import json, resource, sys, time
import numpy as np
import torch
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.transfer import _native
from spmd_engine.control import codec
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.transfer.handles import OpenHandles
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
size = int(sys.stdin.buffer.readline())
memory = codec.decode(sys.stdin.buffer.read(size), ShardMemory)
torch.zeros(1, device="cuda")
handles = OpenHandles(0)
began = time.perf_counter()
addresses = handles.addresses(memory, np.arange(len(memory.offset)))
print(f"opened {len(handles)} allocations in {time.perf_counter() - began:.4f} s", flush=True)
for line in sys.stdin.buffer:
    weight, count = map(int, line.split())
    here = torch.zeros(count, dtype=torch.int32, device="cuda")
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (addresses[weight], here.data_ptr(), 1, count, 0, 0, 0, 5, 5)
    with _native.CopyTable(table, device=0) as copies:
        copies.launch(stream=torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    print(int(here.sum()), flush=True)
began = time.perf_counter()
handles.close()
handles.close()
print(f"closed in {time.perf_counter() - began:.4f} s")
"""


@contextlib.contextmanager
def expandable() -> Iterator[None]:
    """New segments of torch's allocator are expandable ones."""
    torch.cuda.empty_cache()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def places(tensors: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    addresses = [tensor.data_ptr() for tensor in tensors]
    return np.array(addresses, np.uint64), np.array([tensor.nbytes for tensor in tensors], np.uint64)


def serve(exporter: Exporter, memory: ShardMemory) -> DescriptorServer:
    """What the trainer rank and its scheduler process do, here in one process."""
    left, right = socket.socketpair()
    counts = {handle: len(sizes) for handle, sizes in zip(memory.handles, memory.chunks, strict=True) if sizes}
    with left, right:
        thread = threading.Thread(target=lambda: exporter.send_descriptors(left, timeout_s=30.0))
        thread.start()
        server = DescriptorServer.receive(right, counts, timeout_s=30.0)
        thread.join()
    return server


class Opener:
    """Another process that has opened exported memory."""

    def __init__(self, memory: ShardMemory, offered_at: str) -> None:

        command = [sys.executable, "-c", OPENER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        told = codec.encode(replace(memory, offered_at=offered_at))
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"%d\n" % len(told) + told)
        self._process.stdin.flush()
        self.opened = self._process.stdout.readline().decode()
        assert "opened" in self.opened

    def sum(self, weight: int, elements: int) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"%d %d\n" % (weight, elements))
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> str:
        text, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        return text.decode()


def test_another_process_reads_chunks_and_cuda_malloc_memory_side_by_side() -> None:
    plain = torch.arange(3 * MIB, dtype=torch.int32, device="cuda")
    with expandable():
        large = torch.arange(25 * MIB, dtype=torch.int32, device="cuda")  # 100 MiB: over several chunks
        small = torch.arange(1000, dtype=torch.int32, device="cuda")
        tensors = [large[4 * MIB :], plain, small, large[: 5 * MIB + 3]]
        exporter = Exporter()
        memory = exporter.export(*places(tensors), device=0)
    kinds = [len(sizes) for sizes in memory.chunks]
    assert 0 in kinds and max(kinds) >= 5, kinds
    assert all(sum(sizes) % (2 * MIB) == 0 for sizes in memory.chunks)
    torch.cuda.synchronize()
    server = serve(exporter, memory)
    opener = Opener(memory, server.address)
    server.close()
    for weight, tensor in enumerate(tensors):
        assert opener.sum(weight, tensor.numel()) == int(tensor.sum(dtype=torch.int64)), weight
    plain += 1
    large += 1  # the same bytes, not a copy
    torch.cuda.synchronize()
    assert opener.sum(0, 100) == int(tensors[0][:100].sum())
    assert opener.sum(1, 100) == int(tensors[1][:100].sum())
    assert "closed" in opener.end()


def test_what_was_freed_and_allocated_again_at_the_same_address_is_noticed() -> None:
    with expandable():
        tensors = [torch.full((20 * MIB,), 1, dtype=torch.int32, device="cuda")]
        small = torch.zeros(10, device="cuda")
        exporter = Exporter()
        first = exporter.export(*places(tensors), device=0)
        assert exporter.export(*places(tensors), device=0) is first
        server = serve(exporter, first)
        before = places(tensors)
        torch.cuda.synchronize()
        tensors.clear()
        torch.cuda.empty_cache()
        assert set(_native.allocation_ids(before[0].tolist())) == {0}
        with pytest.raises(_native.CudaError, match="no chunk is mapped"):
            _native.export_descriptors(before[0].tolist())
        with pytest.raises(_native.CudaError):
            exporter.export(*before, device=0)
        # The descriptors keep what they stand for.
        opener = Opener(first, server.address)
        server.close()
        assert opener.sum(0, 20 * MIB) == 20 * MIB

        tensors.append(torch.full((20 * MIB,), 2, dtype=torch.int32, device="cuda"))
        torch.cuda.synchronize()
        if places(tensors)[0] != before[0]:
            pytest.skip("torch's allocator did not reuse the address")
        second = exporter.export(*places(tensors), device=0)
        assert not second.same_as(first) and not set(second.handles) & set(first.handles)
        assert opener.sum(0, 1000) == 1000
        opener.end()
        server = serve(exporter, second)
        opener = Opener(second, server.address)
        server.close()
        assert opener.sum(0, 20 * MIB) == 2 * 20 * MIB
        opener.end()
        del small


def test_descriptors_that_name_no_chunk_and_mappings_that_cannot_be() -> None:
    with expandable():
        memory = torch.zeros(20 * MIB, dtype=torch.int32, device="cuda")
    chunk = _native.export_allocation(memory.data_ptr())
    assert chunk.handle == b"" and chunk.base <= memory.data_ptr() < chunk.base + chunk.size
    (descriptor,) = _native.export_descriptors([memory.data_ptr() + 1])
    assert not os.get_inheritable(descriptor)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(_native.CudaError, match="no chunk is mapped at 0x1000"):
        _native.export_descriptors([memory.data_ptr(), 4096])
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/dev/null") as file:
        for bad in (file.fileno(), 9999):
            mapping = _native.ChunkMapping([chunk.size], device=0)
            with pytest.raises(_native.CudaError, match="cuMemImportFromShareableHandle"):
                mapping.map([bad])
            assert mapping.mapped == 0
            mapping.close()
    wrong_size = _native.ChunkMapping([2 * chunk.size], device=0)
    with pytest.raises(_native.CudaError, match="cuMemMap"):
        wrong_size.map([descriptor])
    with pytest.raises(_native.NativeError, match="2 descriptors for the last 1 of 1 chunks"):
        wrong_size.map([descriptor] * 2)
    del wrong_size
    with pytest.raises(_native.NativeError, match="at least one chunk"):
        _native.ChunkMapping([], device=0)
    with pytest.raises(_native.NativeError, match="0 bytes"):
        _native.ChunkMapping([0], device=0)
    with pytest.raises(_native.CudaError):
        _native.ChunkMapping([4097], device=0)

    mapping = _native.ChunkMapping([chunk.size, chunk.size], device=0)
    mapping.map([descriptor])  # a process may open its own chunks, too
    assert mapping.base and mapping.mapped == 1
    mapping.close()
    mapping.close()
    assert mapping.base == 0
    with pytest.raises(_native.NativeError, match="closed"):
        mapping.map([descriptor])
    os.close(descriptor)


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "0"},
            "unset TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "no backend:cudaMallocAsync"),
    ],
)
def test_memory_that_cannot_be_shared_is_refused_with_advice(environment: dict[str, str], advice: str) -> None:
    code = (
        "import torch\n"
        "from spmd_engine.transfer import _native\n"
        "memory = torch.zeros(1 << 20, device='cuda')\n"
        "try:\n"
        "    _native.export_allocation(memory.data_ptr())\n"
        "except _native.NotExportableError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    assert advice in done.stdout, done.stdout + done.stderr


def test_a_model_of_760_chunks_takes_little_time() -> None:
    """As many chunks as a 7B model in bfloat16 has, though small ones, with few files open."""
    count = 760
    with expandable():
        tensors = [torch.ones(MIB // 4, dtype=torch.int32, device="cuda") for _ in range(2 * count)]
        torch.cuda.synchronize()
        exporter, at = Exporter(), places(tensors)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        began = time.perf_counter()
        memory = exporter.export(*at, device=0)
        described = time.perf_counter()
        server = serve(exporter, memory)
        exported = time.perf_counter()
        chunks = sum(len(sizes) for sizes in memory.chunks)
        assert chunks >= count
        opener = Opener(memory, server.address)
        server.close()
        assert opener.sum(2 * count - 1, 100) == 100
        closed = opener.end().strip()
        unmoved = []
        for _ in range(20):
            started = time.perf_counter()
            assert exporter.export(*at, device=0) is memory
            unmoved.append(time.perf_counter() - started)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    print(
        f"\n{chunks} chunks, {len(memory.handles)} runs: described in {described - began:.4f} s, exported and passed "
        f"on in {exported - described:.4f} s; {opener.opened.strip()}; {closed}; found unmoved in "
        f"{statistics.median(unmoved) * 1e3:.3f} ms"
    )
    assert exported - began < 0.3
    assert statistics.median(unmoved) < 1e-3
    assert fd_passing.BATCH < 253
