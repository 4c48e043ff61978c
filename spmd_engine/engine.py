"""SpmdEngine: SGLang under the process layout of the trainer, one scheduler process a rank."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from spmd_engine.control import timeouts
from spmd_engine.control.calls import (
    Checksums,
    Done,
    Explained,
    FlushCache,
    Generate,
    Generated,
    Updated,
    WeightChecksums,
)
from spmd_engine.control.messages import Coming
from spmd_engine.errors import InvalidRequestError, MemoryNotOfferedError
from spmd_engine.planning.plan import numbered
from spmd_engine.planning.read_sets import unpack
from spmd_engine.planning.report import LinkSpeeds, PlanReport, make_report
from spmd_engine.stats import Counters, EngineStats, UpdateStats
from spmd_engine.trainer import requests as req
from spmd_engine.trainer import tracing
from spmd_engine.trainer.async_requests import AsyncRequests
from spmd_engine.trainer.leader import LeaderCalls
from spmd_engine.trainer.memory import MemoryCalls
from spmd_engine.trainer.requests import GenerateOptions
from spmd_engine.trainer.scheduler_client import SchedulerClient
from spmd_engine.trainer.startup import Startup, mesh_ranks
from spmd_engine.trainer.weight_updates import PreparedUpdate, WeightUpdates

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

_RUNNING = ("wait", "abort", "pause")


class SpmdEngine(LeaderCalls, MemoryCalls):
    """SGLang inside the ranks of a trainer.

    Every rank of `device_mesh_cpu` starts the scheduler process of its own tensor-parallel rank and talks to it alone.
    All methods but those of `LeaderCalls` (`async_generate` and its companions), `stats` and `shutdown` are
    collective over the ranks of the mesh: call them in the same order with the same arguments. Several meshes in one
    job make several replicas; `update_weights` and `explain` are collective over all ranks that hold shards of the
    source, of whichever replica.

    Args:
        model_path: a directory or hub name that SGLang can load.
        device_mesh_cpu: 1-D DeviceMesh of device type "cpu" (gloo) over this replica's TP ranks,
            for example `init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))["tp"]`.
        timeout_s: seconds that any collective call may take, waiting for slower ranks included.
        log_dir: directory for the logs of the scheduler processes. By default they vanish with the engine; the end
            of a log is part of the error when a process dies.
        keep_mapped: leave the trainer's weights mapped while memory is released and resumed, so that the next update
            need not open them again, which takes far longer than the copy. For trainers whose weights stay on the GPU:
            what such a trainer frees is not free before the next update, or before a resume that lacks memory.
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
        keep_mapped: bool = False,
        **server_args: Any,
    ) -> None:
        self._ranks, self.tp_rank = mesh_ranks(device_mesh_cpu)
        self._model_path, self._server_args = os.path.expanduser(os.fspath(model_path)), server_args
        self._timeout_s, self._log_dir, self._keeps_mapped = timeout_s, log_dir, bool(keep_mapped)
        self._counters = Counters()
        self._weight_version, self._sleeping = 0, tuple[str, ...]()
        self._memory: dict[str, int] = {}
        self._device: int | None = None  # another thread may have another current device when it restarts the engine
        self._start(is_restart=False)

    def _start(self, *, is_restart: bool) -> None:
        rank = self._ranks[self.tp_rank]
        startup = Startup(
            self._model_path,
            self._server_args,
            ranks=self._ranks,
            rank=rank,
            timeout_s=self._timeout_s,
            keeps_mapped=self._keeps_mapped,
            weight_version=self._weight_version,
            device=self._device,
            is_restart=is_restart,
        )
        self._process = startup.start(self._log_dir)
        self._device = startup.device
        self._tokenizer = startup.tokenizer
        self._weight_version, self._sleeping = startup.weight_version, ()
        if is_restart:
            self._counters.add_restart()
        self._spin_s = 0.0 if startup.on_cpu else timeouts.TRAINER_SPIN_S
        self._client = SchedulerClient(rank, self._process, startup.rendezvous, float(self._timeout_s))
        self._updates = WeightUpdates(rank, self._ranks, self._process, self._timeout_s, self._device)
        self._requests = AsyncRequests(self._client, self._tokenizer, self._timeout_s, self._counters.add_sequences)
        self._memory = self._client.await_ready().memory
        text = f"scheduler process {self._process.pid} serves {self._model_path}"
        self._log(logging.INFO, "start", text, pid=self._process.pid, weight_version=self.weight_version)

    # ---- facts ----

    @property
    def tp_size(self) -> int:
        """Number of ranks of this replica."""
        return len(self._ranks)

    @property
    def weight_version(self) -> int:
        """Number of weight updates committed so far; 0 is what SGLang loaded at the start."""
        return self._weight_version

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None if the engine works with token ids only."""
        return self._tokenizer

    @property
    def scheduler_pid(self) -> int:
        """Process id of this rank's scheduler process."""
        return self._process.pid

    def stats(self) -> EngineStats:
        """What this engine has done so far. Local to this rank; may be called at any time."""
        return self._counters.snapshot(
            weight_version=self._weight_version, sleeping=self._sleeping, memory=dict(self._memory)
        )

    # ---- collective calls ----

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        return_text_in_logprobs: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Generate for one prompt or a list of them, as `sglang.Engine.generate` does.

        Args:
            prompt: text, or a list of texts; needs a tokenizer.
            sampling_params: SGLang's sampling parameters, one mapping for all prompts or one each.
                `n > 1` returns the n samples of a prompt one after the other.
            return_text_in_logprobs: with the text of each token.
            **options: `input_ids`, `return_logprob`, `logprob_start_len`, `top_logprobs_num` and `token_ids_logprob`;
                see `requests.GenerateOptions`.

        Returns:
            A dict for one prompt with n = 1, else a list of dicts: `output_ids`, `text` with a tokenizer, and
            `meta_info` (`finish_reason`, `prompt_tokens`, `completion_tokens`, `cached_tokens`, `weight_version`,
            `output_token_logprobs` as (log-probability, token id, text or None), ...).

        Raises:
            InvalidRequestError: SGLang cannot serve this request; the engine stays usable.
            CollectiveMismatchError, EngineBusyError: see there; the engine stays usable.
            WeightsInconsistentError: the last weight update failed half-way, or the weights slept and none came since.
            AsleepError: some memory is released; the engine stays usable.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """

        started = time.monotonic()
        with self._client.collective("generate") as call:
            requests, single = req.build_requests(prompt, sampling_params, tokenizer=self._tokenizer, **options)
            outputs = call.finish(Generate(requests), Generated).outputs
        with tracing.span("format"):
            results = req.format_outputs(
                requests,
                outputs,
                ids=[f"{call.seq}-{i}" for i in range(len(requests))],
                tokenizer=self._tokenizer,
                return_text_in_logprobs=return_text_in_logprobs,
            )
        seconds = time.monotonic() - started
        self._counters.add_rollout(results, seconds)
        if logger.isEnabledFor(logging.DEBUG):
            self._log(logging.DEBUG, "generate", f"{len(results)} sequences", sequences=len(results), seconds=seconds)
        return results[0] if single else results

    def flush_cache(self) -> None:
        """Drop SGLang's prefix cache."""
        with self._client.collective("flush_cache") as call:
            call.finish(FlushCache(), Done)

    def update_weights(
        self,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        verify: bool = False,
        running: str = "wait",
        rename: Callable[[str], str] | None = None,
    ) -> UpdateStats:
        """Move new weights from the trainer's shards into SGLang's parameters.

        Collective over all ranks that hold shards of `source` and over the ranks of this replica. The first call
        records and plans, later ones with the same layout reuse the plan. The prefix cache is dropped.

        To record the experts that transformers stacks takes seconds. The engine does that by itself after its start,
        for the weights of transformers' model in its own dtype; a call that comes meanwhile waits for it.

        Args:
            source: an `nn.Module` (plain, or sharded by FSDP1 or FSDP2), or a mapping from Hugging Face names
                to tensors or DTensors. Floating-point weights are cast to the engine's dtype on the way.
            verify: compare every element after the copy and count those that differ. Weights that take the model's own
                loader (`fallback_weights`) are compared as that loader gets them.
            running: what becomes of requests of `async_generate` that run: "wait" until they have finished, "abort"
                them, or "pause" them, which then go on with the new weights from the tokens that they have. Those
                that `pause` has stopped stay stopped, and go on after `resume`.
            rename: from a name in `source`, without what wrappers add, to the Hugging Face name of the weight. The same
                function object as the last time spares a new description of the source.

        Returns:
            UpdateStats of this rank.

        Raises:
            PlanError: the source does not fit the engine's parameters; the old weights still serve.
            TransferError: shards could not be read; see the message for whether the old weights still serve.
            AsleepError: the memory of the weights is released (that of the KV cache may be).
            InvalidRequestError: an unknown value of `running`.
            CollectiveMismatchError, EngineBusyError: the engine stays usable.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """
        started = time.monotonic()
        self._client.check_owner()  # a fork has no thread that packs, but perhaps its lock
        with self._updates.packing():
            try:
                made, stats = self._update_weights(source, verify, running, rename)
            except MemoryNotOfferedError:
                made, stats = self._update_weights(source, verify, running, rename)
        self._updates.commit(made)
        stats = replace(stats, describe_s=made.describe_s, total_s=time.monotonic() - started)
        self._weight_version = stats.weight_version
        self._counters.add_update(stats)
        if logger.isEnabledFor(logging.DEBUG):
            self._log(logging.DEBUG, "update_weights", f"weight version {stats.weight_version}", **vars(stats))
        return stats

    def _update_weights(
        self,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        verify: bool,
        running: str,
        rename: Callable[[str], str] | None,
    ) -> tuple[PreparedUpdate, UpdateStats]:
        with self._client.collective("update_weights", notice=Coming(), span="describe") as call:
            call.holders = self._updates.last_holders  # so that a refusal reaches all who wait in this call
            if running not in _RUNNING:
                raise InvalidRequestError(f"running must be one of {list(_RUNNING)}, got {running!r}")
            made = self._updates.prepare(call, source, verify=bool(verify), running=str(running), rename=rename)
            return made, call.finish(made.body, Updated, spin_s=self._spin_s).stats

    def explain(
        self,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        rename: Callable[[str], str] | None = None,
        speeds: LinkSpeeds | None = None,
    ) -> PlanReport:
        """What `update_weights(source)` would move, from which rank to which and over which links.

        Collective like `update_weights`, over all ranks that hold shards of `source` and the ranks of this replica.
        Moves no weight, and leaves the engine and its plans as they are; it begins when no request runs any more. Print
        the report, or see its fields.

        Args:
            source: as for `update_weights`.
            rename: as for `update_weights`.
            speeds: what links carry, for the floors; by default an H200's.

        Returns:
            PlanReport, the same on all ranks.

        Raises:
            PlanError: `update_weights` would refuse the source, for the same reason.
            AsleepError: the memory of the weights is released.
            CollectiveMismatchError, EngineBusyError: the engine stays usable.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """

        with self._client.collective("explain") as call:
            call.holders = self._updates.last_holders
            body = self._updates.prepare_explain(call, source, rename=rename)
            found = call.finish(body, Explained)
        read_sets = {key: unpack(packed, body.layout.names()) for key, packed in found.read_sets.items()}
        reads = dict(zip(body.holders, found.ranks, strict=True))
        return make_report(
            body.layout,
            {rank: read_sets[one.read_sets] for rank, one in reads.items()},
            nodes=numbered({rank: one.node for rank, one in reads.items()}),
            speeds=speeds or LinkSpeeds(),
            off_loaded=frozenset(rank for rank, one in reads.items() if one.is_off_loaded),
            fallback=found.fallback,
        )

    def weight_checksums(self) -> dict[str, str]:
        """Digests of the bytes of all parameters and buffers of this rank's SGLang model, by SGLang's names.

        Two engines of the same shape hold the same weights if and only if these are equal on every rank.
        """
        with self._client.collective("weight_checksums") as call:
            return call.finish(WeightChecksums(), Checksums).by_name

    # ---- life ----

    def restart(self) -> None:
        """Start new scheduler processes in place of those that died, or of those that run.

        Collective over the ranks of this replica. SGLang loads its checkpoint again, and `generate` refuses until the
        next `update_weights`, which plans anew. Replicas that have been updated together are linked: when a process of
        one dies, all of them end, and a restart of one must be one of all.

        Raises:
            SpmdEngineError: all that making a SpmdEngine raises; it may be tried again.
        """
        self._client.check_owner()
        self._client.stop()
        self._start(is_restart=True)

    def shutdown(self) -> None:
        """End the scheduler process of this rank. Waits for no other rank, and may be called again."""
        self._client.stop()

    def _log(self, level: int, event: str, text: str, **fields: Any) -> None:
        """A record of the logger "spmd_engine.engine", with its fields in the attribute `spmd_engine`."""
        rank = self._ranks[self.tp_rank]
        extra = {"spmd_engine": {"event": event, "rank": rank, **fields}}
        logger.log(level, "rank %d: %s: %s", rank, event, text, extra=extra)

    def __enter__(self) -> SpmdEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
