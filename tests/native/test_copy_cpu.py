# SPDX-License-Identifier: Apache-2.0
"""copy_cpu and compare_cpu against the reference, from this process' memory and from another's."""

from __future__ import annotations

import os

import numpy as np
import pytest
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
from spmd_engine.transfer._native import CompareResult, compare_cpu, copy_cpu


def check_copy_and_compare(case: Case, table: np.ndarray, pid: int, threads: int, seed: int) -> None:
    before, expected = case.dst.copy(), case.expected()
    stats = copy_cpu(table, pids=[pid], threads=threads)
    assert np.array_equal(case.dst, expected)
    sizes = np.array([ElementType(t).itemsize for t in case.table["src_dtype"]], dtype=np.uint64)
    assert stats.bytes_read == int((case.table["rows"] * case.table["row_elems"] * sizes).sum())
    assert stats.blocks == len(case.table)
    assert compare_cpu(table, pids=[pid], threads=threads) == CompareResult(wrong_elements=0, first=None)

    wrong = corrupt(case, seed)
    result = compare_cpu(table, pids=[pid], threads=threads)
    assert result == CompareResult(wrong_elements=len(wrong), first=min(wrong, default=None))
    case.dst[:] = before


@settings(REPEATABLE, max_examples=120)
@given(case=cases(), threads=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_own_memory(case: Case, threads: int, seed: int) -> None:
    table = case.at(case.src.ctypes.data, case.dst.ctypes.data)
    check_copy_and_compare(case, table, 0, threads, seed)
    check_copy_and_compare(case, table, os.getpid(), threads, seed)


@settings(REPEATABLE, max_examples=120)
@given(case=cases(), threads=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_memory_of_another_process(case: Case, threads: int, seed: int, other_process) -> None:
    table = case.at(other_process.hold(case.src), case.dst.ctypes.data)
    check_copy_and_compare(case, table, other_process.pid, threads, seed)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("remote", [False, True])
def test_blocks_larger_than_a_tile(threads: int, remote: bool, other_process) -> None:
    case = build_case(LARGE_BLOCKS, seed=threads)
    src = other_process.hold(case.src) if remote else case.src.ctypes.data
    pid = other_process.pid if remote else 0
    check_copy_and_compare(case, case.at(src, case.dst.ctypes.data), pid, threads, seed=threads)


def test_several_sources(other_process) -> None:
    here, there = np.arange(5000, dtype=np.int64), np.arange(5000, dtype=np.int64) + 10_000
    got = np.zeros((2, 5000), np.int64)
    table = np.zeros(2, BLOCK_COPY_DTYPE)
    table[0] = (here.ctypes.data, got[0].ctypes.data, 1, 5000, 0, 0, 0, ElementType.RAW64, ElementType.RAW64)
    table[1] = (other_process.hold(there), got[1].ctypes.data, 1, 5000, 0, 0, 1, ElementType.RAW64, ElementType.RAW64)
    table.setflags(write=False)
    copy_cpu(table, pids=[0, other_process.pid], threads=2)
    assert np.array_equal(got, [here, there])


@pytest.mark.parametrize(("src_type", "dst_type"), CASTS)
def test_every_value_casts_as_torch_casts_it(src_type: ElementType, dst_type: ElementType, other_process) -> None:
    values = values_to_cast(src_type)
    got = np.zeros(len(values), bits_dtype(dst_type))
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (values.ctypes.data, got.ctypes.data, 1, len(values), 0, 0, 0, src_type, dst_type)
    copy_cpu(table, pids=[0])
    assert np.array_equal(got, cast_bits(values, src_type, dst_type))

    got[:] = 0
    table["src"] = other_process.hold(values)
    copy_cpu(table, pids=[other_process.pid], threads=2)
    assert np.array_equal(got, cast_bits(values, src_type, dst_type))


def test_nan_payloads_are_copied_and_compared_as_bits() -> None:
    src = np.array([0x7FC00000, 0x7F800001, 0xFFC12345], dtype=np.uint32)
    dst = np.zeros(3, np.uint32)
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (src.ctypes.data, dst.ctypes.data, 1, 3, 0, 0, 0, ElementType.F32, ElementType.F32)
    copy_cpu(table, pids=[0])
    assert np.array_equal(src, dst)
    assert compare_cpu(table, pids=[0]).wrong_elements == 0
    dst[1] ^= 2
    assert compare_cpu(table, pids=[0]) == CompareResult(wrong_elements=1, first=(0, 1))


def test_source_rows_may_be_one_and_the_same() -> None:
    src, dst = np.arange(7, dtype=np.uint16), np.zeros((5, 7), np.uint16)
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (src.ctypes.data, dst.ctypes.data, 5, 7, 0, 14, 0, ElementType.RAW16, ElementType.RAW16)
    copy_cpu(table, pids=[0])
    assert (dst == src).all()


def test_empty_table() -> None:
    table = np.zeros(0, BLOCK_COPY_DTYPE)
    assert copy_cpu(table, pids=[], threads=3).bytes_read == 0
    assert compare_cpu(table, pids=[]) == CompareResult(wrong_elements=0, first=None)


def test_threads_wait_for_the_next_copy_and_a_fork_gets_its_own():
    source = np.random.default_rng(0).integers(0, 256, 8 << 20, dtype=np.uint8)
    target = np.zeros(8 << 20, np.uint8)
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table["src"], table["dst"], table["rows"], table["row_elems"] = source.ctypes.data, target.ctypes.data, 1, 8 << 20
    table["src_dtype"] = table["dst_dtype"] = ElementType.RAW8
    before = len(os.listdir("/proc/self/task"))
    for threads in (2, 5, 3, 5, 1):
        target[:] = 0
        copy_cpu(table, pids=[0], threads=threads)
        assert np.array_equal(source, target)
    assert len(os.listdir("/proc/self/task")) <= before + 4
    pid = os.fork()
    if pid == 0:
        target[:] = 0
        copy_cpu(table, pids=[0], threads=5)
        os._exit(0 if np.array_equal(source, target) else 1)
    assert os.waitpid(pid, 0)[1] == 0
