"""Frames between scheduler processes: JSON plus raw bytes, never pickles."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_HEADER = struct.Struct("<II")
_MAX_HEADER = 1 << 28
Frame = tuple[dict[str, Any], bytes]


def frame(header: dict[str, Any], blob: bytes = b"") -> bytes:
    """What `recv_frame` takes apart. An empty header takes no text: while requests run, most tickets are empty."""
    text = json.dumps(header, separators=(",", ":")).encode() if header else b""
    return _HEADER.pack(len(text), len(blob)) + text + blob


def recv_frame(sock: socket.socket, limit: int = _MAX_HEADER, deadline: float | None = None) -> Frame:
    """Receive a frame, within the socket's timeout or until a deadline. EOFError at the end of the stream."""
    text_size, blob_size = _HEADER.unpack(_read(sock, _HEADER.size, deadline))
    if text_size > limit or (limit != _MAX_HEADER and blob_size > limit):
        raise ValueError(f"frame of {text_size} + {blob_size} bytes is over the limit of {limit}")
    text = _read(sock, text_size, deadline)
    return json.loads(text) if text else {}, _read(sock, blob_size, deadline)


def _read(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return bytes(buffer)
