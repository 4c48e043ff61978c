"""Frames bytes for a stream between scheduler processes: a length, and so many bytes."""

from __future__ import annotations

import socket
import struct
import time

_HEADER = struct.Struct("<Q")
_MAX_SIZE = 1 << 36


def frame(data: bytes) -> bytes:
    """What `recv_frame` takes apart."""
    return _HEADER.pack(len(data)) + data


def recv_frame(sock: socket.socket, limit: int = _MAX_SIZE, deadline: float | None = None) -> bytes:
    """Receive the bytes of a frame, within the socket's timeout or until a deadline.

    Raises:
        EOFError: the stream has ended.
        ValueError: the frame claims to have more than `limit` bytes.
    """
    (size,) = _HEADER.unpack(_read(sock, _HEADER.size, deadline))
    if size > limit:
        raise ValueError(f"a frame of {size} bytes is over the limit of {limit}")
    return bytes(_read(sock, size, deadline))


def _read(sock: socket.socket, size: int, deadline: float | None) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return buffer
