"""Makes collective calls: one handler for each. All ranks have agreed on the call when its handler runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spmd_engine.control.agreement import AllGather
from spmd_engine.control.calls import (
    Answer,
    CallBody,
    Checksums,
    Done,
    Explain,
    Explained,
    FlushCache,
    Generate,
    Meet,
    Met,
    Occupation,
    Refuse,
    ReleaseMemory,
    ResumeMemory,
    Updated,
    UpdateWeights,
    WeightChecksums,
)
from spmd_engine.control.messages import Start
from spmd_engine.errors import EngineBusyError, SpmdEngineError
from spmd_engine.scheduler.adapter import memory as sglang_memory
from spmd_engine.scheduler.adapter import model as sglang_model
from spmd_engine.scheduler.adapter import requests as sglang_requests
from spmd_engine.scheduler.async_requests import AsyncRequests
from spmd_engine.scheduler.explain import explain
from spmd_engine.scheduler.memory import MemoryKeeper
from spmd_engine.scheduler.weights import UpdateNews, WeightsKeeper


@dataclass(frozen=True)
class Rollout:
    """Requests that SGLang begins now; the call is answered when all ranks have finished them."""

    batch: Any


@dataclass(frozen=True)
class Turn:
    """One call, and what its handler needs of the receiver.

    Attributes:
        seq: number of the call.
        gather: over all ranks that make the call.
        gather_replica: over the ranks of this replica.
        news: what ranks have announced of a weight update, in their order.
        enter: tells the trainer which phase begins.
        wait_s: seconds that agreeing took.
    """

    seq: int
    gather: AllGather
    gather_replica: AllGather
    news: list[UpdateNews]
    enter: Callable[[str], None]
    wait_s: float


class Handlers:
    """Holds what calls act on, and makes them.

    Args:
        scheduler: SGLang's.
        start: of this process.
        requests: those of `async_generate`.
    """

    def __init__(
        self, scheduler: Any, start: Start, weights: WeightsKeeper, memory: MemoryKeeper, requests: AsyncRequests
    ) -> None:
        self._scheduler, self._start, self._weights = scheduler, start, weights
        self._memory, self._requests, self._outputs = memory, requests, requests.outputs
        self._by_type: dict[type[CallBody], Callable[[Any, Turn], Answer | Rollout]] = {
            Generate: self._generate,
            FlushCache: self._flush_cache,
            WeightChecksums: self._checksums,
            ReleaseMemory: self._release,
            ResumeMemory: self._resume,
            UpdateWeights: self._update_weights,
            Explain: self._explain,
            Meet: self._meet,
            Refuse: lambda call, turn: Done(),  # the trainer rank knows its own error
        }

    def refusal(self, call: CallBody) -> SpmdEngineError | None:
        """Why a call cannot be made now; the same on all ranks that made the same calls so far."""
        if isinstance(call, Generate) and self._requests.is_paused:
            return EngineBusyError("requests are paused: call resume() before generate")
        return self._memory.refusal(call)

    def make(self, call: CallBody, turn: Turn) -> Answer | Rollout:
        """Make a call.

        Raises:
            SpmdEngineError: of the call; see the method of `SpmdEngine` with its name.
        """
        return self._by_type[type(call)](call, turn)

    def _generate(self, call: Generate, turn: Turn) -> Rollout:
        self._weights.check_consistent()
        rids = [f"{turn.seq}-{i}" for i in range(len(call.requests))]
        made = [
            sglang_requests.make_request(request, rid, self._scheduler)
            for request, rid in zip(call.requests, rids, strict=True)
        ]
        self._outputs.expect(rids, [request.return_logprob for request in call.requests], self._weights.version)
        return Rollout(sglang_requests.make_batch(made))

    def _flush_cache(self, call: FlushCache, turn: Turn) -> Done:
        if "kv_cache" not in self._memory.sleeping:  # else it is empty
            sglang_memory.flush_cache(self._scheduler)
        return Done()

    def _checksums(self, call: WeightChecksums, turn: Turn) -> Checksums:
        return Checksums(sglang_model.checksums(self._scheduler))

    def _release(self, call: ReleaseMemory, turn: Turn) -> Occupation:
        self._unmap_unless_kept()
        if "weights" in self._memory.release(call.tags, turn.gather_replica) and not self._memory.keeps_weights:
            self._weights.lose_contents()
        return self._memory.occupation()

    def _resume(self, call: ResumeMemory, turn: Turn) -> Occupation:
        self._unmap_unless_kept()
        self._memory.resume(call.tags, turn.gather_replica)
        return self._memory.occupation()

    def _unmap_unless_kept(self) -> None:
        if not self._start.keeps_mapped:
            self._weights.unmap()

    def _update_weights(self, call: UpdateWeights, turn: Turn) -> Updated:
        flush = "kv_cache" not in self._memory.sleeping
        stats = self._weights.update(call, turn.news, turn.gather, turn.enter, flush=flush, wait_s=turn.wait_s)
        self._outputs.use_version(self._weights.version)
        return Updated(stats)

    def _explain(self, call: Explain, turn: Turn) -> Explained:
        return explain(self._weights, sglang_model.model_of(self._scheduler), call, turn.gather, start=self._start)

    def _meet(self, call: Meet, turn: Turn) -> Met:
        return Met(max(met.number for met in turn.gather_replica(Met(call.number))))
