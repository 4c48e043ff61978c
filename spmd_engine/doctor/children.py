"""Other processes that a check needs: the engine shares memory between processes, so a check must, too."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spmd_engine.trainer.environment import with_this_package

_TAIL = 2000
_KEEP = 400


class ChildError(Exception):
    """A process of a check ended with an error, or said nothing in time. The text is the end of what it printed."""


def run(arguments: Sequence[str], environ: Mapping[str, str], *, text: str = "", timeout_s: float) -> str:
    """What `python arguments` prints.

    Args:
        text: for its standard input.

    Raises:
        ChildError: see there.
    """
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(
            command, env=with_this_package(environ), input=text, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"no end after {timeout_s:g} s") from None
    if done.returncode:
        raise ChildError(_why(done.returncode, done.stderr))
    return done.stdout


@contextlib.contextmanager
def answering(arguments: Sequence[str], environ: Mapping[str, str], *, timeout_s: float) -> Iterator[Any]:
    """Runs `python arguments` until the block is left; gives the first line that it prints, as JSON.

    The process must end when its standard input does.

    Raises:
        ChildError: it ended before, or said nothing in time.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            env=with_this_package(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            line = _first_line(process.stdout.fileno(), timeout_s)
            if line is None:
                raise ChildError(f"no answer in {timeout_s:g} s")
            if not line:
                status = process.wait(timeout_s)
                log.seek(0)
                raise ChildError(_why(status, log.read().decode(errors="replace")))
            yield json.loads(line)
        finally:
            process.stdin.close()
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _first_line(fd: int, timeout_s: float) -> bytes | None:
    """b"" if the stream ends before, None if nothing comes in time."""
    deadline, got = time.monotonic() + timeout_s, b""
    while not got.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        if not (more := os.read(fd, 65536)):
            return b""
        got += more
    return got


def _why(status: int, printed: str) -> str:
    lines = [line.strip() for line in printed[-_TAIL:].splitlines() if line.strip()]
    last = lines[-1][-_KEEP:] if lines else "it printed nothing"
    return f"{'signal ' + str(-status) if status < 0 else 'exit status ' + str(status)}: {last}"
