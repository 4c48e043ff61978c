# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

CHILD = """
import ctypes, struct, sys
memory = None
while True:
    head = sys.stdin.buffer.read(8)
    if len(head) < 8:
        break
    content = sys.stdin.buffer.read(struct.unpack("<q", head)[0])
    memory = ctypes.create_string_buffer(content, len(content))
    print(ctypes.addressof(memory), flush=True)
"""


class OtherProcess:
    """A process of its own that holds bytes and says at which address."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._child.pid

    def hold(self, content: np.ndarray) -> int:
        """Gives the process bytes and returns their address there. They are valid until the next call."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(np.int64(content.nbytes).tobytes() + content.tobytes())
        self._child.stdin.flush()
        return int(self._child.stdout.readline())

    def end(self) -> None:
        self._child.communicate()


@pytest.fixture(scope="session")
def other_process() -> Iterator[OtherProcess]:
    process = OtherProcess()
    yield process
    process.end()
