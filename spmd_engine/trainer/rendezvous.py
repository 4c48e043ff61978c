"""How trainer ranks find one another: a few keys in the store that `torch.distributed` already runs.

No collective is used, so nothing of ours can be interleaved with the trainer's own collectives, and every wait can
watch for other news.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import secrets
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from spmd_engine.control import peer_group, timeouts
from spmd_engine.control.messages import GroupAddress
from spmd_engine.errors import CollectiveTimeoutError, ConfigError, ErrorReport, SchedulerDiedError

_SIOCGIFADDR = 0x8915
# How many meetings of each name there were in a store.
_counters: weakref.WeakKeyDictionary[dist.Store, dict[str, int]] = weakref.WeakKeyDictionary()


def node_identity(*kinds: str) -> str:
    """Equal for two processes that can read each other's memory: same boot, same PID and network namespace.

    Args:
        *kinds: of namespaces, if others count.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    spaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in kinds or ("pid", "net")]
    return hashlib.blake2b("|".join([boot, *spaces]).encode(), digest_size=8).hexdigest()


def digest_ranks(ranks: tuple[int, ...]) -> str:
    return hashlib.blake2b(repr(ranks).encode(), digest_size=6).hexdigest()


def outgoing_address(target: str) -> str:
    """This host's address on the way to `target`; no packet is sent."""
    family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])


def interface_of(address: str) -> str:
    """Name of this host's network interface that has the numeric `address`; "" if none is known to."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
            for line in file:
                digits, *_, name = line.split()
                if ipaddress.ip_address(bytes.fromhex(digits)) == wanted:
                    return name
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if found[20:24] == wanted.packed:
                    return name
    return ""


@dataclass(frozen=True)
class Meeting:
    """What a set of ranks told one another.

    Attributes:
        notes: what each rank posted, in the order of `ranks`.
        group: where the root's scheduler process accepts the others.
    """

    notes: list[dict[str, Any]]
    group: GroupAddress


class Rendezvous:
    """Keys in the default store, under a name that the same calls on all ranks agree on.

    Args:
        ranks: global ranks that meet, the same tuple on all of them.
        rank: the caller's global rank.
        purpose: separates meetings of the same ranks for different things.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, purpose: str) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialized: call init_process_group() (start the script with torchrun, "
                "or set MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE) before SpmdEngine"
            )
        self.ranks, self.rank = ranks, rank
        self._name = f"spmd_engine/{purpose}/{digest_ranks(ranks)}"
        self._root = dist.distributed_c10d._get_default_store()
        self._counters = _counters.setdefault(self._root, {})
        self._number = self._counters.get(self._name, 0)
        #: Address of this host on the way to the others: loopback when the job has one node, as MASTER_ADDR then says.
        self.host = _own_address(self._root)

    @property
    def _store(self) -> dist.Store:
        return dist.PrefixStore(f"{self._name}/{self._number}", self._root)

    def post(self, key: str, value: dict[str, Any]) -> None:
        """Leave word for the other ranks.

        Raises:
            SchedulerDiedError: the store is gone, and with it the process that serves it.
        """
        try:
            self._store.set(key, json.dumps(value))
        except dist.DistError as error:
            raise self._store_gone(error) from error

    def poll(self, key: str) -> dict[str, Any] | None:
        """The value of `key`, or None if nobody has posted it yet.

        Raises:
            SchedulerDiedError: the store is gone, and with it the process that serves it.
        """
        try:
            if not self._store.check([key]):
                return None
            value: dict[str, Any] = json.loads(self._store.get(key))
        except dist.DistError as error:
            raise self._store_gone(error) from error
        return value

    def _store_gone(self, error: Exception) -> SchedulerDiedError:
        return SchedulerDiedError(
            f"rank {self.rank} cannot reach the store of torch.distributed any more ({error}): the process that "
            "serves it, rank 0 or the launcher, has ended",
            rank=0,
        )

    def next_number(self) -> int:
        """Of the next meeting that has not been decided. Who comes to one that has waits for the next one."""
        while self.poll("outcome") is not None:
            self._number += 1
        return self._number

    def _collect(self, note: dict[str, Any], timeout_s: float, watch: Callable[[], None]) -> list[dict[str, Any]]:
        """Post `note` and wait for the notes of all ranks, in their order; `watch` runs in between and may raise.

        Meetings are numbered. Each is decided once, for all ranks that take part in it: one rank finds all notes, and
        then all have met, or one gives up, and then nobody has.

        Raises:
            CollectiveTimeoutError: a rank did not come.
            SchedulerDiedError: the store is gone.
            SpmdEngineError: of the kind for which another rank gave up.
        """
        self.post(f"note/{self.rank}", note)
        try:
            notes = self._gather(timeout_s, watch)
            outcome = self._decide({"met": True})
        except BaseException as error:
            gives_up = {"met": False, "kind": type(error).__name__, "message": str(error), "rank": self.rank}
            outcome = bounded(lambda: self._decide(gives_up), timeout_s=timeouts.STORE_S)
            if not outcome or outcome.get("rank") == self.rank or not isinstance(error, CollectiveTimeoutError):
                raise
            if outcome["met"]:  # the others have found all of them meanwhile
                notes = self._gather(timeouts.STORE_S, lambda: None)
        finally:
            self._counters[self._name] = self._number + 1
        self._raise_if_given_up(outcome)
        return notes

    def _raise_if_given_up(self, outcome: dict[str, Any] | None) -> None:
        if outcome is not None and not outcome["met"]:
            message = f"rank {self.rank} waits no longer for ranks {list(self.ranks)}: {outcome['message']}"
            raise ErrorReport(outcome["kind"], message, outcome["rank"]).to_exception()

    def _decide(self, proposal: dict[str, Any]) -> dict[str, Any]:
        """What this meeting comes to: the first proposal counts."""
        try:
            decided: dict[str, Any] = json.loads(self._store.compare_set("outcome", "", json.dumps(proposal)))
        except dist.DistError as error:
            raise self._store_gone(error) from error
        return decided

    def _gather(self, timeout_s: float, watch: Callable[[], None]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        notes = []
        for rank in self.ranks:
            while (found := self.poll(f"note/{rank}")) is None:
                self._raise_if_given_up(self.poll("outcome"))
                watch()
                if time.monotonic() > deadline:
                    raise CollectiveTimeoutError(
                        f"rank {self.rank} waited {timeout_s:.0f} s for rank {rank}, which did not make the same "
                        f"call over ranks {list(self.ranks)}; every rank of the mesh must make it"
                    )
                time.sleep(timeouts.MEETING_POLL_S)
            notes.append(found)
        return notes

    def give_up(self, number: int, error: BaseException) -> None:
        """Do not come to the meeting of that number: those who wait there, or come yet, hear why."""
        self._number = number
        self._counters[self._name] = number + 1
        reason = {"met": False, "kind": type(error).__name__, "message": str(error), "rank": self.rank}
        bounded(lambda: self._decide(reason), timeout_s=timeouts.STORE_S)

    def meet(
        self, note: dict[str, Any], *, timeout_s: float, watch: Callable[[], None], number: int | None = None
    ) -> Meeting:
        """Exchange notes and agree on an address; on the root the returned one holds the listening socket.

        Args:
            note: of this rank.
            timeout_s: how long to wait for the others.
            watch: is called meanwhile, and may raise.
            number: of the meeting, if ranks have agreed on one: it may have been given up. By default the next one.

        Raises:
            ConfigError: on all ranks; they are on several nodes, and the root has no address that others can reach.
            CollectiveTimeoutError, SchedulerDiedError, SpmdEngineError: see `_collect`.
        """
        self._number = self.next_number() if number is None else number
        is_root = self.rank == self.ranks[0]
        posted = {
            **note,
            "node": node_identity(),
            "network": node_identity("net"),
            "host": self.host,
            "pid": os.getpid(),
        }
        listener = None
        if is_root:
            listener = peer_group.listen(self.host)
            posted["group"] = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
        try:
            notes = self._collect(posted, timeout_s, watch)
            check_reachable(self.ranks, notes)
        except BaseException:
            if listener is not None:
                listener.close()
            raise
        first = notes[0]
        others = zip(self.ranks[1:], notes[1:], strict=True)
        trainers = {rank: note["pid"] for rank, note in others if note["node"] == first["node"]}
        group = GroupAddress(
            ranks=self.ranks,
            host=first["host"],
            port=first["group"]["port"],
            token=first["group"]["token"],
            listener_fd=listener.detach() if listener is not None else -1,
            trainers=trainers,
        )
        return Meeting(notes=notes, group=group)


def check_reachable(ranks: tuple[int, ...], notes: list[dict[str, Any]]) -> None:
    """Raise if the ranks are on several networks, and the first of them has no address that others can reach."""
    host, nodes = notes[0]["host"], {note["network"] for note in notes}
    if len(nodes) > 1 and ipaddress.ip_address(host).is_loopback:
        raise ConfigError(
            f"the ranks {list(ranks)} are on {len(nodes)} nodes, but rank {ranks[0]} knows its node only by the "
            f"loopback address {host}: set MASTER_ADDR to an address that all nodes can reach, not to a name that "
            "/etc/hosts gives a loopback address"
        )


def _own_address(store: dist.Store) -> str:
    target = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        target = store.host
    try:
        return outgoing_address(target)
    except OSError:
        return "127.0.0.1"


def bounded(call: Callable[[], Any], *, timeout_s: float) -> Any:
    """Run `call` for at most `timeout_s` seconds; None if it raises or does not end. Only for the failure path."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception:
            result.append(None)

    thread = threading.Thread(target=run, daemon=True, name="spmd_engine-failure-report")
    thread.start()
    thread.join(timeout_s)
    return result[0] if result else None
