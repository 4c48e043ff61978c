"""The memory saver on the CPU, for which torch_memory_saver has none: the same promises, kept by the kernel.

A paused tag gives its pages back and keeps its addresses, and touching it ends the process, as on a GPU. What comes
back is empty: zeros in the KV cache, and in the weights bytes that make every forgotten element a NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable

import torch

_PROT_NONE = 0
_LOST = 0xFF


class CpuMemorySaver:
    """What SGLang's memory handlers need of a `TorchMemorySaverAdapter`.

    Args:
        tensors: for each tag a function that finds its tensors; other tags have none.
        lost: the tags whose bytes come back as NaN rather than as zeros.
    """

    enabled = True

    def __init__(self, tensors: dict[str, Callable[[], Iterable[torch.Tensor]]], *, lost: Iterable[str] = ()) -> None:
        self._tensors, self._lost = tensors, frozenset(lost)
        self._paused: dict[str, list[tuple[int, int]]] = {}
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise, self._mprotect = libc.madvise, libc.mprotect
        for function in (self._madvise, self._mprotect):
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def pause(self, tag: str) -> None:
        """Give the pages of a tag back to the system. Its tensors must not be touched until `resume`.

        Raises:
            OSError: the kernel refused.
        """
        assert tag not in self._paused
        spans = _spans(self._tensors[tag]()) if tag in self._tensors else []
        for start, end in spans:
            low, high = _whole_pages(start, end)
            # What shares its page with other memory stays, but keeps no contents.
            ctypes.memset(start, 0, low - start)
            ctypes.memset(high, 0, end - high)
            if low < high:
                _check(self._madvise(low, high - low, mmap.MADV_DONTNEED))
                _check(self._mprotect(low, high - low, _PROT_NONE))
        self._paused[tag] = spans

    def resume(self, tag: str) -> None:
        """Make a paused tag usable again, at the same addresses.

        Raises:
            OSError: the kernel refused.
        """
        for start, end in self._paused.pop(tag):
            low, high = _whole_pages(start, end)
            if low < high:
                _check(self._mprotect(low, high - low, mmap.PROT_READ | mmap.PROT_WRITE))
            if tag in self._lost:
                ctypes.memset(start, _LOST, end - start)


def _spans(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """First address and end of each storage."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sorted((start, start + size) for start, size in storages.items() if size)


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    """The whole pages of a span; (end, end) if it has none."""
    page = mmap.PAGESIZE
    low, high = -(-start // page) * page, end // page * page
    return (low, high) if low < high else (end, end)


def _check(status: int) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"the kernel did not change the protection of memory: {os.strerror(code)}")
