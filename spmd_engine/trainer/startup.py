"""From the arguments of `SpmdEngine` to a running scheduler process: check, meet the other ranks, start."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from spmd_engine.control import codec, peer_group, timeouts
from spmd_engine.control.digest import digest
from spmd_engine.control.messages import PROTOCOL, GroupAddress, Start
from spmd_engine.errors import CollectiveMismatchError, ConfigError
from spmd_engine.trainer.devices import own_gpu, visible_gpus
from spmd_engine.trainer.environment import child_environment, memory_saver_library
from spmd_engine.trainer.process import SchedulerProcess, open_log
from spmd_engine.trainer.rendezvous import Meeting, Rendezvous, bounded, interface_of, node_identity
from spmd_engine.trainer.requests import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_OWN_ARGS = {
    "nnodes", "node_rank", "dist_init_addr", "nccl_port", "host", "port", "base_gpu_id", "gpu_id_step",
    "tokenizer_worker_num",
}  # fmt: skip
# A Unix socket's name has 107 bytes; those of torch's symmetric memory take up to 17 below the directory.
_LONGEST_SCRATCH = 90
_ONLY_ONE = ("dp_size", "pp_size")


def mesh_ranks(mesh: DeviceMesh) -> tuple[tuple[int, ...], int]:
    """Global ranks of a replica's mesh in TP order, and this rank's index in it.

    Raises:
        ConfigError: it is not a one-dimensional mesh on the CPU.
    """
    if mesh.ndim != 1:
        raise ConfigError(
            f'device_mesh_cpu must have one dimension, the TP ranks of a replica, e.g. mesh["tp"]; got {mesh}'
        )
    if mesh.device_type != "cpu":
        raise ConfigError(
            f"device_mesh_cpu must be a mesh of device type 'cpu' (gloo), got {mesh.device_type!r}: "
            "init_device_mesh('cpu', (dp, tp), mesh_dim_names=('dp', 'tp'))['tp']"
        )
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return ranks, ranks.index(dist.get_rank())


def shared_scratch(token: str, base: str, *, on_cpu: bool) -> str:
    """The temporary directory of a replica's processes on this node; whoever ends first removes it.

    It is one for all of them because torch's symmetric memory, which SGLang's custom all-reduce uses on GPUs, meets
    there: at sockets, whose names must not be long.
    """
    name = f"spmd-engine-{digest(token)[:16]}"
    path = os.path.join(base, name)
    if not on_cpu and len(os.fsencode(path)) > _LONGEST_SCRATCH:
        path = os.path.join("/tmp", name)
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.lstat(path).st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user")
    return path


class Startup:
    """Starts the scheduler process of one rank together with those of its peers.

    Args:
        model_path, server_args: as the user gave them.
        ranks: global ranks of the replica, in TP order.
        rank: the caller's global rank.
        timeout_s: seconds to wait for the other ranks.
        keeps_mapped: as `keep_mapped` of `SpmdEngine`.
        weight_version: that this rank knows; the highest of all ranks counts.
        device: CUDA ordinal of this rank; by default the current device of the calling thread.
        is_restart: the process takes the place of another one.

    Attributes:
        rendezvous: the keys of this engine in the default store.
        tokenizer: the tokenizer, or None; known after `start`.
        weight_version: that the engine begins with; known after `start`.
        device: CUDA ordinal of this rank; known after `start`, None on the CPU.
    """

    def __init__(
        self,
        model_path: str,
        server_args: Mapping[str, Any],
        *,
        ranks: tuple[int, ...],
        rank: int,
        timeout_s: float,
        keeps_mapped: bool = False,
        weight_version: int = 0,
        device: int | None = None,
        is_restart: bool = False,
    ) -> None:
        self.rendezvous = Rendezvous(ranks, rank, "engine")
        self.tokenizer: Any = None
        self._model_path, self._server_args = model_path, dict(server_args)
        self._ranks, self._rank = ranks, rank
        self._given_timeout = timeout_s
        # Also if it is refused: the other ranks must hear of that.
        self._timeout_s = timeout_s if _is_timeout(timeout_s) else timeouts.REFUSED_TIMEOUT_S
        self.weight_version, self._is_restart, self._keeps_mapped = weight_version, is_restart, keeps_mapped
        self.device = device
        self._preload = ""

    def start(self, log_dir: str | os.PathLike[str] | None) -> SchedulerProcess:
        """Agree with the other ranks on the arguments and start the process.

        Raises:
            ConfigError, CollectiveMismatchError, CollectiveTimeoutError: on all ranks; nothing was started.
        """
        given = {"model_path": self._model_path, "keep_mapped": self._keeps_mapped, **self._server_args}
        note: dict[str, Any] = {"digest": digest(given), "arguments": repr(given)[:500], "refusal": None, "gpu": None}
        note["tmp"] = tempfile.gettempdir()
        note.update(version=self.weight_version, is_restart=self._is_restart)
        refusal: ConfigError | None = None
        log: IO[bytes] | None = None
        store: socket.socket | None = None
        try:
            self._check()
            if not self.on_cpu:
                self.device = torch.cuda.current_device() if self.device is None else self.device
                note["gpu"] = own_gpu(self.device, os.environ)
            log = open_log(log_dir, self._rank)
            if self._rank == self._ranks[0]:
                store = peer_group.listen(self.rendezvous.host)
                note["store_port"] = store.getsockname()[1]
        except Exception as error:  # the other ranks wait: they must hear of it
            refusal = error if isinstance(error, ConfigError) else ConfigError(f"{type(error).__name__}: {error}")
            note["refusal"] = str(refusal)
        if self._rank == self._ranks[0]:
            seed = self._server_args.get("random_seed")
            note["seed"] = secrets.randbelow(1 << 30) if seed is None else seed
        with contextlib.ExitStack() as undo:
            for opened in (log, store):
                if opened is not None:
                    undo.enter_context(opened)
            meeting = self.rendezvous.meet(note, timeout_s=self._timeout_s, watch=lambda: None)
            undo.callback(_close_listener, meeting.group)
            _check_agreement(self._ranks, meeting, refusal)
            gpus = _gpus_by_node(self._ranks, meeting.notes)[node_identity()]
            self.weight_version = max(note["version"] for note in meeting.notes)
            self._is_restart = any(note["is_restart"] for note in meeting.notes)
            with self._telling_others():
                here = next(note for note in meeting.notes if note["node"] == node_identity())
                scratch = shared_scratch(meeting.group.token, here["tmp"], on_cpu=self.on_cpu)
                undo.pop_all()
                assert log is not None
                return self._spawn(meeting, gpus, scratch, log, -1 if store is None else store.detach())

    @contextlib.contextmanager
    def _telling_others(self) -> Iterator[None]:
        """What fails on this rank alone, the others hear of while their processes wait for this one's.

        Raises:
            ConfigError: something failed.
        """
        try:
            yield
        except Exception as error:
            cause = f"it could not be started: {type(error).__name__}: {error}"
            bounded(
                lambda: self.rendezvous.post(f"died/{self._rank}", {"cause": cause}), timeout_s=timeouts.EXPLANATION_S
            )
            raise ConfigError(f"the scheduler process of rank {self._rank} has a problem: {cause}") from error

    def _check(self) -> None:
        """Check the arguments and fill in what follows from the mesh and the model's directory."""
        looks_local = self._model_path.startswith((".", "/")) or self._model_path.count("/") > 1
        if looks_local and not os.path.exists(self._model_path):
            raise ConfigError(f"model path {self._model_path!r} does not exist on this host")
        if not _is_timeout(self._given_timeout):
            raise ConfigError(
                f"timeout_s must be above 0 and at most {timeouts.LONGEST_TIMEOUT_S} seconds, "
                f"got {self._given_timeout!r}"
            )
        args, tp_size = self._server_args, len(self._ranks)
        args.update({name: os.fspath(value) for name, value in args.items() if isinstance(value, os.PathLike)})
        try:
            codec.encode(args)
        except codec.EncodeError as error:
            raise ConfigError(f"arguments of the engine must be plain values: {error}") from error
        for name in sorted(_OWN_ARGS & args.keys()):
            raise ConfigError(f"{name}= is set by SpmdEngine from the device mesh; leave it out")
        for name in _ONLY_ONE:
            if args.pop(name, 1) not in (1, None):
                raise ConfigError(f"{name}= must be 1: make one SpmdEngine a replica, each over its own TP mesh")
        for name in ("tp_size", "tensor_parallel_size"):
            if (got := args.pop(name, tp_size)) != tp_size:
                raise ConfigError(f"{name}={got} but device_mesh_cpu has {tp_size} ranks; leave {name} out")
        if args.get("enable_memory_saver") and not self.on_cpu:
            self._preload = memory_saver_library()
        path = args.get("tokenizer_path") or self._model_path
        if args.get("skip_tokenizer_init") is None:
            args["skip_tokenizer_init"] = not has_tokenizer(path)
        if not args["skip_tokenizer_init"]:
            self.tokenizer = load_tokenizer(path, args)

    @property
    def on_cpu(self) -> bool:
        """Whether the engine computes on the CPU."""
        return bool(self._server_args.get("device", "cuda" if torch.cuda.device_count() else "cpu") == "cpu")

    def _spawn(self, meeting: Meeting, gpus: str, scratch: str, log: IO[bytes], store_fd: int) -> SchedulerProcess:
        tp_rank = self._ranks.index(self._rank)
        notes, on_cpu = meeting.notes, self.on_cpu
        nodes = [note["node"] for note in notes]
        host = str(notes[tp_rank]["host"])
        start = Start(
            protocol=PROTOCOL,
            rank=self._rank,
            tp_rank=tp_rank,
            group=meeting.group,
            model_path=self._model_path,
            server_args=self._server_args,
            random_seed=meeting.notes[0]["seed"],
            store_port=meeting.notes[0]["store_port"],
            store_fd=store_fd,
            gpu_id=0 if on_cpu else nodes[:tp_rank].count(nodes[tp_rank]),
            on_cpu=on_cpu,
            node=nodes[tp_rank],
            nnodes=len(set(nodes)),
            node_rank=list(dict.fromkeys(nodes)).index(nodes[tp_rank]),
            host=host,
            trainer_pid=os.getpid(),
            scratch=scratch,
            timeout_s=float(self._timeout_s),
            weight_version=self.weight_version,
            is_restart=self._is_restart,
            keeps_mapped=self._keeps_mapped,
        )
        env = child_environment(
            os.environ,
            on_cpu=on_cpu,
            tp_size=len(nodes),
            nnodes=len(set(nodes)),
            interface=interface_of(host),
            scratch=scratch,
            gpus=gpus,
            preload=self._preload,
        )
        return SchedulerProcess(start, env=env, log=log)


def _check_agreement(ranks: tuple[int, ...], meeting: Meeting, refusal: ConfigError | None) -> None:
    """Raise if the ranks differ, else what any of them refused (this one with its own words), else if nodes differ."""
    if len({note["digest"] for note in meeting.notes}) > 1:
        lines = [f"rank {rank}: {note['arguments']}" for rank, note in zip(ranks, meeting.notes, strict=True)]
        raise CollectiveMismatchError(
            "the ranks of one replica made SpmdEngine with different arguments:\n" + "\n".join(lines)
        )
    if refusal is not None:
        raise refusal
    for rank, note in zip(ranks, meeting.notes, strict=True):
        if note["refusal"]:
            raise ConfigError(f"rank {rank}: {note['refusal']}")
    per_node = Counter(note["node"] for note in meeting.notes)
    if len(set(per_node.values())) > 1:
        raise ConfigError(
            f"the ranks {list(ranks)} of one replica are on {len(per_node)} nodes, {sorted(per_node.values())} of them "
            "on each: SGLang needs equally many on every node"
        )


def _gpus_by_node(ranks: tuple[int, ...], notes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`visible_gpus` of each node. All ranks look at all nodes, so that what is wrong on one is refused on every rank.

    Raises:
        ConfigError: see `visible_gpus`.
    """
    by_node: dict[str, list[int]] = {}
    for index, note in enumerate(notes):
        by_node.setdefault(note["node"], []).append(index)
    return {
        node: visible_gpus([ranks[i] for i in here], [notes[i]["gpu"] for i in here]) for node, here in by_node.items()
    }


def _is_timeout(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value <= timeouts.LONGEST_TIMEOUT_S


def _close_listener(address: GroupAddress) -> None:
    if address.listener_fd >= 0:
        os.close(address.listener_fd)
