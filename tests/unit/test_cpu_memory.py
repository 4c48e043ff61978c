"""The memory saver on the CPU: pages go and come back, addresses stay, contents do not."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch

from spmd_engine.scheduler.adapter.cpu_memory import CpuMemorySaver

MIB = 1 << 20


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.fixture
def tensors():
    large = torch.ones(64 * MIB // 4)
    return {"weights": [large, large[:7], torch.ones(3), torch.ones(0)], "kv_cache": [torch.ones(5, 1000)]}


@pytest.fixture
def saver(tensors):
    return CpuMemorySaver({tag: lambda tag=tag: tensors[tag] for tag in tensors}, lost=("weights",))


def test_pages_go_and_come_back_at_the_same_addresses(saver, tensors):
    addresses = [tensor.data_ptr() for tensor in tensors["weights"]]
    before = resident()
    saver.pause("weights")
    assert before - resident() > 63 * MIB
    assert torch.equal(tensors["kv_cache"][0], torch.ones(5, 1000))
    saver.resume("weights")
    assert [tensor.data_ptr() for tensor in tensors["weights"]] == addresses
    assert all(tensor.isnan().all() for tensor in tensors["weights"])
    tensors["weights"][0].fill_(2.0)
    assert tensors["weights"][1].tolist() == [2.0] * 7


def test_a_cache_comes_back_empty(saver, tensors):
    for _ in range(2):
        tensors["kv_cache"][0].fill_(3.0)
        saver.pause("kv_cache")
        saver.resume("kv_cache")
        assert not tensors["kv_cache"][0].any()


def test_a_tag_without_memory_may_sleep(saver):
    saver.pause("cuda_graph")
    saver.resume("cuda_graph")


def test_touching_what_sleeps_ends_the_process(saver, tensors):
    address = tensors["weights"][0].data_ptr()
    saver.pause("weights")
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        import ctypes

        ctypes.c_char.from_address(address + MIB).value  # noqa: B018
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
    saver.resume("weights")
