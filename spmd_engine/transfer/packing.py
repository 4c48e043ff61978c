"""Shards in CPU memory are packed by the trainer, which copies its own memory faster than another process reads it.

Its scheduler process shares memory with it, asks for one bucket after the other, and moves those that are packed, while
a thread of the trainer packs the next. A socket pair of their own carries the requests: the channel has other readers.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import threading
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import torch

from spmd_engine.control.channel import Channel, ChannelClosed, ChannelTimeout
from spmd_engine.errors import TransferError
from spmd_engine.transfer import _native

logger = logging.getLogger(__name__)


class Share(msgspec.Struct, frozen=True, tag=True):
    """Memory for packed buckets: `size` bytes of the file whose descriptor comes with it; answered by `Packed`."""

    name: int
    size: int


class Unshare(msgspec.Struct, frozen=True, tag=True):
    """Give it up."""

    name: int


class Pack(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks within the trainer, to addresses that count from the start of shared memory; answered by `Packed`."""

    name: int
    table: np.ndarray
    threads: int


class Packed(msgspec.Struct, frozen=True, tag=True):
    """Done, or why not."""

    error: str | None = None


_ToTrainer = Share | Unshare | Pack


# ---- in the scheduler process ----


class SharedMemory:
    """Buckets that the trainer fills.

    Args:
        count: of the buckets.
        size: of each, bytes.
        device: the GPU that copies from them; None if none does.

    Attributes:
        name: tells this memory from other such memory of the process.
        fd: of the file that the memory is; it has no other name.
        address: where it begins.
        buckets: uint8 tensors.

    Raises:
        CudaError: the memory cannot be pinned.
        OSError: there is none.
    """

    _names = iter(range(1 << 62))

    def __init__(self, count: int, size: int, *, device: int | None) -> None:
        self.name, self.size = next(self._names), count * size
        self.fd = os.memfd_create("spmd-engine buckets", os.MFD_CLOEXEC)
        self._pinned_for: int | None = None
        try:
            os.ftruncate(self.fd, self.size)
            memory = mmap.mmap(self.fd, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            self.address = whole.data_ptr()
            if device is not None:
                _native.pin(self.address, self.size, device=device)
                self._pinned_for = device
            self.buckets = list(whole.split(size))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unpin it; it goes with the last tensor. No copy may still run. Twice is fine."""
        device, self._pinned_for = self._pinned_for, None
        try:
            if device is not None:
                _native.unpin(self.address, device=device)
        finally:
            self.buckets = []  # not before: it must be mapped until it is unpinned
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


class PackLink:
    """The scheduler process's end: one request after the other, answered in the same order.

    Args:
        rank: of the trainer, for messages.
        sock: whose other end the trainer has.
        timeout_s: seconds to wait for a bucket.

    Attributes:
        is_broken: the trainer answers no more; another link may serve.
        may_look: whether this process can read the trainer's memory, as far as is known.
    """

    def __init__(self, rank: int, sock: socket.socket, timeout_s: float) -> None:
        self.may_look, self.is_broken = True, False
        self._rank, self._channel, self._timeout_s = rank, Channel[Packed](sock, Packed), timeout_s
        self._running = 0

    def share(self, count: int, size: int, *, device: int | None) -> SharedMemory:
        """Buckets for the trainer to fill, until `unshare`. Arguments as for `SharedMemory`.

        Raises:
            TransferError: the trainer cannot map them, or packs nothing any more.
            CudaError, OSError: see `SharedMemory`.
        """
        memory = SharedMemory(count, size, device=device)
        try:
            self._send(Share(memory.name, memory.size), (memory.fd,))
            self._running += 1
            self.end()
        except BaseException:
            memory.close()
            raise
        return memory

    def unshare(self, memory: SharedMemory) -> None:
        """Give the buckets up, on both sides."""
        with contextlib.suppress(TransferError):
            self._send(Unshare(memory.name))
        memory.close()

    def begin(self, memory: SharedMemory, table: np.ndarray, *, threads: int) -> None:
        """Ask for blocks.

        Args:
            memory: where they go.
            table: rows of `BLOCK_COPY_DTYPE`: from addresses in the trainer to addresses in `memory` of this process.
            threads: that the trainer may use.

        Raises:
            TransferError: the trainer packs nothing any more.
        """
        table = table.copy()
        table["dst"] -= np.uint64(memory.address)
        table["source"] = 0
        self._send(Pack(memory.name, table, threads))
        self._running += 1

    def end(self) -> None:
        """Wait for the answer to the first request that has none yet.

        Raises:
            TransferError: it was not met.
        """
        try:
            packed, _ = self._channel.recv(self._timeout_s)
        except (ChannelClosed, ChannelTimeout) as error:
            self._running = 0
            self.is_broken = True
            self._channel.give_up()  # a late answer must not be taken for the next one
            raise self._failure(f"it gave no answer ({error}); see its log") from error
        self._running -= 1
        if packed.error is not None:
            raise self._failure(packed.error)

    def drain(self) -> None:
        """Wait until the trainer copies nothing, whatever it says."""
        while self._running:
            with contextlib.suppress(TransferError):
                self.end()

    def _send(self, message: object, fds: tuple[int, ...] = ()) -> None:
        try:
            self._channel.send(message, fds, timeout_s=self._timeout_s)
        except (ChannelClosed, ChannelTimeout) as error:
            self.is_broken = True
            raise self._failure(f"it takes no requests any more ({error}); see its log") from error

    def _failure(self, why: str) -> TransferError:
        return TransferError(f"the trainer of rank {self._rank} did not pack its shards: {why}")


# ---- in the trainer ----


class Packer:
    """The trainer's end: a thread that copies while `working`, and at no other time.

    Args:
        rank: for its log.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._copying = threading.Lock()
        self._updates: set[object] = set()  # that run

    def start(self, sock: socket.socket) -> None:
        """Start the thread, which ends when the other end of `sock`, in the scheduler process, is closed."""
        name = "spmd-engine packer"
        threading.Thread(target=self._serve, args=(Channel(sock, _ToTrainer),), name=name, daemon=True).start()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While the shards last that may be packed. Leaving waits for the bucket that is being packed."""
        update = object()
        self._updates.add(update)
        try:
            yield
        finally:
            self._updates.discard(update)
            with self._copying:
                pass

    def _serve(self, channel: Channel[_ToTrainer]) -> None:
        memory: dict[int, np.ndarray] = {}
        try:
            while True:
                message, fds = channel.recv()
                if isinstance(message, Share):
                    try:
                        memory[message.name] = _mapped(fds, message.size)
                        channel.send(Packed())
                    except (OSError, ValueError) as error:
                        channel.send(Packed(f"it could not map {message.size} bytes: {error}"))
                elif isinstance(message, Unshare):
                    memory.pop(message.name, None)
                else:
                    channel.send(Packed(self._pack(message, memory)))
        except ChannelClosed:
            pass
        except Exception:
            logger.exception("rank %d: the thread that packs shards has ended", self._rank)
        finally:
            channel.give_up()  # the scheduler process must not wait for more
            channel.close()

    def _pack(self, request: Pack, memory: Mapping[int, np.ndarray]) -> str | None:
        """Copy; what went wrong, if something did."""
        with self._copying:
            if not self._updates:
                return "its update has ended"
            try:
                table = request.table.copy()
                table["dst"] += np.uint64(memory[request.name].ctypes.data)
                threads = max(1, min(request.threads, len(os.sched_getaffinity(0))))
                _native.copy_cpu(table, pids=[0], threads=threads)
            except Exception as error:  # of whatever kind: the scheduler process waits
                return f"{type(error).__name__}: {error}"
        return None


def _mapped(fds: tuple[int, ...], size: int) -> np.ndarray:
    """The memory of the file behind the one descriptor, which is closed.

    Raises:
        OSError: it cannot be mapped.
        ValueError: the descriptor did not come: this process has too many.
    """
    (fd,) = fds
    try:
        return np.frombuffer(mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), np.uint8)
    finally:
        os.close(fd)
