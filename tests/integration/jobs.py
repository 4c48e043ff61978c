"""Runs a scenario in a job of real trainer ranks, each a process of its own, and brings back what they return."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.nodes import Node

GRACE_S = 15.0
#: The share of a core above which an idle process is no longer one; a quiet machine sees 0.002, a busy wait 0.7 to 1.
SPINS = 0.05
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class JobResult:
    """What the ranks of a finished job left.

    Attributes:
        status: exit status of each rank.
        values: what the scenario returned on each rank; None where it did not return.
        log: output of all ranks.
    """

    status: list[int | None]
    values: list[Any]
    log: str


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(directory: Path) -> dict[str, str]:
    scratch = directory / "tmp"
    scratch.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "TORCHELASTIC_"))}
    return {**env, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}


def run_job(
    scenario: str,
    world: int,
    directory: Path,
    *,
    timeout_s: float = 400.0,
    expect_status: tuple[int | None, ...] | None = None,
    torchrun: bool = False,
    nodes: Sequence[Node] = (),
    ipv6: bool = False,
    until: Callable[[], bool] = lambda: False,
    **arguments: Any,
) -> JobResult:
    """Run a scenario on `world` ranks and check their exit status.

    Args:
        scenario: "module.function" in `integration.scenarios`, called with a `Context` and `arguments`.
        directory: an empty directory for what the job writes.
        expect_status: exit status of each rank; all zero by default.
        torchrun: start the ranks with torchrun, one on each node, rather than directly; status is that of torchrun.
        nodes: spread the ranks over these, equally many on each.
        ipv6: let them meet at an IPv6 address of the first node.
        until: end the job by force when this is true; then its exit status does not matter.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [str(WORKER), scenario, json.dumps(arguments), str(directory)]
    env = environment(directory)
    logs = [open(directory / f"rank{rank}.log", "w+b") for rank in range(world)]  # noqa: SIM115
    processes = []
    port = str(free_port())
    if torchrun:
        for number, node in enumerate(nodes or [None]):
            own = {**env, **(node.environment(nodes[0], ipv6=ipv6) if node else {})}
            processes.append(_start(_torchrun(world, nodes, number, ipv6, port) + command, own, logs[number], node))
    else:
        for rank in range(world):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            own = {**env, **{k: str(v) for k, v in ranks.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            node = nodes[rank * len(nodes) // world] if nodes else None
            if node is not None:
                own.update(node.environment(nodes[0], ipv6=ipv6))
            processes.append(_start([sys.executable, *command], own, logs[rank], node))
    deadline = time.monotonic() + timeout_s
    is_over = False
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if is_over := until():
            break
        if expect_status is None and any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)  # the others may wait for the one that failed
        time.sleep(0.05)
    status = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = []
    for rank, log in enumerate(logs):
        log.seek(0)
        text.append(f"---- rank {rank} ----\n{log.read().decode(errors='replace')[-6000:]}")
        log.close()
    values = []
    for rank in range(world):
        path = directory / f"rank{rank}.json"
        values.append(json.loads(path.read_text()) if path.exists() else None)
    result = JobResult(status, values, "\n".join(text))
    wanted = list(expect_status) if expect_status is not None else [0] * len(processes)
    assert is_over or result.status == wanted, f"exit status {result.status}, expected {wanted}\n{result.log}"
    return result


def _torchrun(world: int, nodes: Sequence[Node], number: int, ipv6: bool, port: str) -> list[str]:
    """The command that starts the ranks of one node."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world // max(1, len(nodes))}"]
    if not nodes:
        return [*launch, "--standalone"]
    address = nodes[0].ipv6 if ipv6 else nodes[0].ipv4
    return [
        *launch,
        f"--nnodes={len(nodes)}",
        f"--node-rank={number}",
        f"--master-addr={address}",
        f"--master-port={port}",
    ]


def _start(command: list[str], env: dict[str, str], log: Any, node: Node | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=None if node is None else node.enter,
    )
