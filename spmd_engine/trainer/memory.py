"""Releases the engine's memory to the trainer, and takes it again: sleep and wake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from spmd_engine.control.calls import Occupation, ReleaseMemory, ResumeMemory
from spmd_engine.errors import MEMORY_TAGS, MemoryOccupationError
from spmd_engine.trainer.scheduler_client import SchedulerClient
from spmd_engine.trainer.weight_updates import WeightUpdates


class MemoryCalls:
    """The part of `SpmdEngine` that releases and resumes memory. Collective over the ranks of the replica."""

    _client: SchedulerClient
    _updates: WeightUpdates
    _keeps_mapped: bool
    _sleeping: tuple[str, ...]
    _memory: dict[str, int]
    _log: Callable[..., None]

    @property
    def sleeping(self) -> tuple[str, ...]:
        """Tags of the memory that is released now."""
        return self._sleeping

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Give memory of the engine back to the device. When this returns, it is free on all ranks of the replica.

        Needs `enable_memory_saver=True`. Addresses stay, so CUDA graphs and plans of weight updates stay valid. What
        the engine has mapped of the trainer's memory is closed, so that the trainer can free it, too, unless the engine
        was made with `keep_mapped=True`.

        Args:
            tags: of "weights", "kv_cache" and "cuda_graph" those to release; None for all that are awake. The contents
                of the weights are gone, and `generate` refuses until the next update, unless the engine was made with
                `enable_weights_cpu_backup=True`. The prefix cache is dropped with the KV cache. SGLang captures CUDA
                graphs into memory that can be released only if the environment has SGLANG_MEMORY_SAVER_CUDA_GRAPH=1
                (which excludes its breakable prefill graphs); else releasing them frees nothing.

        Raises:
            MemoryOccupationError: an unknown tag, one that is released already, or no memory saver; nothing was
                released, and the engine stays usable.
            CollectiveMismatchError, EngineBusyError: the engine stays usable.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """
        self._change_occupation("release_memory_occupation", ReleaseMemory, tags)

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again that was released. When this returns, all ranks of the replica have it.

        To keep the peak low, wake in stages: resume "weights", `update_weights`, free the trainer's copy (it is mapped
        by the engine until the next call of this method), then resume the rest.

        Args:
            tags: those to resume, in any order; None for all that sleep.

        Raises:
            MemoryOccupationError: an unknown tag, one that is not released, or too little free memory on some rank;
                nothing was resumed, and the engine stays usable.
            CollectiveMismatchError, EngineBusyError: the engine stays usable.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError: the engine is closed.
        """
        self._change_occupation("resume_memory_occupation", ResumeMemory, tags)

    def sleep(self) -> None:
        """Release all memory that can be released: `release_memory_occupation()`."""
        self.release_memory_occupation()

    def wake_up(self) -> None:
        """Resume all memory that is released: `resume_memory_occupation()`. Staged, it has a lower peak."""
        self.resume_memory_occupation()

    def _change_occupation(
        self, name: str, body: type[ReleaseMemory] | type[ResumeMemory], tags: Sequence[str] | None
    ) -> None:
        if not self._keeps_mapped:
            self._updates.forget_places()
        with self._client.collective(name) as call:
            now = call.finish(body(_check_tags(tags)), Occupation)
        self._sleeping, self._memory = now.sleeping, now.memory
        self._log(logging.DEBUG, name, f"now asleep: {list(now.sleeping)}", sleeping=now.sleeping, memory=now.memory)


def _check_tags(tags: Sequence[str] | None) -> list[str] | None:
    """The tags, each once and sorted.

    Raises:
        MemoryOccupationError: there is none, or one of them is unknown.
    """
    if tags is None:
        return None
    given = [tags] if isinstance(tags, str) else list(tags)
    unknown = [tag for tag in given if tag not in MEMORY_TAGS]
    if unknown or not given or isinstance(tags, str):
        raise MemoryOccupationError(f"tags must be None or a list of some of {list(MEMORY_TAGS)}, got {tags!r}")
    return sorted(set(given))
