"""Starts a benchmark's ranks, and ends all of them when one fails."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

_MARK = "SPMD_ENGINE_BENCHMARK"
_CEILINGS = "WEIGHT_SYNC_CEILINGS"
_POLL_S = 0.1
_GRACE_S = 1.0
_END_S = 20.0
_MACHINE_S = 300.0
_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether this process is one of the ranks; as such, it ends with its launcher."""
    if _MARK in os.environ:
        end_with_parent()
        return True
    if "RANK" in os.environ:
        sys.exit("the benchmark starts its own ranks: run it with python, not with torchrun")
    return False


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def given_ceilings() -> dict[str, float | None]:
    """The copy ceilings that `measured_machine` found before the ranks started."""
    found: dict[str, float | None] = json.loads(os.environ[_CEILINGS])
    return found


def launch(name: str, *, world: int, timeout_s: float, environment: Mapping[str, str]) -> int:
    """Run this script once a rank; returns the exit status of the first that fails, or 0.

    Args:
        name: of the benchmark, for messages.
        world: number of ranks.
        timeout_s: end the ranks after this time.
        environment: more variables for them.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    env = {
        **os.environ,
        **environment,
        _MARK: name,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    env.setdefault("OMP_NUM_THREADS", "1")
    ranks: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(world):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=own))
        while True:
            status = [rank.poll() for rank in ranks]
            failed = [code for code in status if code]
            if failed:
                time.sleep(_GRACE_S)  # whose end came first may be seen last
                ended = {rank: code for rank, code in enumerate(rank.poll() for rank in ranks) if code}
                words = ", ".join(f"rank {rank} with status {code}" for rank, code in ended.items())
                print(f"{name}: ended: {words}; ending the others", file=sys.stderr)
                return failed[0] if failed[0] > 0 else 128 - failed[0]
            if None not in status:
                return 0
            if time.monotonic() > deadline:
                running = [rank for rank, code in enumerate(status) if code is None]
                sys.exit(f"{name}: ranks {running} were still at work after {timeout_s:.0f} s (--timeout)")
            time.sleep(_POLL_S)
    finally:
        _end(ranks)


def measured_machine(world: int) -> dict[str, str]:
    """Variables that tell the ranks the copy ceilings, found out in a process that ends before they start."""
    script = str(Path(__file__).with_name("machine.py"))
    try:
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=_MACHINE_S)
    except subprocess.TimeoutExpired:
        sys.exit(f"weight_sync: the copy ceilings were not measured within {_MACHINE_S:.0f} s")
    if done.returncode:
        sys.exit(f"weight_sync: the copy ceilings could not be measured:\n{done.stderr}")
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if 0 < machine["gpus"] < world:
        sys.exit(f"{world} ranks need as many GPUs; {machine['gpus']} are here")
    return {_CEILINGS: json.dumps(machine["ceilings_gb_s"])}


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _END_S
    for rank in ranks:
        try:
            rank.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait(timeout=_END_S)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
