# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel and memory handles, with the assertions of tests/native/test_copy_cpu.py."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.blocks import (
    CASTS,
    LARGE_BLOCKS,
    REPEATABLE,
    Case,
    bits_dtype,
    build_case,
    cases,
    cast_bits,
    corrupt,
    values_to_cast,
)

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType
from spmd_engine.transfer import _native
from spmd_engine.transfer._native import CompareResult, CopyTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="spmd_engine was built without CUDA"),
]


def on_device(content: np.ndarray, misaligned: int = 0) -> torch.Tensor:
    memory = torch.empty(content.nbytes + misaligned, dtype=torch.uint8, device="cuda")[misaligned:]
    memory.copy_(torch.from_numpy(content.view(np.uint8)))
    return memory


def check_copy_and_compare(
    case: Case, seed: int, *, tile_bytes: int = 65536, misaligned: tuple[int, int] = (0, 0)
) -> None:
    expected = case.expected()
    src, dst = on_device(case.src, misaligned[0]), on_device(case.dst, misaligned[1])
    peers = np.random.default_rng(seed).integers(0, 4, len(case.table))
    with CopyTable(
        case.at(src.data_ptr(), dst.data_ptr()),
        device=0,
        peers=peers,
        tile_bytes=tile_bytes,
        far_tile_bytes=max(16, tile_bytes // 2),
    ) as table:
        stream = torch.cuda.current_stream().cuda_stream
        table.launch(stream=stream)
        assert np.array_equal(dst.cpu().numpy(), expected)
        assert table.elapsed_ms() >= 0
        assert table.compare(stream=stream) == CompareResult(wrong_elements=0, first=None)

        case.dst[:] = expected
        wrong = corrupt(case, seed)
        dst.copy_(torch.from_numpy(case.dst))
        result = table.compare(stream=stream)
        assert result == CompareResult(wrong_elements=len(wrong), first=min(wrong, default=None))


@settings(REPEATABLE, max_examples=150)
@given(
    case=cases(),
    seed=st.integers(0, 2**32 - 1),
    tile_bytes=st.sampled_from([16, 1000, 4096, 65536]),
    misaligned=st.tuples(st.integers(0, 17), st.integers(0, 17)),
)
def test_random_tables(case: Case, seed: int, tile_bytes: int, misaligned: tuple[int, int]) -> None:
    check_copy_and_compare(case, seed, tile_bytes=tile_bytes, misaligned=misaligned)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("misaligned", [(0, 0), (2, 4), (3, 9)])
def test_blocks_larger_than_a_tile(seed: int, misaligned: tuple[int, int]) -> None:
    check_copy_and_compare(build_case(LARGE_BLOCKS, seed=seed), seed, misaligned=misaligned)


@pytest.mark.parametrize(("src_type", "dst_type"), CASTS)
def test_every_value_casts_as_torch_casts_it(src_type: ElementType, dst_type: ElementType) -> None:
    values = values_to_cast(src_type)
    src, dst = on_device(values), on_device(np.zeros(len(values), bits_dtype(dst_type)))
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (src.data_ptr(), dst.data_ptr(), 1, len(values), 0, 0, 0, src_type, dst_type)
    with CopyTable(table, device=0) as copies:
        copies.launch(stream=torch.cuda.current_stream().cuda_stream)
        got = dst.cpu().numpy().view(bits_dtype(dst_type))
    assert np.array_equal(got, cast_bits(values, src_type, dst_type))


def test_launches_are_ordered_with_their_stream() -> None:
    src = torch.zeros(1 << 24, dtype=torch.float32, device="cuda")
    dst = torch.full_like(src, -1)
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (src.data_ptr(), dst.data_ptr(), 1, src.numel(), 0, 0, 0, ElementType.F32, ElementType.F32)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with CopyTable(table, device=0) as copies, torch.cuda.stream(stream):
        for value in range(1, 20):
            src.fill_(value)
            copies.launch(stream=stream.cuda_stream)
            last = dst.clone()
        stream.synchronize()
        assert (last == 19).all()


def test_patch_moves_addresses_and_refuses_other_shapes() -> None:
    src = [torch.full((1000,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 2.0)]
    dst = [torch.zeros(1000, dtype=torch.float32, device="cuda") for _ in range(2)]
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (src[0].data_ptr(), dst[0].data_ptr(), 10, 100, 200, 400, 0, ElementType.BF16, ElementType.F32)
    with CopyTable(table, device=0) as copies:
        assert copies.bytes_read == 2000
        copies.launch()
        table["src"], table["dst"] = src[1].data_ptr(), dst[1].data_ptr()
        copies.patch(table)
        copies.launch()
        torch.cuda.synchronize()
        assert (dst[0] == 1).all() and (dst[1] == 2).all()
        table["rows"] = 9
        with pytest.raises(_native.TableError, match="block 0: a patch may change"):
            copies.patch(table)
    copies.close()
    with pytest.raises(_native.NativeError, match="closed"):
        copies.launch()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"src": 0}, "block 1: src is null"),
        ({"dst": 0}, "block 1: dst is null"),
        ({"src_dtype": 7}, "block 1: src_dtype 7"),
        ({"src_dtype": ElementType.F32, "dst_dtype": ElementType.RAW32}, "block 1: cannot cast"),
        ({"dst_pitch": 7}, "block 1: destination rows of 8 bytes overlap"),
    ],
)
def test_tables_that_must_not_be_executed(fields: dict[str, int], message: str) -> None:
    table = np.zeros(2, BLOCK_COPY_DTYPE)
    table[:] = (4096, 8192, 4, 8, 8, 8, 0, ElementType.RAW8, ElementType.RAW8)
    for name, value in fields.items():
        table[name][1] = value
    with pytest.raises(_native.TableError, match=message):
        CopyTable(table, device=0)


def test_other_bad_arguments() -> None:
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    for arguments in ({"tile_bytes": 8}, {"far_tile_bytes": 2**29}, {"peers": [1, 0]}):
        with pytest.raises(_native.TableError, match=next(iter(arguments))):
            CopyTable(table, device=0, **arguments)
    with pytest.raises(_native.CudaError) as caught:
        CopyTable(table, device=4096)
    assert caught.value.name == "cudaErrorInvalidDevice"


def one_row(src: torch.Tensor, dst: torch.Tensor) -> np.ndarray:
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (src.data_ptr(), dst.data_ptr(), 1, src.numel(), 0, 0, 0, ElementType.RAW32, ElementType.RAW32)
    return table


def test_a_launch_on_another_stream_waits_for_the_one_before() -> None:
    """Both launches count their tiles with the same counters: together they would share the tiles among them."""
    src = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    dst = torch.zeros_like(src)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    first_done, second_done = torch.cuda.Event(), torch.cuda.Event()
    with CopyTable(one_row(src, dst), device=0) as copies:
        with torch.cuda.stream(first):
            torch.cuda._sleep(1_000_000_000)  # about half a second
        copies.launch(stream=first.cuda_stream)
        first_done.record(first)
        copies.launch(stream=second.cuda_stream)
        second_done.record(second)
        assert not first_done.query(), "the first launch was to be still waiting here"
        second_done.synchronize()
        assert first_done.query()
        assert torch.equal(src, dst)
        dst.zero_()
        torch.cuda.synchronize()
        copies.launch(stream=first.cuda_stream)
        copies.launch(stream=first.cuda_stream)
        first.synchronize()
        assert torch.equal(src, dst)


def current_context() -> int:
    """The driver's context of this thread, 0 if it has none."""
    context = ctypes.c_void_p()
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value or 0


def test_a_thread_that_had_no_device_has_none_afterwards() -> None:
    src = torch.arange(1000, dtype=torch.int32, device="cuda")
    dst = torch.zeros_like(src)
    torch.cuda.synchronize()
    contexts: list[int] = []

    def copy() -> None:
        contexts.append(current_context())
        with CopyTable(one_row(src, dst), device=0) as copies:
            contexts.append(current_context())
            copies.launch()
            copies.elapsed_ms()
        contexts.append(current_context())

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert contexts == [0, 0, 0]
    assert torch.equal(src, dst)
    own = current_context()
    with CopyTable(one_row(src, dst), device=0):
        pass
    assert current_context() == own != 0


# Makes a table on device 1 in a process that has used no device, and says whether device 0 has a context then.
SECOND_DEVICE = """
import ctypes
import numpy as np
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.transfer import _native
with _native.CopyTable(np.zeros(0, BLOCK_COPY_DTYPE), device=1):
    pass
driver = ctypes.CDLL("libcuda.so.1")
for device in range(2):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    print(active.value)
"""


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_work_on_one_device_makes_no_context_on_another() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_DEVICE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


# Opens a handle, sums some elements of what it names, and closes it, twice.
OPENER = """
import sys
import numpy as np
import torch
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.transfer import _native
handle, offset, count = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mapping = _native.IpcMapping(handle, device=0)
base = mapping.base
again = _native.IpcMapping(handle, device=0)  # each owns what it has opened: closing one leaves the other
again.close()
print(_native.allocation_ids([base]) != [0])
here = torch.zeros(count, dtype=torch.int32, device="cuda")
table = np.zeros(1, BLOCK_COPY_DTYPE)
table[0] = (base + offset, here.data_ptr(), 1, count, 0, 0, 0, 5, 5)
with _native.CopyTable(table, device=0) as copies:
    copies.launch(stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
print(int(here.sum()), _native.device_uuid(0))
mapping.close()
mapping.close()
print(mapping.base, _native.allocation_ids([base]))
mapping = _native.IpcMapping(handle, device=0)
base = mapping.base
del mapping  # unmaps it
print(_native.allocation_ids([base]))
"""


def test_another_process_opens_an_exported_allocation() -> None:
    memory = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    exported = _native.export_allocation(memory[5000:].data_ptr())
    assert len(exported.handle) == 64
    assert exported.base <= memory.data_ptr()
    assert memory.data_ptr() + memory.nbytes <= exported.base + exported.size
    torch.cuda.synchronize()
    offset = memory[5000:].data_ptr() - exported.base
    arguments = [exported.handle.hex(), str(offset), "7000"]
    done = subprocess.run([sys.executable, "-c", OPENER, *arguments], capture_output=True, text=True, check=True)
    is_open, first, closed, freed = done.stdout.splitlines()
    assert first == f"{sum(range(5000, 12000))} {_native.device_uuid(0)}"
    assert (is_open, closed, freed) == ("True", "0 [0]", "[0]")
    assert _native.device_uuid(0) == f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def test_handles_that_cannot_be() -> None:
    host = np.zeros(16, np.uint8)
    with pytest.raises(_native.NotExportableError, match="no device memory"):
        _native.export_allocation(host.ctypes.data)
    with pytest.raises(_native.NativeError, match="64 bytes, got 3"):
        _native.IpcMapping(b"abc", device=0)
    with pytest.raises(_native.CudaError, match="cudaIpcOpenMemHandle"):
        _native.IpcMapping(b"\0" * 64, device=0)


def test_memory_of_the_cpu_is_pinned_and_a_failure_is_not_left_to_others() -> None:
    memory = torch.frombuffer(mmap.mmap(-1, 1 << 20), dtype=torch.uint8)
    _native.pin(memory.data_ptr(), memory.nbytes, device=0)
    assert memory.is_pinned()
    with pytest.raises(_native.CudaError, match="AlreadyRegistered"):
        _native.pin(memory.data_ptr(), memory.nbytes, device=0)
    assert int(torch.ones(8, device="cuda").sum()) == 8
    _native.unpin(memory.data_ptr(), device=0)
    assert not memory.is_pinned()
    with pytest.raises(_native.CudaError, match="NotRegistered"):
        _native.unpin(memory.data_ptr(), device=0)
    assert int(torch.ones(8, device="cuda").sum()) == 8
