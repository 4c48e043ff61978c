"""Updates weights from shards on GPUs and elsewhere, and compares with what SGLang loads from a checkpoint."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from gpu.scenarios.common import (
    ON_GPU,
    OTHER,
    SAVED,
    Trainer,
    expandable_segments,
    in_expandable_segments,
    share_in_expandable_segments,
)
from integration.scenarios.common import greedy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from spmd_engine import errors

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def bit_for_bit(trainer: Trainer) -> None:
    """Weights moved in are bit for bit what SGLang loads from a checkpoint."""
    _move_away_and_back(trainer, is_expandable="expandable_segments:True" in os.environ.get(ALLOCATOR, ""))


def bit_for_bit_expandable(trainer: Trainer) -> None:
    """The same, while the trainer's memory is in expandable segments."""
    with expandable_segments():
        _move_away_and_back(trainer, is_expandable=True)


def _move_away_and_back(trainer: Trainer, *, is_expandable: bool) -> None:
    """Move other weights in, so that nothing is as loaded, and then those of the checkpoint."""
    engine = trainer.engine
    for seed in (OTHER, SAVED):
        model = trainer.make_sharded(seed)
        if ON_GPU:
            share = share_in_expandable_segments([shard.to_local() for shard in model.parameters()])
            assert share > 0.9 if is_expandable else share == 0, share
        first = engine.update_weights(model, verify=True)
        assert first.planned != trainer.has_plan and first.wrong_elements == 0 and first.device_s > 0
        trainer.has_plan = True
        again = engine.update_weights(model, verify=True)
        assert not again.planned and again.wrong_elements == 0 and again.bind_s < 1e-3
        checksums = engine.weight_checksums()
        same = [name for name, value in trainer.saved_checksums.items() if checksums[name] == value]
        if seed != SAVED:
            kept = [name for name in same if name.endswith(("weight", "bias"))]
            assert not kept, f"{len(kept)} of {len(checksums)} are as they were: {kept[:5]}"
    different = [name for name in trainer.saved_checksums if name not in same]
    assert not different, f"{len(different)} of {len(checksums)} differ: {different[:5]}"
    assert greedy(engine) == trainer.saved_tokens
    if trainer.replicas > 1:  # the engine of one has closed what the trainers of all others think it has open
        if dist.get_rank() == 0:
            engine.release_memory_occupation(["kv_cache"])
            engine.resume_memory_occupation(["kv_cache"])
        dist.barrier()
        stats = engine.update_weights(model, verify=True)
        assert not stats.planned and stats.wrong_elements == 0 and engine.weight_checksums() == checksums


def sources(trainer: Trainer) -> None:
    """Values, addresses and whole allocations change; casts happen on the way; what cannot be moved is refused."""
    engine = trainer.engine
    model = trainer.make_model(OTHER)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    first = engine.update_weights(weights, verify=True)
    expected = engine.weight_checksums()
    assert expected != trainer.saved_checksums
    before = engine.weight_version

    masters = {name: tensor.float() for name, tensor in weights.items()}
    assert engine.update_weights(masters, verify=True).wrong_elements == 0
    assert engine.weight_checksums() == expected

    # Values change in place: the plan and the opened handles serve again.
    torch._foreach_mul_(list(masters.values()), 2.0)
    stats = engine.update_weights(masters, verify=True)
    assert not stats.planned and stats.wrong_elements == 0
    doubled = engine.weight_checksums()
    assert doubled != expected

    # All memory is given back and taken again, as off-loading trainers do, some of it at the same addresses.
    kept = [{name: tensor / divisor for name, tensor in weights.items()} for divisor in (1, 2, 4)]
    wanted = []
    for source in kept:
        engine.update_weights(source)
        wanted.append(engine.weight_checksums())
    for checksums in wanted:
        saved = {name: tensor.cpu() for name, tensor in masters.items()}
        masters.clear()
        torch.cuda.empty_cache()
        masters = {name: tensor.cuda().div_(2) for name, tensor in saved.items()}
        stats = engine.update_weights(masters, verify=True)
        assert not stats.planned and stats.wrong_elements == 0
        assert engine.weight_checksums() == checksums

    # Expandable segments beside memory of cudaMalloc, mapped again at the same addresses with other values.
    for factor, same in ((1, expected), (2, doubled)):
        mixed = in_expandable_segments(weights, factor)
        stats = engine.update_weights(mixed, verify=True)
        assert not stats.planned and stats.wrong_elements == 0
        assert engine.weight_checksums() == same
        print(f"expandable segments: bind {stats.bind_s * 1e3:.1f} ms, total {stats.total_s * 1e3:.1f} ms")
        torch._foreach_zero_(list(mixed.values()))
        stats = engine.update_weights(mixed, verify=True)
        assert stats.wrong_elements == 0 and stats.bind_s < 1e-3
        assert engine.weight_checksums() not in (expected, doubled)
        mixed.clear()
        torch.cuda.empty_cache()

    # Off-loaded to the CPU, pinned or not, and cast on the way: through buckets, so small that they take turns.
    assert engine.weight_version == before + 12
    cpu = {name: tensor.cpu() for name, tensor in weights.items()}
    pinned = {name: tensor.pin_memory() for name, tensor in cpu.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPMD_ENGINE_BUCKET_BYTES", str(256 << 10))
        for source in (cpu, pinned, {name: tensor.float() for name, tensor in cpu.items()}):
            for verify in (True, False):
                engine.update_weights(kept[1])
                stats = engine.update_weights(source, verify=verify)
                assert stats.wrong_elements == (0 if verify else None) and stats.network_bytes == 0
                assert stats.staged_bytes == first.local_bytes and stats.local_bytes == stats.remote_bytes == 0
                assert engine.weight_checksums() == expected
            rate = stats.staged_bytes / stats.copy_s / 1e9
            print(f"off-loaded: copy {stats.copy_s * 1e3:.1f} ms, {rate:.1f} GB/s")
    # What this thread has queued to fill them comes first.
    torch.cuda._sleep(1 << 30)  # cycles: about half a second
    for name, tensor in pinned.items():
        tensor.copy_(kept[1][name], non_blocking=True)
    engine.update_weights(pinned)
    assert engine.weight_checksums() == wanted[1]

    version = engine.weight_version
    mixed = {name: tensor.cpu() if i == 3 else tensor for i, (name, tensor) in enumerate(weights.items())}
    with pytest.raises(errors.PlanError, match="must be on one device"):
        engine.update_weights(mixed)
    assert engine.weight_version == version
    assert engine.update_weights(weights, verify=True).wrong_elements == 0
    assert engine.weight_checksums() == expected
    greedy(engine)


def other_node(trainer: Trainer) -> None:
    """Two replicas, one on each node, and one trainer over both: NCCL between them, in buckets that take turns."""
    engine = trainer.engine
    model = trainer.make_sharded(OTHER)
    shards = {name: tensor.detach() for name, tensor in model.named_parameters()}
    whole = {name: tensor.full_tensor() for name, tensor in shards.items()}
    stats = engine.update_weights(whole, verify=True)
    assert stats.wrong_elements == 0 and stats.network_bytes == 0
    expected = engine.weight_checksums()
    assert expected != trainer.saved_checksums
    off_loaded = init_device_mesh("cpu", (dist.get_world_size(),))
    on_cpu = {
        name: DTensor.from_local(
            tensor.to_local().cpu(), off_loaded, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
        for name, tensor in shards.items()
    }
    for source in (shards, on_cpu):
        for verify in (True, False, False):
            engine.update_weights({name: tensor * 2 for name, tensor in whole.items()})
            assert engine.weight_checksums() != expected
            stats = engine.update_weights(source, verify=verify)
            assert stats.wrong_elements == (0 if verify else None)
            assert engine.weight_checksums() == expected
            needed = sum(tensor.nbytes for tensor in whole.values()) // 2
            assert needed <= stats.network_bytes < 1.05 * needed
        print(f"from another node: {stats.network_bytes / 1e6:.1f} MB in {stats.copy_s * 1e3:.1f} ms")
    greedy(engine)
