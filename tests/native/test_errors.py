# SPDX-License-Identifier: Apache-2.0
"""What the native module refuses, and what its errors carry."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType
from spmd_engine.transfer import _native
from spmd_engine.transfer._native import compare_cpu, copy_cpu

RAW8, F32, BF16, RAW32 = ElementType.RAW8, ElementType.F32, ElementType.BF16, ElementType.RAW32


def one_block(buffer: np.ndarray, **fields: int) -> np.ndarray:
    """Two blocks, of which the second has `fields` changed."""
    table = np.zeros(2, BLOCK_COPY_DTYPE)
    table[:] = (buffer.ctypes.data, buffer.ctypes.data + 64, 4, 8, 8, 8, 0, RAW8, RAW8)
    for name, value in fields.items():
        table[name][1] = value
    return table


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"src": 0}, r"block 1: src is null .*rows=4"),
        ({"dst": 0}, r"block 1: dst is null"),
        ({"source": 1}, r"block 1: source 1 of 1 sources"),
        ({"src_dtype": 7}, r"block 1: src_dtype 7 is no element type"),
        ({"dst_dtype": 65535}, r"block 1: dst_dtype 65535 is no element type"),
        ({"src_dtype": F32, "dst_dtype": RAW32}, r"block 1: cannot cast element type 0 to 5"),
        ({"src_dtype": RAW8, "dst_dtype": BF16}, r"block 1: cannot cast element type 3 to 2"),
        ({"dst_pitch": 7}, r"block 1: destination rows of 8 bytes overlap"),
        ({"dst_pitch": -7}, r"block 1: destination rows of 8 bytes overlap"),
        ({"dst_pitch": 0}, r"block 1: destination rows of 8 bytes overlap"),
        ({"row_elems": 2**63}, r"block 1: a row does not fit"),
        ({"rows": 2**62, "src_pitch": 8}, r"block 1: src does not fit"),
        ({"rows": 2**63 + 1, "src_pitch": 0}, r"block 1: src does not fit"),
        ({"src_pitch": -(2**62)}, r"block 1: src does not fit"),
        ({"dst_pitch": 2**62}, r"block 1: dst does not fit"),
        ({"src": 2**63}, r"block 1: src does not fit"),
    ],
)
@pytest.mark.parametrize("call", [copy_cpu, compare_cpu])
def test_tables_that_must_not_be_executed(call, fields: dict[str, int], message: str) -> None:
    buffer = np.arange(256, dtype=np.uint8)
    with pytest.raises(_native.TableError, match=message) as caught:
        call(one_block(buffer, **fields), pids=[0])
    assert isinstance(caught.value, ValueError)
    assert np.array_equal(buffer, np.arange(256)), "nothing is copied before the whole table is checked"


def test_empty_blocks_may_have_null_addresses() -> None:
    buffer = np.arange(256, dtype=np.uint8)
    assert copy_cpu(one_block(buffer, src=0, dst=0, rows=0), pids=[0]).bytes_read == 32


@pytest.mark.parametrize(
    "table",
    [
        np.zeros(2, np.uint64),
        np.zeros((1, 1), BLOCK_COPY_DTYPE),
        np.zeros(4, BLOCK_COPY_DTYPE)[::2],
        np.zeros(4, BLOCK_COPY_DTYPE)[::-1],
        np.zeros(1, np.dtype("V56")),
        [1, 2, 3],
    ],
    ids=["dtype", "dimensions", "stride", "reversed", "void", "list"],
)
def test_arrays_of_another_layout(table) -> None:
    with pytest.raises(_native.TableError):
        copy_cpu(table, pids=[0])


def test_other_bad_arguments() -> None:
    table = one_block(np.arange(256, dtype=np.uint8))
    with pytest.raises(_native.TableError, match="threads = 0"):
        copy_cpu(table, pids=[0], threads=0)
    with pytest.raises(_native.TableError, match=r"pids\[0\] = -5"):
        copy_cpu(table, pids=[-5])
    with pytest.raises(_native.TableError, match=r"pids\[0\] = 4294967296"):
        copy_cpu(table, pids=[2**32])


@pytest.mark.parametrize("threads", [1, 4])
def test_a_source_that_is_gone(threads: int) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    child.wait()
    buffer = np.zeros(256, np.uint8)
    with pytest.raises(_native.SourceGoneError, match=f"reading 32 bytes .* of process {child.pid}") as caught:
        copy_cpu(one_block(buffer), pids=[child.pid], threads=threads)
    error = caught.value
    assert error.block in range(min(threads, 2))  # of several threads, the first to fail
    assert str(error).startswith(f"block {error.block}: ")
    assert isinstance(error, _native.SourceError) and isinstance(error, _native.NativeError)
    assert (error.pid, error.address, error.bytes) == (child.pid, buffer.ctypes.data, 32)
    assert error.errno == errno.ESRCH


@pytest.mark.parametrize("call", [copy_cpu, compare_cpu])
def test_an_address_that_is_not_mapped(call, other_process) -> None:
    buffer = np.zeros(256, np.uint8)
    table = one_block(buffer, src=0x1000)
    table["src"][0] = other_process.hold(buffer)
    with pytest.raises(_native.SourceFaultError, match=r"block 1: reading 32 bytes at 0x1000 .*not mapped") as caught:
        call(table, pids=[other_process.pid])
    assert (caught.value.errno, caught.value.address, caught.value.block) == (errno.EFAULT, 0x1000, 1)


# Maps six pages, unmaps the third and fourth, and says where they begin.
HOLE = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
base = libc.mmap(None, 6 * 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
ctypes.memset(base, 7, 6 * 4096)
assert libc.munmap(base + 2 * 4096, 2 * 4096) == 0
print(base, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process_with_a_hole():
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        yield child.pid, int(child.stdout.readline())
        child.communicate()


def test_a_block_that_runs_into_a_hole(process_with_a_hole) -> None:
    pid, base = process_with_a_hole
    dst = np.zeros(4 * 4096, np.uint8)
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (base, dst.ctypes.data, 1, 4 * 4096, 0, 0, 0, RAW8, RAW8)
    with pytest.raises(_native.SourceFaultError) as caught:
        copy_cpu(table, pids=[pid])
    assert caught.value.address == base + 2 * 4096
    assert caught.value.bytes == 2 * 4096


SHORT_OF_HOLE = [(32, 200, 256), (4, 1000, 2048), (2, 8, 8184)]


def test_gaps_between_rows_need_not_be_mapped(process_with_a_hole) -> None:
    pid, base = process_with_a_hole
    # The first cases end at the last byte before the hole, the others step over it.
    before = [(rows, elems, pitch, base + 8192 - ((rows - 1) * pitch + elems)) for rows, elems, pitch in SHORT_OF_HOLE]
    over = [(2, 100, 16_384, base), (2, 4096, -12_288, base + 16_384)]
    for rows, elems, pitch, src in before + over:
        dst = np.zeros(rows * elems, np.uint8)
        table = np.zeros(1, BLOCK_COPY_DTYPE)
        table[0] = (src, dst.ctypes.data, rows, elems, pitch, elems, 0, RAW8, RAW8)
        copy_cpu(table, pids=[pid])
        assert (dst == 7).all()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_one_bad_block_among_many_ends_the_copy(threads: int, other_process) -> None:
    buffer = np.zeros(1 << 16, np.uint8)
    table = np.zeros(5000, BLOCK_COPY_DTYPE)
    table[:] = (other_process.hold(buffer), buffer.ctypes.data, 1, 16, 0, 0, 0, RAW8, RAW8)
    table["src"][777] = 0x1000
    with pytest.raises(_native.SourceFaultError, match="block 777:"):
        copy_cpu(table, pids=[other_process.pid], threads=threads)


# Reads a process of root as another user.
READ_AS_NOBODY = """
import os, sys
import numpy as np
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.transfer import _native
pid = 1 if os.geteuid() else os.getppid()
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
buffer = np.zeros(8, np.uint8)
table = np.zeros(1, BLOCK_COPY_DTYPE)
table[0] = (4096, buffer.ctypes.data, 1, 8, 0, 0, 0, 3, 3)
try:
    _native.copy_cpu(table, pids=[pid])
except _native.SourcePermissionError as error:
    print(error.errno, error)
"""


def test_a_source_that_may_not_be_read() -> None:
    done = subprocess.run([sys.executable, "-c", READ_AS_NOBODY], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EPERM} block 0: reading 8 bytes at 0x1000")
    assert "ptrace_scope" in done.stdout


def test_allow_ptrace_by_any_answers() -> None:
    assert _native.allow_ptrace_by_any() is os.path.exists("/proc/sys/kernel/yama/ptrace_scope")
