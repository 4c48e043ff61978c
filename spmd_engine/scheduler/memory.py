"""The scheduler process's side of sleep and wake: what sleeps, what may be done meanwhile, and in what steps.

Every order is checked here, on all ranks alike, before SGLang hears of it: the memory saver ends the process when it is
asked to pause what is paused, and touching what is paused is an illegal access.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spmd_engine.control import timeouts
from spmd_engine.control.agreement import AllGather
from spmd_engine.control.calls import (
    CallBody,
    Explain,
    Generate,
    Occupation,
    ReleaseMemory,
    ResumeMemory,
    UpdateWeights,
    WeightChecksums,
)
from spmd_engine.control.messages import Start
from spmd_engine.errors import MEMORY_TAGS, AsleepError, MemoryOccupationError, SpmdEngineError
from spmd_engine.scheduler.adapter import memory as sglang_memory

# Calls that need the weights alone.
_OF_WEIGHTS = (UpdateWeights, Explain, WeightChecksums)
# The order in which SGLang's own handlers release; they resume in the opposite one.
_RELEASE_ORDER = ("kv_cache", "weights", "cuda_graph")
assert sorted(_RELEASE_ORDER) == sorted(MEMORY_TAGS)


@dataclass(frozen=True)
class _Room:
    """Whether a rank has room for what it shall take again.

    Attributes:
        is_short: it had not, at once.
        shortage: what is missing after the trainers' memory was unmapped; "" if nothing is.
    """

    is_short: bool = False
    shortage: str = ""


class MemoryKeeper:
    """Owns the answer to which memory of one scheduler process sleeps.

    Args:
        scheduler: SGLang's.
        start: as it came from the trainer rank.
        device: of the engine's parameters.
        unmap: closes what this process has mapped of the trainers' memory.
    """

    def __init__(self, scheduler: Any, start: Start, device: torch.device, *, unmap: Callable[[], None]) -> None:
        self._scheduler, self._rank, self._device, self._unmap = scheduler, start.rank, device, unmap
        self._is_enabled = bool(start.server_args.get("enable_memory_saver"))
        self.keeps_weights = bool(start.server_args.get("enable_weights_cpu_backup"))
        self._sizes = sglang_memory.memory_bytes(scheduler, device)
        self._freed: dict[str, int] = {}  # bytes that each sleeping tag gave back
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # small tensors beside the weights, and their copies

    @property
    def sleeping(self) -> tuple[str, ...]:
        """The tags that sleep."""
        return tuple(tag for tag in MEMORY_TAGS if tag in self._freed)

    def occupation(self) -> Occupation:
        """What sleeps now."""
        return Occupation(self.sleeping, self.held())

    def held(self) -> dict[str, int]:
        """Bytes on the device by tag, 0 for those that sleep."""
        return {tag: 0 if tag in self._freed else size for tag, size in self._sizes.items()}

    def refusal(self, call: CallBody) -> SpmdEngineError | None:
        """Why a call cannot be made now; the same on all ranks that made the same calls so far."""
        if isinstance(call, (ReleaseMemory, ResumeMemory)):
            return self._order_refusal(call)
        if isinstance(call, Generate):
            return self.generate_refusal()
        return self._asleep(("weights",), call.name) if isinstance(call, _OF_WEIGHTS) else None

    def generate_refusal(self) -> AsleepError | None:
        """Why nothing can be generated now."""
        return self._asleep(MEMORY_TAGS, "generate")

    def _asleep(self, needed: Sequence[str], name: str) -> AsleepError | None:
        asleep = [tag for tag in needed if tag in self._freed]
        if not asleep:
            return None
        return AsleepError(f"{_names(asleep)} released: call resume_memory_occupation({asleep}) before {name}")

    def _order_refusal(self, call: ReleaseMemory | ResumeMemory) -> SpmdEngineError | None:
        tags, releases = call.tags, isinstance(call, ReleaseMemory)
        if not self._is_enabled:
            return MemoryOccupationError(
                f"{call.name} needs an engine with the memory saver: SpmdEngine(..., enable_memory_saver=True)"
            )
        if tags is None:
            if releases and len(self._freed) == len(MEMORY_TAGS):
                return MemoryOccupationError("everything is released already: call resume_memory_occupation first")
            if not releases and not self._freed:
                return MemoryOccupationError("nothing is released, so there is nothing to resume")
            return None
        wrong = [tag for tag in tags if (tag in self._freed) == releases]
        if not wrong:
            return None
        if releases:
            return MemoryOccupationError(f"{_names(wrong)} released already: release only what is awake")
        return MemoryOccupationError(
            f"{_names(wrong)} not released: resume only what sleeps, now {list(self.sleeping) or 'nothing'}"
        )

    def release(self, tags: Sequence[str] | None, gather: AllGather) -> list[str]:
        """Give the memory of `tags` back, None for all that is awake. Returns the tags that this released.

        Args:
            gather: all-gather over the replica; when it returns here, the memory of all its ranks is free.
        """
        wanted = [tag for tag in _RELEASE_ORDER if tag not in self._freed and (tags is None or tag in tags)]
        self._settle()
        gather(_Room())  # what other ranks had mapped and close just now must not be counted below
        for tag in wanted:
            if tag == "weights":
                constants = sglang_memory.unregistered_constants(self._scheduler)
                self._kept = [(tensor, tensor.detach().cpu().clone()) for tensor in constants]
            before = self._free_bytes()
            sglang_memory.release_memory(self._scheduler, tag)
            self._freed[tag] = max(0, self._free_bytes() - before)
        gather(_Room())
        return wanted

    def resume(self, tags: Sequence[str] | None, gather: AllGather) -> None:
        """Take the memory of `tags` again, None for all that sleeps.

        Args:
            gather: all-gather over the replica.

        Raises:
            MemoryOccupationError: a rank has not enough free memory; all still sleeps.
        """
        wanted = [tag for tag in reversed(_RELEASE_ORDER) if tag in self._freed and (tags is None or tag in tags)]
        self._settle()
        is_short = self._free_bytes() < sum(self._freed[tag] for tag in wanted)
        if any(room.is_short for room in gather(_Room(is_short=is_short))):
            self._unmap()
            gather(
                _Room()
            )  # from here on no rank of this replica maps memory of the trainers, so what they freed is free
        self._check_free(wanted, gather)
        for tag in wanted:
            sglang_memory.resume_memory(self._scheduler, tag)
            del self._freed[tag]
            if tag == "weights":
                with torch.inference_mode():
                    for tensor, copy in self._kept:
                        tensor.copy_(copy)
                self._kept = []
        gather(_Room())

    def _check_free(self, tags: list[str], gather: AllGather) -> None:
        """Refuse, on all ranks, what the memory saver of one would end its process for."""
        needed, free = sum(self._freed[tag] for tag in tags), self._free_bytes()
        deadline = time.monotonic() + timeouts.OTHERS_UNMAP_S
        while free < needed and time.monotonic() < deadline:  # other replicas may still map what this trainer freed
            time.sleep(0.02)
            free = self._free_bytes()
        shortage = ""
        if free < needed:
            shortage = (
                f"rank {self._rank} needs {needed / 2**30:.2f} GiB for {tags} and {self._device} has only "
                f"{free / 2**30:.2f} GiB free: free memory of the trainer (then torch.cuda.empty_cache()) and call "
                "resume_memory_occupation again; nothing was resumed"
            )
        for room in gather(_Room(shortage=shortage)):
            if room.shortage:
                raise MemoryOccupationError(room.shortage)

    def _settle(self) -> None:
        """Let all kernels end, and give back what torch only caches."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _free_bytes(self) -> int:
        """Free memory of the device; on the CPU, where pages come as they are touched, always 0."""
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else 0


def _names(tags: Sequence[str]) -> str:
    return f"{' and '.join(tags)} {'is' if len(tags) == 1 else 'are'}"
