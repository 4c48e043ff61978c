"""A real Ray cluster of two Ray nodes, each in a network namespace of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.jobs import environment, free_port
from integration.nodes import Node

START_S = 90.0
TESTS = Path(__file__).parents[1]
COMMAND = "from ray.scripts.scripts import main; main()"


@dataclass(frozen=True)
class RayCluster:
    """Two Ray nodes.

    Attributes:
        nodes: where they run; the head is on the first.
        address: of the head, for RAY_ADDRESS.
        home: a directory for Ray and for the programs of the tests.
    """

    nodes: Sequence[Node]
    address: str
    home: Path

    def run(self, arguments: Sequence[str], *, timeout_s: float, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run `python arguments` on the first node, as the driver of a Ray job."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=_environment(self.home, RAY_ADDRESS=self.address),
            preexec_fn=self.nodes[0].enter,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )


def _environment(home: Path, **variables: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    env = {name: value for name, value in environment(home).items() if not name.startswith("RAY_")}
    # The cluster is reachable from its two namespaces only.
    fixed = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    return {**env, **fixed, **variables}


@contextlib.contextmanager
def ray_cluster(nodes: Sequence[Node], *, ipv6: bool, cpus_per_node: int) -> Iterator[RayCluster]:
    """Start it, and end all its processes again."""
    # Ray's Unix sockets are below this: their names must not be long.
    home = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    own = [node.ipv6 if ipv6 else node.ipv4 for node in nodes]
    port = free_port()
    address = f"[{own[0]}]:{port}" if ipv6 else f"{own[0]}:{port}"
    common = ["--block", "--disable-usage-stats", f"--num-cpus={cpus_per_node}", "--object-store-memory=80000000"]
    roles = [
        ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={home}"],
        [f"--address={address}"],
    ]
    processes = []
    try:
        for number, (node, role) in enumerate(zip(nodes, roles, strict=True)):
            log = home / f"node{number}.log"
            with open(log, "wb") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", COMMAND, "start", *common, f"--node-ip-address={own[number]}", *role],
                        env=_environment(home),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=node.enter,
                    )
                )
            deadline = time.monotonic() + START_S
            while "Ray runtime started" not in log.read_text(errors="replace"):
                assert processes[-1].poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.1)
        yield RayCluster(nodes, address, home)
    finally:
        for node in nodes:  # all that ran there was ours
            node.end_all()
        for process in processes:
            process.wait()
        subprocess.run(["rm", "-rf", str(home)], check=False)
