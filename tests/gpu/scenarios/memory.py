"""Releases and resumes the engine's memory, and measures the free memory of the GPU meanwhile."""

from __future__ import annotations

import os

import pytest
import torch
from gpu.scenarios.common import OTHER, SHAPE, Trainer, free_bytes, in_expandable_segments, take_all_memory
from integration.scenarios.common import greedy

from spmd_engine import errors

KV_TOKENS = 1_000_000
CAPTURES_GRAPHS = {
    "enable_memory_saver": True,
    "max_total_tokens": KV_TOKENS,
    "disable_cuda_graph": False,
    "cuda_graph_max_bs_decode": 8,
}


def sleep(trainer: Trainer) -> None:
    """Memory really comes back, also the trainer's; CUDA graphs and plans survive; cycles leave nothing behind."""
    pausable_graphs = "SGLANG_MEMORY_SAVER_CUDA_GRAPH" in os.environ
    cycles, slack = 20, 64 << 20
    # Two KV heads, bfloat16.
    kv_bytes = KV_TOKENS * SHAPE["num_hidden_layers"] * 2 * (2 // trainer.tp) * SHAPE["head_dim"] * 2
    engine = trainer.engine
    model = trainer.make_sharded(OTHER)
    first = engine.update_weights(model, verify=True)
    assert first.planned and first.wrong_elements == 0
    tokens, checksums = greedy(engine), engine.weight_checksums()

    held = {}
    for tag in ("weights", "kv_cache", "cuda_graph"):
        before = free_bytes()
        engine.release_memory_occupation([tag])
        held[tag] = free_bytes() - before
        print(f"release of {tag}: {held[tag] / 2**20:.1f} MiB")
    assert held["kv_cache"] >= 0.95 * kv_bytes, (held, kv_bytes)
    assert held["weights"] >= first.local_bytes + first.remote_bytes, (held, first)
    assert held["cuda_graph"] > 0 or not pausable_graphs, held
    with pytest.raises(errors.MemoryOccupationError, match="everything is released already"):
        engine.sleep()
    with pytest.raises(errors.AsleepError, match="before generate"):
        greedy(engine)
    with pytest.raises(errors.AsleepError, match="before update_weights"):
        engine.update_weights(model)

    # No memory to wake up with.
    hog = torch.empty(free_bytes() - (256 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(errors.MemoryOccupationError, match="GiB free"):
        engine.wake_up()
    assert engine.sleeping == ("weights", "kv_cache", "cuda_graph")
    del hog
    asleep = free_bytes()

    # The staged wake: no KV cache while the weights move.
    engine.resume_memory_occupation(["weights"])
    with pytest.raises(errors.AsleepError, match="before generate"):
        greedy(engine)
    stats = engine.update_weights(model, verify=True)
    assert not stats.planned and stats.wrong_elements == 0
    assert asleep - free_bytes() < held["weights"] + slack
    engine.wake_up()
    assert greedy(engine) == tokens and engine.weight_checksums() == checksums

    free = {}
    for cycle in range(cycles):
        engine.sleep()
        asleep = free_bytes()
        engine.resume_memory_occupation(["weights"])
        if cycle == 0:
            engine.resume_memory_occupation(["kv_cache", "cuda_graph"])
            with pytest.raises(errors.WeightsInconsistentError, match="call update_weights"):
                greedy(engine)
        stats = engine.update_weights(model)
        assert not stats.planned
        if cycle > 0:
            engine.wake_up()
        assert greedy(engine) == tokens
        free[cycle] = (asleep, free_bytes())
        if cycle == 1:
            print(f"update after a wake: bind {stats.bind_s * 1e3:.1f} ms, total {stats.total_s * 1e3:.1f} ms")
    assert engine.weight_checksums() == checksums
    print(f"free MiB asleep and awake: {[(a >> 20, b >> 20) for a, b in free.values()]}")
    for early, late in zip(free[1], free[cycles - 1], strict=True):
        assert early - late < slack, free

    # What the trainer has freed is free once the engine is asked for memory, though the engine had it mapped.
    weights = {name: tensor.full_tensor().detach() for name, tensor in model.state_dict().items()}
    before = free_bytes()
    mixed = in_expandable_segments(weights, 1)
    assert engine.update_weights(mixed, verify=True).wrong_elements == 0
    mixed.clear()
    pinned = before - free_bytes()
    engine.release_memory_occupation(["kv_cache"])
    gained = free_bytes() - before
    print(f"freed by the trainer but mapped by the engine: {pinned / 2**20:.1f} MiB")
    assert gained >= held["kv_cache"] - slack, (gained, held)
    mixed = in_expandable_segments(weights, 1)
    stats = engine.update_weights(mixed, verify=True)
    assert not stats.planned and stats.wrong_elements == 0
    mixed.clear()
    engine.wake_up()
    assert free_bytes() >= before - slack
    assert greedy(engine) == tokens and engine.weight_checksums() == checksums


def keep_mapped(trainer: Trainer) -> None:
    """What the engine keeps mapped need not be opened again, and is closed when the engine lacks memory to wake."""
    engine = trainer.engine
    weights = {n: t.detach() for n, t in trainer.make_model(OTHER).state_dict().items()}
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
    sizes = [tensor.numel() for tensor in weights.values()]
    parts = block[: sum(sizes)].split(sizes)
    source = {n: p.view_as(t).copy_(t) for (n, t), p in zip(weights.items(), parts, strict=True)}
    engine.update_weights(source)
    tokens, checksums = greedy(engine), engine.weight_checksums()
    for _ in range(3):
        engine.sleep()
        engine.resume_memory_occupation(["weights"])
        stats = engine.update_weights(source, verify=True)
        assert not stats.planned and stats.wrong_elements == 0 and stats.bind_s < 1e-4, stats
        engine.wake_up()
        assert greedy(engine) == tokens and engine.weight_checksums() == checksums

    engine.release_memory_occupation(["kv_cache"])
    before = torch.cuda.mem_get_info()[0]
    source.clear()
    del block, parts
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] - before < 1 << 29, "what is mapped is not free"
    hogs = take_all_memory((1 << 30, 64 << 20, 2 << 20))
    engine.resume_memory_occupation(["kv_cache"])
    hogs.clear()
    torch.cuda.empty_cache()
    assert greedy(engine) == tokens
    stats = engine.update_weights(weights, verify=True)
    assert not stats.planned and stats.wrong_elements == 0 and engine.weight_checksums() == checksums
