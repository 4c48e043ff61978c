"""The trainer packs its shards into memory that it shares with its scheduler process; here both are this process."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from spmd_engine.errors import TransferError
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType
from spmd_engine.planning.plan import TransferPlan
from spmd_engine.transfer import _native
from spmd_engine.transfer.bucketed import TrainerTransfer
from spmd_engine.transfer.handles import CPU, ShardMemory
from spmd_engine.transfer.packing import Packer, PackLink

TIMEOUT_S = 30.0


def rows(source, destination):
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table["src"], table["dst"] = source.data_ptr(), destination.data_ptr()
    table["rows"], table["row_elems"] = source.shape
    table["src_pitch"] = source.stride(0) * source.element_size()
    table["dst_pitch"] = source.shape[1] * source.element_size()
    table["src_dtype"] = table["dst_dtype"] = ElementType.F32
    return table


def linked(packer):
    ours, theirs = socket.socketpair()
    packer.start(theirs)
    return PackLink(0, ours, TIMEOUT_S)


def open_buckets():
    """Inodes of the shared memory that this process has descriptors of. Other descriptors are those of other tests."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself, or one that a thread has closed
            if "spmd-engine buckets" in os.readlink(descriptor):
                found.add(descriptor.stat().st_ino)
    return found


@pytest.fixture
def packer():
    return Packer(0)


@pytest.fixture
def link(packer):
    return linked(packer)


@pytest.fixture
def memory(link):
    memory = link.share(2, 4096, device=None)
    yield memory
    link.unshare(memory)


def test_blocks_arrive_in_the_buckets_that_they_are_for(packer, link, memory):
    shards = [torch.randn(16, 20)[:, 3:11], torch.randn(16, 8)]
    with packer.working():
        for shard, bucket in zip(shards, memory.buckets, strict=True):
            link.begin(memory, rows(shard, bucket), threads=4)
        for _ in shards:
            link.end()
    for shard, bucket in zip(shards, memory.buckets, strict=True):
        assert torch.equal(bucket[:512].view(torch.float32).view(16, 8), shard)


def test_nothing_is_read_once_the_update_has_ended(packer, link, memory):
    with packer.working():
        pass
    link.begin(memory, rows(torch.ones(16, 8), memory.buckets[0]), threads=1)
    with pytest.raises(TransferError, match="trainer of rank 0 did not pack its shards: its update has ended"):
        link.end()
    assert not memory.buckets[0].any()


def test_the_update_ends_after_the_bucket_that_is_being_packed(packer, link, memory):
    shard = torch.ones(1 << 20, 8)
    large = link.share(1, shard.nbytes, device=None)
    deadline = time.monotonic() + TIMEOUT_S
    with packer.working():
        link.begin(large, rows(shard, large.buckets[0]), threads=1)
        while not large.buckets[0][3]:  # 1.0 ends with 0x3f
            assert time.monotonic() < deadline
    whole = large.buckets[0].view(torch.float32).eq(1.0)
    assert bool(whole.all())
    link.end()
    link.unshare(large)


def test_requests_that_wait_when_the_update_ends_are_refused(packer, link, memory):
    shard = torch.ones(1 << 20, 8)
    large = link.share(1, shard.nbytes, device=None)
    with packer.working():
        for _ in range(4):
            link.begin(large, rows(shard, large.buckets[0]), threads=1)
        link.end()
    shard.fill_(2.0)  # nobody reads it any more
    link.drain()
    assert bool(large.buckets[0].view(torch.float32).eq(1.0).all())
    link.unshare(large)


def test_memory_that_is_given_up_is_unmapped_on_both_sides(link):
    memory = link.share(1, 4096, device=None)
    inode = os.fstat(memory.fd).st_ino
    assert inode in open_buckets()

    def await_mappings(count):
        deadline = time.monotonic() + TIMEOUT_S
        while sum(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines()) != count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    await_mappings(2)
    link.unshare(memory)
    await_mappings(0)
    assert inode not in open_buckets()


def test_memory_that_the_trainer_cannot_map_is_refused_and_other_memory_serves(packer, link, memory, monkeypatch):
    before, real, calls = open_buckets(), mmap.mmap, itertools.count()

    def only_the_first(*args, **kwargs):
        if next(calls):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(TransferError, match=r"rank 0 .*could not map 4096 bytes"):
        patch.setattr(mmap, "mmap", only_the_first)
        link.share(1, 4096, device=None)
    assert open_buckets() <= before
    shard = torch.randn(16, 8)
    with packer.working():
        link.begin(memory, rows(shard, memory.buckets[0]), threads=1)
        link.end()
    assert torch.equal(memory.buckets[0][:512].view(torch.float32).view(16, 8), shard)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_that_cannot_be_pinned_leaves_nothing_behind(link):
    before = open_buckets()
    with pytest.raises(_native.NativeError):
        link.share(1, 4096, device=0)
    assert open_buckets() <= before  # a thread of the test before may close its own meanwhile


def test_memory_stays_mapped_until_it_is_unpinned(link, monkeypatch):
    pinned = {}

    def unpin(address, *, device):
        assert device == 0 and f"{address:x}-" in Path("/proc/self/maps").read_text()
        pinned.pop(address)

    monkeypatch.setattr(_native, "pin", lambda address, size, *, device: pinned.update({address: size}))
    monkeypatch.setattr(_native, "unpin", unpin)
    memory = link.share(2, 1 << 20, device=0)
    assert pinned == {memory.address: 2 << 20}
    link.unshare(memory)
    assert not pinned


def test_without_the_right_to_look_verify_compares_with_what_was_packed(packer, link, memory, monkeypatch):
    shard, bucket, sent = torch.randn(16, 8), memory.buckets[0], torch.zeros(4096, dtype=torch.uint8)
    table, copy_cpu = rows(shard, bucket), _native.copy_cpu
    table["src"] = 0  # from where the shard begins
    plan = TransferPlan(table, np.zeros(1, np.int64), np.zeros(1, np.int64), 0, 0)
    places = {0: ShardMemory(CPU, os.getpid(), (), (), np.zeros(1, np.uint32), np.array([shard.data_ptr()], np.uint64))}

    def of_this_process_alone(table, pids, **kwargs):
        if pids != [0]:
            raise _native.SourcePermissionError("process_vm_readv is not permitted")
        return copy_cpu(table, pids=pids, **kwargs)

    monkeypatch.setattr(_native, "copy_cpu", of_this_process_alone)
    transfer = TrainerTransfer(plan, 0, link, memory, sent, bucket.data_ptr())
    transfer.bind(places)
    assert not link.may_look
    with packer.working():
        transfer.start()
        transfer.finish()
    sent.copy_(bucket)
    assert transfer.compare() == 0
    sent[5] ^= 1
    assert transfer.compare() == 1


def test_a_failure_is_told_and_the_next_bucket_comes(packer, link, memory):
    shard = torch.randn(16, 8)
    bad = rows(shard, memory.buckets[0])
    bad["dst_dtype"] = 99
    with packer.working():
        link.begin(memory, bad, threads=1)
        link.begin(memory, rows(shard, memory.buckets[1]), threads=1)
        with pytest.raises(TransferError, match=r"did not pack its shards: .*dtype"):
            link.end()
        link.end()
    assert torch.equal(memory.buckets[1][:512].view(torch.float32).view(16, 8), shard)


def test_a_failed_update_leaves_no_answer_behind(packer, link, memory):
    shard = torch.randn(16, 8)
    with packer.working():
        for _ in range(3):
            link.begin(memory, rows(shard, memory.buckets[0]), threads=1)
        link.drain()
        link.begin(memory, rows(shard, memory.buckets[1]), threads=1)
        link.end()
        assert torch.equal(memory.buckets[1][:512].view(torch.float32).view(16, 8), shard)


def test_a_trainer_that_does_not_answer_is_an_error(memory):
    mine, theirs = socket.socketpair()
    with theirs:
        link = PackLink(3, mine, 0.2)
        link.begin(memory, rows(torch.ones(16, 8), memory.buckets[0]), threads=1)
        began = time.monotonic()
        with pytest.raises(TransferError, match=r"trainer of rank 3 .* no answer"):
            link.end()
        assert time.monotonic() - began < 10.0
        link.drain()
        with pytest.raises(TransferError, match="takes no requests any more"):
            link.begin(memory, rows(torch.ones(16, 8), memory.buckets[0]), threads=1)


def test_a_trainer_that_is_gone_is_an_error(memory):
    mine, theirs = socket.socketpair()
    link = PackLink(3, mine, TIMEOUT_S)
    theirs.close()
    with pytest.raises(TransferError, match=r"trainer of rank 3 .* takes no requests any more"):
        link.begin(memory, rows(torch.ones(16, 8), memory.buckets[0]), threads=1)
        link.end()


def test_the_thread_ends_with_the_scheduler_process(packer):
    before = set(threading.enumerate())
    sock, theirs = socket.socketpair()
    packer.start(theirs)
    (thread,) = set(threading.enumerate()) - before
    sock.close()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_the_end_of_the_thread_is_noticed_though_a_fork_keeps_its_socket_open(packer, memory, monkeypatch):
    link = linked(packer)
    pid = os.fork()
    if pid == 0:
        time.sleep(TIMEOUT_S)
        os._exit(0)
    try:
        monkeypatch.setattr(packer, "_pack", None)  # a defect
        began = time.monotonic()
        link.begin(memory, rows(torch.ones(16, 8), memory.buckets[0]), threads=1)
        with pytest.raises(TransferError, match="no answer"):
            link.end()
        assert time.monotonic() - began < TIMEOUT_S / 2
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
