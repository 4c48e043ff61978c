"""SpmdEngine: SGLang under the process layout of the trainer, one scheduler process a rank."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from spmd_engine import requests as req
from spmd_engine.channel import PROTOCOL, Call, ChannelTimeout, Failed, LinkAddress, Ready, Reply, Start
from spmd_engine.devices import own_gpu, visible_gpus
from spmd_engine.digest import digest
from spmd_engine.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    ConfigError,
    EngineClosedError,
    SchedulerDiedError,
    SpmdEngineError,
)
from spmd_engine.process import ProcessDied, SchedulerProcess, child_environment
from spmd_engine.rendezvous import Meeting, Rendezvous, bounded
from spmd_engine.stats import UpdateStats

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

# The scheduler process times out by itself first, with more to say; this is for one that hangs.
_REPLY_MARGIN_S = 5.0
_STOP_GRACE_S = 5.0
_OWN_ARGS = {
    "nnodes", "node_rank", "dist_init_addr", "nccl_port", "host", "port", "base_gpu_id", "gpu_id_step",
    "tokenizer_worker_num",
}  # fmt: skip
_ONLY_ONE = ("dp_size", "pp_size")


class SpmdEngine:
    """SGLang inside the ranks of a trainer.

    Every rank of `device_mesh_cpu` starts the scheduler process of its own tensor-parallel rank and talks to it alone.
    All methods but `shutdown` are collective over the ranks of the mesh: call them in the same order with the same
    arguments. Several meshes in one job make several replicas.

    Args:
        model_path: a directory or hub name that SGLang can load.
        device_mesh_cpu: 1-D DeviceMesh of device type "cpu" (gloo) over this replica's TP ranks,
            for example `init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))["tp"]`.
        timeout_s: seconds that any collective call may take, waiting for slower ranks included.
        log_dir: directory for the logs of the scheduler processes. By default they vanish with the engine; the end
            of a log is part of the error when a process dies.
        **server_args: any field of `sglang.ServerArgs`. The fields for ranks, ports and TP size are set by the engine.

    Raises:
        ConfigError: SGLang cannot start with these arguments.
        CollectiveMismatchError: the ranks passed different arguments.
        CollectiveTimeoutError: a rank of the mesh did not come.
        SchedulerDiedError: a process ended during the start.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        device_mesh_cpu: DeviceMesh,
        timeout_s: float = 1800.0,
        log_dir: str | os.PathLike[str] | None = None,
        **server_args: Any,
    ) -> None:
        self._ranks, self.tp_rank = _mesh_ranks(device_mesh_cpu)
        self._rank = self._ranks[self.tp_rank]
        self._timeout_s = float(timeout_s)
        self._lock = threading.Lock()
        self._seq = 0
        self._version = 0
        self._dead: SpmdEngineError | None = None
        self._model_path = os.fspath(model_path)
        self._server_args = _check_server_args(server_args, self.tp_size)
        _check_model_path(self._model_path)
        self._tokenizer = self._make_tokenizer()

        self._rendezvous = Rendezvous(self._ranks, self._rank, "engine")
        meeting = self._meet()
        self._process = self._start_process(meeting, log_dir)
        self._finalizer = weakref.finalize(self, self._process.stop, grace_s=0.0)
        self._updates: Any = None
        ready = self._receive(lambda message: isinstance(message, Ready), self._timeout_s, "start")
        self._info: dict[str, Any] = ready.info
        logger.info("rank %d: scheduler process %d serves %s", self._rank, self._process.pid, self._model_path)

    # ---- facts ----

    @property
    def tp_size(self) -> int:
        """Number of ranks of this replica."""
        return len(self._ranks)

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its replica."""
        return self.tp_rank == 0

    @property
    def weight_version(self) -> int:
        """Number of weight updates committed so far; 0 is what SGLang loaded at the start."""
        return self._version

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None if the engine works with token ids only."""
        return self._tokenizer

    @property
    def scheduler_pid(self) -> int:
        """Process id of this rank's scheduler process."""
        return self._process.pid

    # ---- collective calls ----

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        token_ids_logprob: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_text_in_logprobs: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Generate for one prompt or a list of them, as `sglang.Engine.generate` does.

        Args:
            prompt: text, or a list of texts; needs a tokenizer.
            sampling_params: SGLang's sampling parameters, one mapping for all prompts or one each.
                `n > 1` returns the n samples of a prompt one after the other.
            input_ids: token ids instead of `prompt`, one list or a list of lists.
            return_logprob: also return the log-probabilities of the output tokens.
            logprob_start_len: first prompt position whose log-probability is returned; -1 for none.
            top_logprobs_num: log-probabilities of this many most likely tokens at each position.
            token_ids_logprob: log-probabilities of these tokens at each position.
            return_text_in_logprobs: with the text of each token.

        Returns:
            A dict for one prompt with n = 1, else a list of dicts: `output_ids`, `text` with a tokenizer, and
            `meta_info` (`finish_reason`, `prompt_tokens`, `completion_tokens`, `cached_tokens`, `weight_version`,
            `output_token_logprobs` as (log-probability, token id, text or None), ...).

        Raises:
            InvalidRequestError: SGLang cannot serve this request; the engine stays usable.
            CollectiveMismatchError, EngineBusyError: see there; the engine stays usable.
            WeightsInconsistentError: the last weight update failed half-way.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """

        def prepare() -> tuple[Any, str]:
            requests, single = req.build_requests(
                prompt,
                sampling_params,
                input_ids,
                return_logprob=return_logprob,
                logprob_start_len=logprob_start_len,
                top_logprobs_num=top_logprobs_num,
                token_ids_logprob=token_ids_logprob,
                tokenizer=self._tokenizer,
            )
            return (requests, single), f"generate({len(requests)} sequences)"

        (requests, single), outputs = self._call("generate", prepare, as_payload=lambda made: made[0])
        results = req.format_outputs(
            requests,
            outputs,
            call=self._seq,
            tokenizer=self._tokenizer,
            return_text_in_logprobs=return_text_in_logprobs,
        )
        return results[0] if single else results

    def flush_cache(self) -> None:
        """Drop SGLang's prefix cache."""
        self._call("flush_cache", lambda: (None, "flush_cache()"))

    def update_weights(self, source: torch.nn.Module | Mapping[str, torch.Tensor], *, verify: bool = False) -> UpdateStats:
        """Move new weights from the trainer's shards into SGLang's parameters.

        Collective over all ranks that hold shards of `source` and over the ranks of this replica. The first call
        records and plans, later ones with the same layout reuse the plan. The prefix cache is dropped.

        Args:
            source: an `nn.Module` (plain, or sharded by FSDP2's `fully_shard`), or a mapping from Hugging Face names
                to tensors or DTensors. Floating-point weights are cast to the engine's dtype on the way.
            verify: compare every element after the copy and count those that differ.

        Returns:
            UpdateStats of this rank.

        Raises:
            PlanError: the source does not fit the engine's parameters; the old weights still serve.
            TransferError: shards could not be read; see the message for whether the old weights still serve.
            CollectiveMismatchError, EngineBusyError: the engine stays usable.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """
        started = time.monotonic()
        if self._updates is None:
            from spmd_engine.updates import WeightUpdates

            self._updates = WeightUpdates(self._rank, self._ranks, self._process, self._timeout_s)

        def prepare() -> tuple[Any, str]:
            made = self._updates.prepare(source, verify=verify, watch=self._check_failed)
            return made, f"update_weights({made.summary})"

        made, value = self._call(
            "update_weights",
            prepare,
            as_payload=lambda m: m.payload,
            as_digest=lambda m: m.agreed,
            refusal_payload=lambda: {"ranks": self._updates.last_ranks},
        )
        self._updates.committed(made)
        stats: UpdateStats = value
        self._version = stats.weight_version
        return UpdateStats(**{**vars(stats), "total_s": time.monotonic() - started})

    def weight_checksums(self) -> dict[str, str]:
        """Digests of the bytes of all parameters and buffers of this rank's SGLang model, by SGLang's names.

        Two engines of the same shape hold the same weights if and only if these are equal on every rank.
        """
        _, value = self._call("weight_checksums", lambda: (None, "weight_checksums()"))
        checksums: dict[str, str] = value
        return checksums

    # ---- life ----

    def shutdown(self) -> None:
        """End the scheduler process of this rank. Waits for no other rank, and may be called again."""
        if self._dead is None:
            self._dead = EngineClosedError(f"the engine of rank {self._rank} was shut down; make a new SpmdEngine")
            self._process.stop(grace_s=_STOP_GRACE_S)
            self._finalizer.detach()

    def __enter__(self) -> SpmdEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---- inside ----

    def _make_tokenizer(self) -> Any:
        path = self._server_args.get("tokenizer_path") or self._model_path
        if self._server_args.get("skip_tokenizer_init") is None:
            self._server_args["skip_tokenizer_init"] = not req.has_tokenizer(path)
        return None if self._server_args["skip_tokenizer_init"] else req.load_tokenizer(path, self._server_args)

    def _on_cpu(self) -> bool:
        import torch

        return bool(self._server_args.get("device", "cuda" if torch.cuda.device_count() else "cpu") == "cpu")

    def _meet(self) -> Meeting:
        arguments = {"model_path": self._model_path, **self._server_args}
        note: dict[str, Any] = {"digest": digest(arguments), "arguments": repr(arguments)[:500]}
        if not self._on_cpu():
            note["gpu"] = own_gpu(os.environ)
        if self.is_leader:
            note["seed"] = self._server_args.get("random_seed") or secrets.randbelow(1 << 30)
        meeting = self._rendezvous.meet(note, timeout_s=self._timeout_s, watch=lambda: None)
        try:
            _check_agreement(self._ranks, meeting)
            self._gpus = visible_gpus(self._ranks, [note.get("gpu") for note in meeting.notes])
        except SpmdEngineError:
            _close_listener(meeting.link)
            raise
        return meeting

    def _start_process(self, meeting: Meeting, log_dir: str | os.PathLike[str] | None) -> SchedulerProcess:
        loopback = meeting.link.host in ("127.0.0.1", "::1")
        on_cpu = self._on_cpu()
        scratch = tempfile.mkdtemp(prefix="spmd-engine-")
        start = Start(
            protocol=PROTOCOL,
            rank=self._rank,
            tp_rank=self.tp_rank,
            link=meeting.link,
            model_path=self._model_path,
            server_args=self._server_args,
            random_seed=meeting.notes[0]["seed"],
            dist_port=meeting.notes[0]["port"],
            gpu_id=0 if on_cpu else self.tp_rank,
            on_cpu=on_cpu,
            trainer_pid=os.getpid(),
            scratch=scratch,
            timeout_s=self._timeout_s,
        )
        env = child_environment(
            os.environ, on_cpu=on_cpu, tp_size=self.tp_size, loopback=loopback, scratch=scratch, gpus=self._gpus
        )
        return SchedulerProcess(start, env=env, log_dir=log_dir)

    def _call(
        self,
        kind: str,
        prepare: Callable[[], tuple[Any, str]],
        *,
        as_payload: Callable[[Any], Any] = lambda made: made,
        as_digest: Callable[[Any], Any] | None = None,
        refusal_payload: Callable[[], Any] = lambda: None,
    ) -> tuple[Any, Any]:
        """Make one collective call: `prepare` builds its arguments. Returns what it built, and the reply's value."""
        self._check_alive()
        overlapped = not self._lock.acquire(blocking=False)
        if overlapped and not self._lock.acquire(timeout=self._timeout_s):
            raise CollectiveTimeoutError(f"rank {self._rank}: another call ran for over {self._timeout_s:.0f} s")
        try:
            self._check_alive()
            self._seq += 1
            refusal: SpmdEngineError | None = None
            made, payload = None, None
            try:
                made, summary = prepare()
                payload = as_payload(made)
            except SpmdEngineError as error:
                # The other ranks may be waiting: tell them, so that all of them get an error now.
                if self._dead is not None:
                    raise
                refusal, summary = error, f"{kind}(...) refused: {error}"
                payload = refusal_payload()
            call = Call(
                seq=self._seq,
                kind="refused" if refusal else kind,
                payload=payload,
                digest=digest([kind, summary] if refusal else [kind, (as_digest or as_payload)(made)]),
                summary=summary,
                overlapped=overlapped,
                timeout_s=self._timeout_s,
            )
            self._process.send(call)
            reply: Reply = self._receive(
                lambda message: isinstance(message, Reply) and message.seq == call.seq,
                self._timeout_s + _REPLY_MARGIN_S,
                kind,
            )
            if reply.error is not None:
                raise reply.error.to_exception()
            if refusal is not None:
                raise refusal
            return made, reply.value
        finally:
            self._lock.release()

    def _receive(self, wanted: Callable[[Any], bool], timeout_s: float, phase: str) -> Any:
        """The next wanted message; replies to calls that the user interrupted are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                message = self._process.recv(timeout_s=max(0.0, deadline - time.monotonic()))
            except ProcessDied:
                self._fail(self._own_death(phase))
            except ChannelTimeout:
                self._fail(
                    CollectiveTimeoutError(
                        f"rank {self._rank}: its scheduler process (pid {self._process.pid}) gave no answer to {phase} "
                        f"within {timeout_s:.0f} s. End of its log:\n{self._process.log_tail()}"
                    )
                )
            if isinstance(message, Failed):
                self._fail(self._peer_failure(message))
            if wanted(message):
                return message

    def _check_failed(self) -> None:
        """Raise if the scheduler process has ended or reported a failure meanwhile."""
        try:
            failed = self._process.failed()
        except ProcessDied:
            self._fail(self._own_death("update_weights"))
        if failed is not None:
            self._fail(self._peer_failure(failed))

    def _own_death(self, phase: str) -> SchedulerDiedError:
        status = self._process.wait(5.0)
        report = {"exit_status": status, "log_tail": self._process.log_tail()}
        bounded(lambda: self._rendezvous.post(f"died/{self._rank}", report), timeout_s=2.0)
        return _died(self._rank, f"the scheduler process of rank {self._rank} ended during {phase}", report)

    def _peer_failure(self, message: Failed) -> SpmdEngineError:
        error = message.error.to_exception()
        if isinstance(error, SchedulerDiedError):
            rank = error.rank
            report = bounded(lambda: _await_key(self._rendezvous, f"died/{rank}", 2.0), timeout_s=3.0)
            return _died(rank, str(error), report or {})
        return error

    def _fail(self, error: SpmdEngineError) -> NoReturn:
        self._dead = error
        self._process.stop(grace_s=0.0)
        self._finalizer.detach()
        raise error

    def _check_alive(self) -> None:
        if self._dead is not None:
            error = type(self._dead)(*self._dead.args)
            vars(error).update(vars(self._dead))
            raise error


def _mesh_ranks(mesh: DeviceMesh) -> tuple[tuple[int, ...], int]:
    if mesh.ndim != 1:
        raise ConfigError(f'device_mesh_cpu must have one dimension, the TP ranks of a replica, e.g. mesh["tp"]; got {mesh}')
    if mesh.device_type != "cpu":
        raise ConfigError(
            f"device_mesh_cpu must be a mesh of device type 'cpu' (gloo), got {mesh.device_type!r}: "
            "init_device_mesh('cpu', (dp, tp), mesh_dim_names=('dp', 'tp'))['tp']"
        )
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return ranks, ranks.index(dist.get_rank())


def _check_model_path(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not os.path.exists(path):
        raise ConfigError(f"model path {path!r} does not exist on this host")


def _check_server_args(server_args: dict[str, Any], tp_size: int) -> dict[str, Any]:
    args = dict(server_args)
    for name in sorted(_OWN_ARGS & args.keys()):
        raise ConfigError(f"{name}= is set by SpmdEngine from the device mesh; leave it out")
    for name in _ONLY_ONE:
        if args.pop(name, 1) not in (1, None):
            raise ConfigError(f"{name}= must be 1: make one SpmdEngine a replica, each over its own TP mesh")
    for name in ("tp_size", "tensor_parallel_size"):
        if args.pop(name, tp_size) != tp_size:
            raise ConfigError(f"{name}={server_args[name]} but device_mesh_cpu has {tp_size} ranks; leave {name} out")
    return args


def _check_agreement(ranks: tuple[int, ...], meeting: Meeting) -> None:
    if len({note["digest"] for note in meeting.notes}) > 1:
        lines = [f"rank {rank}: {note['arguments']}" for rank, note in zip(ranks, meeting.notes, strict=True)]
        raise CollectiveMismatchError("the ranks of one replica made SpmdEngine with different arguments:\n" + "\n".join(lines))
    if len({note["node"] for note in meeting.notes}) > 1:
        raise ConfigError(
            f"the ranks {list(ranks)} of one replica are on several nodes, which is not supported yet: "
            "choose a TP size that fits in a node"
        )


def _close_listener(link: LinkAddress) -> None:
    if link.listener_fd >= 0:
        os.close(link.listener_fd)


def _died(rank: int, what: str, report: Mapping[str, Any]) -> SchedulerDiedError:
    status, tail = report.get("exit_status"), str(report.get("log_tail", ""))
    how = "" if status is None else f" ({'signal ' + str(-status) if status < 0 else 'exit status ' + str(status)})"
    text = f"{what}{how}"
    if tail:
        text += f". End of its log:\n{tail}"
    return SchedulerDiedError(text, rank=rank, exit_status=status, log_tail=tail)


def _await_key(rendezvous: Rendezvous, key: str, timeout_s: float) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout_s
    while (found := rendezvous.poll(key)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
