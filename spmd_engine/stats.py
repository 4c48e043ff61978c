"""What `SpmdEngine.update_weights` and `SpmdEngine.stats` report."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

# Of a weight update, in the order in which they happen.
PHASES = ("describe", "wait", "record", "plan", "bind", "copy", "commit")


@dataclass(frozen=True)
class UpdateStats:
    """One weight update, as this rank's scheduler process saw it.

    Attributes:
        weight_version: the version that the update committed.
        planned: True if this update made a plan, False if it reused one.
        local_bytes: bytes read from this rank's own shard.
        remote_bytes: bytes read from the shards of other ranks of this node.
        network_bytes: bytes that came to this rank from other nodes; other ranks of this node may use them, too.
        staged_bytes: bytes unpacked from buckets, of this rank and of others: what could not be read in place.
        block_copies: rows of the copy table.
        fallback_weights: names that went through the model's own loader because its loading is not a plain copy.
        wrong_elements: elements that differ from the source after the copy; None unless `verify=True`.
        record_s, plan_s: seconds to record SGLang's `load_weights` and to build the plan; 0 when reused.
            Recording is 0, too, where it had been done before the update: see `SpmdEngine.update_weights`.
        describe_s: seconds on the trainer rank to describe the source and to wait for the work queued on its stream.
        wait_s: seconds until all ranks had announced the same update, with their shards final.
        bind_s: seconds to open memory that has moved and to put its addresses into the table; about 0 otherwise.
        copy_s: seconds of the copy, fallback included.
        device_s: seconds of that which the copy itself ran, by the device's clock on a GPU.
        commit_s: seconds until all ranks had copied, and the version was committed.
        total_s: seconds of the whole call on the trainer rank.
    """

    weight_version: int
    planned: bool
    local_bytes: int
    remote_bytes: int
    block_copies: int
    fallback_weights: tuple[str, ...]
    wrong_elements: int | None
    record_s: float
    plan_s: float
    wait_s: float
    copy_s: float
    describe_s: float = 0.0
    bind_s: float = 0.0
    device_s: float = 0.0
    commit_s: float = 0.0
    total_s: float = 0.0
    network_bytes: int = 0
    staged_bytes: int = 0


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was made, restarts included, as this rank saw it.

    Attributes:
        weight_version: the version that serves, or that served last.
        restarts: how often it was restarted.
        sleeping: tags of the memory that is released now.
        rollouts: `generate` calls that returned.
        generate_s: seconds of these calls.
        sequences, prompt_tokens, completion_tokens: what they took and made, and `async_generate` on the leader, too;
            `n > 1` counts a prompt n times.
        cached_tokens: prompt tokens that the prefix cache had.
        updates: weight updates committed.
        update_s: seconds of these calls.
        update_phases_s: the same by phase, by the names that UpdateStats has for them without "_s".
        local_bytes, remote_bytes, network_bytes, staged_bytes: what the updates moved, as in UpdateStats.
        last_update: the last of them.
        memory: bytes that the engine holds on the device of this rank, by tag: "weights", "kv_cache" and "cuda_graph"
            (what CUDA graphs keep; 0 on the CPU). 0 while the tag sleeps.
    """

    weight_version: int = 0
    restarts: int = 0
    sleeping: tuple[str, ...] = ()
    rollouts: int = 0
    generate_s: float = 0.0
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    updates: int = 0
    update_s: float = 0.0
    update_phases_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    local_bytes: int = 0
    remote_bytes: int = 0
    network_bytes: int = 0
    staged_bytes: int = 0
    last_update: UpdateStats | None = None
    memory: dict[str, int] = field(default_factory=dict)


class Counters:
    """Counts what an engine does, for `EngineStats`.

    Threads may count at the same time: a collective call and the event loop of `async_generate` do.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted = EngineStats()

    def snapshot(self, *, weight_version: int, sleeping: tuple[str, ...], memory: dict[str, int]) -> EngineStats:
        """What was counted so far, with the present state of the engine."""
        with self._lock:
            return replace(self._counted, weight_version=weight_version, sleeping=sleeping, memory=memory)

    def add_restart(self) -> None:
        """Count one restart."""
        with self._lock:
            self._counted = replace(self._counted, restarts=self._counted.restarts + 1)

    def add_rollout(self, results: list[dict[str, Any]], seconds: float) -> None:
        """Count one rollout, and its sequences."""
        with self._lock:
            self._add_sequences(results)
            self._counted = replace(
                self._counted, rollouts=self._counted.rollouts + 1, generate_s=self._counted.generate_s + seconds
            )

    def add_sequences(self, results: list[dict[str, Any]]) -> None:
        """Count sequences."""
        with self._lock:
            self._add_sequences(results)

    def _add_sequences(self, results: list[dict[str, Any]]) -> None:
        def total(name: str) -> int:
            return sum(result["meta_info"][name] for result in results)

        before = self._counted
        self._counted = replace(
            before,
            sequences=before.sequences + len(results),
            prompt_tokens=before.prompt_tokens + total("prompt_tokens"),
            completion_tokens=before.completion_tokens + total("completion_tokens"),
            cached_tokens=before.cached_tokens + total("cached_tokens"),
        )

    def add_update(self, update: UpdateStats) -> None:
        """Count one weight update."""
        with self._lock:
            before = self._counted
            self._counted = replace(
                before,
                updates=before.updates + 1,
                update_s=before.update_s + update.total_s,
                update_phases_s={name: s + getattr(update, f"{name}_s") for name, s in before.update_phases_s.items()},
                local_bytes=before.local_bytes + update.local_bytes,
                remote_bytes=before.remote_bytes + update.remote_bytes,
                network_bytes=before.network_bytes + update.network_bytes,
                staged_bytes=before.staged_bytes + update.staged_bytes,
                last_update=update,
            )
