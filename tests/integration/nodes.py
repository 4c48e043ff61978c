"""Two "nodes" on one machine: network namespaces of their own, joined by a virtual cable, with addresses of their own.

Processes in different network namespaces are on different nodes for spmd_engine (`rendezvous.node_identity`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from pyroute2 import NetNS, netns
from pyroute2.netlink.exceptions import NetlinkError

_INTERFACE = "node0"
_USABLE_AT_ONCE = 2  # IFA_F_NODAD


@dataclass(frozen=True)
class Node:
    """A network namespace with one interface.

    Attributes:
        namespace: its name.
        ipv4, ipv6: addresses of the interface.
    """

    namespace: str
    ipv4: str
    ipv6: str

    def enter(self) -> None:
        """Move the calling process there: `preexec_fn` of a process that shall run on this node."""
        netns.setns(self.namespace)

    def environment(self, master: Node, *, ipv6: bool) -> dict[str, str]:
        """What a launcher on this node tells its ranks about the network."""
        return {"MASTER_ADDR": master.ipv6 if ipv6 else master.ipv4, "GLOO_SOCKET_IFNAME": _INTERFACE}

    def configure(self) -> None:
        """Give the interface its addresses, and switch it on."""
        with NetNS(self.namespace) as link:
            number = link.link_lookup(ifname=_INTERFACE)[0]
            link.addr("replace", index=number, address=self.ipv4, prefixlen=24)
            link.addr("replace", index=number, address=self.ipv6, prefixlen=64, flags=_USABLE_AT_ONCE)
            for name in ("lo", _INTERFACE):
                link.link("set", index=link.link_lookup(ifname=name)[0], state="up")

    def pids(self) -> list[int]:
        """Processes on this node."""
        own = os.stat(f"/run/netns/{self.namespace}").st_ino
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}/ns/net").st_ino == own:
                    found.append(int(name))
        return found

    def end_all(self) -> None:
        """End all processes on this node."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut_off(self) -> None:
        """Pull the cable: nothing arrives any more, and nothing is closed. `configure` plugs it in again."""
        with NetNS(self.namespace) as link:
            link.link("set", index=link.link_lookup(ifname=_INTERFACE)[0], state="down")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make them, and take them away again.

    Raises:
        PermissionError: this process may not make network namespaces.
    """
    names = [f"spmd-engine-{os.getpid()}-{i}" for i in range(2)]
    nodes = tuple(Node(name, f"10.213.0.{i + 1}", f"fd5d::{i + 1}") for i, name in enumerate(names))
    undo: list[Callable[[], None]] = []
    try:
        for name in names:
            netns.create(name)
            undo.append(lambda name=name: netns.remove(name))  # type: ignore[misc]
        with NetNS(names[0]) as first:
            first.link("add", ifname=_INTERFACE, kind="veth", peer={"ifname": _INTERFACE, "net_ns_fd": names[1]})
        for node in nodes:
            node.configure()
        yield nodes  # type: ignore[misc]
    finally:
        for action in reversed(undo):
            action()


@contextlib.contextmanager
def two_nodes_or_skip() -> Iterator[tuple[Node, Node]]:
    """`two_nodes`; without the right to make them the test is skipped."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(two_nodes())
        except (PermissionError, NetlinkError) as error:
            if isinstance(error, NetlinkError) and error.code not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
                raise
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield found
