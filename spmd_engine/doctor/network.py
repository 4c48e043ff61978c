"""Checks of the network: NCCL's and gloo's environment, and whether the ranks of a job can meet."""

from __future__ import annotations

import errno
import ipaddress
import random
import socket

from spmd_engine.control import peer_group, timeouts
from spmd_engine.doctor.findings import Finding, Machine, failure, ok, skipped, warning
from spmd_engine.trainer.rendezvous import interface_of, outgoing_address

_EPHEMERAL = (32768, 60999)
# What NCCL then does without, from its documentation (Environment Variables).
_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs of one node talk through CPU memory",
    "NCCL_SHM_DISABLE": "processes of one node talk through the network stack",
    "NCCL_IB_DISABLE": "nodes talk over TCP instead of InfiniBand or RoCE",
}
_UNSET = ("", "0")


def check_nccl(machine: Machine) -> Finding:
    """Do variables of NCCL and gloo name interfaces that exist, and leave the fast paths on?"""
    environ = machine.environ
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(variable, "")
        if value and not chosen_interfaces(value, interfaces, exact=variable.startswith("GLOO")):
            return failure(
                f"{variable}={value} names none of this node's network interfaces: {', '.join(interfaces)}",
                f"unset {variable} (scheduler processes then use the interface of the way to MASTER_ADDR), or name one",
            )
    slow = [f"{name}={environ[name]}: {what}" for name, what in _SLOW.items() if environ.get(name, "") not in _UNSET]
    if environ.get("CUDA_LAUNCH_BLOCKING", "") not in _UNSET:
        slow.append(f"CUDA_LAUNCH_BLOCKING={environ['CUDA_LAUNCH_BLOCKING']}: every kernel is waited for")
    if slow:
        return warning("; ".join(slow), "unset these, unless a fault in the hardware or the driver needs them")
    if "NCCL_CUMEM_ENABLE" in environ:
        return warning(
            f"NCCL_CUMEM_ENABLE={environ['NCCL_CUMEM_ENABLE']} is set: ranks that differ in it fail with "
            "ncclUnhandledCudaError",
            "unset it (the engine sets it in its scheduler processes alone), or set it on all ranks alike",
        )
    set_ = [f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith(("NCCL_", "GLOO_"))]
    return ok(", ".join(set_) or "nothing is set; scheduler processes get what they need from the engine")


def chosen_interfaces(value: str, interfaces: list[str], *, exact: bool = False) -> list[str]:
    """Those that NCCL_SOCKET_IFNAME chooses: a list of prefixes, after `=` of names, after `^` of those left out.

    Args:
        exact: the names are whole, as in GLOO_SOCKET_IFNAME.
    """
    invert = value.startswith("^") and not exact
    value = value.removeprefix("^") if invert else value
    whole = exact or value.startswith("=")
    names = [name.strip() for name in value.removeprefix("=").split(",") if name.strip()]

    def matches(interface: str) -> bool:
        return interface in names if whole else interface.startswith(tuple(names))

    return [interface for interface in interfaces if matches(interface) != invert]


def check_rendezvous(machine: Machine) -> Finding:
    """Can this node reach the place where the ranks meet, at the port that they use and at any other?"""
    environ = machine.environ
    target = machine.rendezvous or environ.get("MASTER_ADDR", "")
    if not target:
        return skipped("neither --rendezvous HOST[:PORT] nor MASTER_ADDR says where: fine for a job on one node")
    host, port = _host_and_port(target)
    if not port and not machine.rendezvous:
        port = int(environ.get("MASTER_PORT") or 0)
    try:
        address = socket.getaddrinfo(host, port or 9, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return failure(f"{host!r} is no address and no known name: {error}", "give an IP address, or see /etc/hosts")
    assert isinstance(address, str)
    try:
        own = outgoing_address(address)
    except OSError as error:
        return failure(
            f"there is no way to {host} ({address}): {error}", "see ip route; is the interface up that leads there?"
        )
    way = f"from {own} ({interface_of(own) or 'unknown interface'}) to {host} ({address})"
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return ok(f"{way}: good for a job on one node; over several nodes every node would look for it at itself")
    if address == own:
        return _check_own(address, way)
    # Engines listen at ports that the system chooses: a firewall that lets MASTER_PORT alone pass is not enough.
    tried = [port] * bool(port) + random.Random(address).sample(range(*_EPHEMERAL), 2)
    blocked = {number: why for number in tried if (why := _knock(address, number))}
    if blocked:
        which = ", ".join(f"port {number}: {why}" for number, why in blocked.items())
        return failure(
            f"{way}: {which}",
            f"let all TCP ports pass between the nodes of a job (engines listen at any of {_EPHEMERAL[0]} to "
            f"{_EPHEMERAL[1]}), and see that {host} is the address of the node with rank 0",
        )
    return ok(f"{way}: the host answers at {', '.join(f'port {number}' for number in tried)}")


def _check_own(address: str, way: str) -> Finding:
    try:
        with peer_group.listen(address) as listener:
            why = _knock(address, int(listener.getsockname()[1]))
    except OSError as error:
        why = str(error)
    if why:
        return failure(f"{way}, this very node: {why}", "see the firewall's rules for connections of a node to itself")
    return ok(f"{way}: that is this very node, which listens there; run it on the other nodes, too")


def _host_and_port(target: str) -> tuple[str, int]:
    """Takes "host", "host:port", "[2001:db8::1]:port" and a bare IPv6 address."""
    if target.startswith("["):
        host, _, rest = target[1:].partition("]")
        return host, int(rest.removeprefix(":") or 0)
    if target.count(":") == 1:
        host, _, port = target.partition(":")
        return host, int(port)
    return target, 0


def _knock(address: str, port: int) -> str:
    """Why `address` does not answer; "" if it does, be it with a refusal, which comes from the host itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeouts.DOCTOR_CONNECT_S)
        try:
            sock.connect((address, port))
        except TimeoutError:
            return f"no answer in {timeouts.DOCTOR_CONNECT_S:g} s (a firewall, or no such host)"
        except OSError as error:
            return "" if error.errno == errno.ECONNREFUSED else str(error)
    return ""
