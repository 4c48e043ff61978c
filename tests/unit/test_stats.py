from __future__ import annotations

import sys
import threading

from spmd_engine.stats import Counters, UpdateStats

ROUNDS = 3000
RESULT = {"meta_info": {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 1}}


def update(version: int) -> UpdateStats:
    return UpdateStats(
        weight_version=version,
        planned=False,
        local_bytes=5,
        remote_bytes=7,
        block_copies=1,
        fallback_weights=(),
        wrong_elements=None,
        record_s=0.0,
        plan_s=0.0,
        wait_s=0.0,
        copy_s=0.0,
    )


def test_nothing_that_two_threads_count_is_lost():
    """A collective call and the event loop of async_generate count at the same time."""
    counters = Counters()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        finished = threading.Thread(target=lambda: [counters.add_sequences([RESULT]) for _ in range(ROUNDS)])
        finished.start()
        for version in range(1, ROUNDS + 1):
            counters.add_update(update(version))
            stats = counters.snapshot(weight_version=version, sleeping=(), memory={})
            assert stats.last_update is not None
            assert (stats.weight_version, stats.last_update.weight_version, stats.updates) == (version,) * 3
        finished.join()
    finally:
        sys.setswitchinterval(before)
    stats = counters.snapshot(weight_version=ROUNDS, sleeping=("weights",), memory={"weights": 3})
    assert (stats.updates, stats.sequences, stats.completion_tokens) == (ROUNDS, ROUNDS, 3 * ROUNDS)
    assert (stats.local_bytes, stats.remote_bytes) == (5 * ROUNDS, 7 * ROUNDS)
    assert (stats.sleeping, stats.memory) == (("weights",), {"weights": 3})
