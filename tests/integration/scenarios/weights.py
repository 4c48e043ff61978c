"""Moving weights."""

from __future__ import annotations

import ctypes
import random
import re
import time
from itertools import cycle
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist

from integration.scenarios import failures
from integration.scenarios.common import greedy, shard
from spmd_engine import LinkSpeeds, UpdateStats, errors

STEPS = 30
# Models whose experts transformers stacks.
FUSED = ("qwen3_moe", "mixtral", "deepseek_v2")


def unmapped_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory is no longer there, as after a free."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, ctypes.c_size_t(tensor.nbytes), 3, 0x22, -1, 0)
    memory = (ctypes.c_char * tensor.nbytes).from_address(address)
    gone = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    assert libc.munmap(address, tensor.nbytes) == 0
    return gone


def reference(context: Any, path: str, tp: int, generates: bool) -> dict[str, Any]:
    """An engine that loaded its weights from disk: checksums and greedy tokens."""
    with context.engine(path, tp) as engine:
        return {"checksums": engine.weight_checksums(), "tokens": greedy(engine) if generates else None}


def update(
    context: Any, name: str, path: str, tp: int, generates: bool, replicate: bool = False, strided: bool = False
) -> dict[str, Any]:
    """Start from other weights, move the sharded model in, sleep and wake, and report like `reference`."""
    with context.engine(path, tp, strided=strided, enable_memory_saver=True) as engine:
        before = engine.weight_checksums()
        model = models.make_model(name, seed=2)
        if not replicate:
            shard(model, context.world)
        report = engine.explain(model)
        first = engine.update_weights(model, verify=True)
        assert first.planned and first.wrong_elements == 0
        assert (first.record_s == 0) == (name in FUSED)  # recorded before the update
        expected = {"local": first.local_bytes, "nvlink": first.remote_bytes, "staged": 0, "network": 0}
        assert report.bytes_of(context.rank) == expected and tuple(report.fallback) == first.fallback_weights
        assert engine.weight_version == first.weight_version == 1
        second = engine.update_weights(model, verify=True)
        assert not second.planned and second.record_s == 0 and second.wrong_elements == 0
        assert second.weight_version == 2
        after = engine.weight_checksums()
        assert after.keys() == before.keys() and after != before
        # What the model derives from its weights, or computes while it loads, is there again, too.
        engine.sleep()
        engine.wake_up()
        assert engine.weight_checksums() != after
        assert engine.update_weights(model, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == after
        tokens = greedy(engine) if generates else None
        return {
            "tp_rank": engine.tp_rank,
            "checksums": after,
            "tokens": tokens,
            "local": first.local_bytes,
            "remote": first.remote_bytes,
            "fallback": first.fallback_weights,
            "report": report.to_dict(),
        }


def expert_parallel(context: Any, path: str, other: str) -> dict[str, Any]:
    """An engine whose ranks hold whole experts, as the trainer's `Shard(0)` of fused experts does."""
    with context.engine(path, context.world, ep_size=context.world) as engine:
        model = shard(models.make_model("qwen3_moe", seed=2), context.world)
        report = engine.explain(model)
        stats = engine.update_weights(model, verify=True)
        assert stats.wrong_elements == 0 and stats.fallback_weights == ()
        assert report.bytes_of(context.rank)["local"] == stats.local_bytes
        assert stats.remote_bytes * 20 < stats.local_bytes  # with TP alone, half of each expert would cross
        moved = engine.weight_checksums()
    with context.engine(other, context.world, ep_size=context.world) as engine:
        assert engine.weight_checksums() == moved
    return report.to_dict()


def explain(context: Any, path: str) -> dict[str, Any]:
    """A report says what an update will move, and leaves the engine as it is. Two replicas over one FSDP world."""
    with context.engine(path, 2, enable_memory_saver=True) as engine:
        start, tokens = engine.weight_checksums(), greedy(engine)
        model = shard(models.make_model("gemma", seed=2), context.world)
        report = engine.explain(model, speeds=LinkSpeeds(nvlink=1e6))
        assert engine.weight_checksums() == start and greedy(engine) == tokens
        assert engine.stats().updates == engine.weight_version == 0

        def as_moved() -> UpdateStats:
            stats = engine.update_weights(model, verify=True)
            expected = {"local": stats.local_bytes, "nvlink": stats.remote_bytes, "staged": 0, "network": 0}
            assert report.bytes_of(context.rank) == expected and stats.wrong_elements == 0
            assert tuple(report.fallback) == stats.fallback_weights != ()
            return stats

        assert as_moved().planned
        moved = engine.weight_checksums()
        assert moved != start
        assert engine.explain(model, speeds=report.speeds).to_dict() == report.to_dict()
        assert engine.weight_checksums() == moved
        assert not as_moved().planned

        weights = {name: tensor.detach() for name, tensor in models.make_model("gemma", seed=2).state_dict().items()}
        whole = engine.explain(weights)
        assert whole.bytes["nvlink"] == 0 and whole.bytes["local"] == sum(report.bytes.values()) // 2
        norm = "model.norm.weight"
        for source, match in (
            ({k: v for k, v in weights.items() if k != norm}, r"no weight for model\.norm\.weight"),
            ({**weights, "model.extra.weight": torch.zeros(4)}, r"weight .?model\.extra\.weight"),
            ({**weights, norm: weights[norm].to(torch.int8)}, "norm.weight' is torch.int8"),
        ):
            with pytest.raises(errors.PlanError, match=match):
                engine.explain(source)
        mine = weights if context.rank % 2 == 0 else {k: v.float() for k, v in weights.items()}
        with pytest.raises(errors.CollectiveMismatchError, match="different calls"):
            engine.explain(mine)
        engine.release_memory_occupation(["weights"])
        with pytest.raises(errors.AsleepError, match="before explain"):
            engine.explain(model)
        return report.to_dict()


def racing_steps(context: Any, path: str, shape: dict[str, int]) -> None:
    """Ranks step their optimizers as late before an update, and as early after it, as they can.

    Each step adds a half to all weights or takes it away again, exactly: an update that reads a shard too early or too
    late shows in the checksums.
    """
    with context.engine(path, context.world) as engine:
        model = models.make_model("llama", seed=2, dtype=torch.float32, **shape)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 1024).round() / 1024)
        shard(model, context.world)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        signs = cycle((-0.5, 0.5))

        def step() -> None:
            sign = next(signs)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, sign)
            optimizer.step()

        engine.update_weights(model, verify=True)
        before = engine.weight_checksums()
        step()
        engine.update_weights(model, verify=True)
        expected = engine.weight_checksums()
        assert expected != before
        dist.barrier()
        step()
        together = random.Random(5)
        for number in range(STEPS):
            late_before, late_after = together.randrange(context.world), together.randrange(context.world)
            if context.rank == late_before:
                time.sleep(together.uniform(0.0, 0.01))
            else:
                together.random()
            step()
            stats = engine.update_weights(model, verify=number % 4 == 0)
            if context.rank != late_after:
                step()
            assert engine.weight_checksums() == expected, f"update {number}"
            if context.rank == late_after:
                step()
            assert not stats.planned and not stats.wrong_elements


def without_actor(name: str) -> str:
    return name.removeprefix("actor.")


def update_sources(context: Any, path: str, other: str) -> dict[str, Any]:
    """What a source may be, and what it may not: refusals leave the engine alive with its old weights."""
    with context.engine(path, context.world) as engine:
        start = engine.weight_checksums()
        model = models.make_model("qwen2", seed=2)
        expected = {}

        # A mapping of plain tensors; float32 masters are cast on the way, to what torch's cast gives.
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        engine.update_weights(weights, verify=True)
        expected = engine.weight_checksums()
        assert expected != start
        # Under names of the trainer's own.
        renamed = {f"actor.{name}": tensor for name, tensor in weights.items()}
        with pytest.raises(errors.PlanError, match=r"the source has no weight for"):
            engine.update_weights(renamed)
        stats = engine.update_weights(renamed, rename=without_actor, verify=True)
        assert stats.wrong_elements == 0 and not stats.planned
        assert engine.explain(renamed, rename=without_actor).bytes["local"] == stats.local_bytes * context.world
        masters = {name: tensor.float() for name, tensor in weights.items()}
        assert engine.update_weights(masters, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == expected
        halves = {name: (tensor * 3).half() for name, tensor in weights.items()}
        assert engine.update_weights(halves, verify=True).wrong_elements == 0
        assert engine.weight_checksums() != expected

        # FSDP2 float32 masters, stepped by an optimizer: addresses stay, contents change, the plan is reused.
        trainer = shard(models.make_model("qwen2", seed=2, dtype=torch.float32), context.world)
        assert engine.update_weights(trainer, verify=True).planned
        from_shards = engine.weight_checksums()
        # After a forward without backward FSDP2 leaves its root unsharded: some weights are whole on every rank.
        with torch.no_grad():
            trainer(torch.tensor([[1, 2, 3, 4]]))
        assert engine.update_weights(trainer, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == from_shards
        optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.01)
        loss = trainer(torch.tensor([[1, 2, 3, 4]])).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        stepped = engine.update_weights(trainer, verify=True)
        assert not stepped.planned and stepped.wrong_elements == 0
        assert engine.weight_checksums() != expected

        # Memory that moved between updates is noticed.
        moved = {name: tensor.clone() for name, tensor in weights.items()}
        result = engine.update_weights(moved, verify=True)
        assert not result.planned and result.wrong_elements == 0
        assert engine.weight_checksums() == expected
        version = engine.weight_version

        # Refusals.
        def refused(source: Any, match: str, kind: type[Exception] = errors.PlanError) -> None:
            with pytest.raises(kind, match=match):
                engine.update_weights(source)
            assert engine.weight_version == version
            assert greedy(engine) == tokens

        tokens = greedy(engine)
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        refused({k: v for k, v in weights.items() if k != q_proj}, r"qkv_proj\.weight")
        refused({k: v for k, v in weights.items() if k != "model.norm.weight"}, r"model\.norm\.weight")
        refused({**weights, "model.extra.weight": torch.zeros(4)}, "does not know weight 'model.extra.weight'")
        wide = torch.zeros(weights[q_proj].shape[0] * 2, weights[q_proj].shape[1], dtype=torch.bfloat16)
        refused({**weights, q_proj: wide}, "q_proj")
        refused({**weights, "model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)}, r"model\.norm\.weight")
        refused({**weights, q_proj: weights[q_proj].to(torch.int8)}, "q_proj.weight' is torch.int8")
        refused({**weights, q_proj: weights[q_proj].t()}, "not contiguous")
        refused({**weights, q_proj: weights[q_proj].to("meta")}, "meta device")
        refused({}, "holds no weights")
        refused([weights], "an nn.Module or a mapping")
        # Another layout than the peer's: refused on both, by name.
        norm = "model.norm.weight"
        for other, how in (
            (weights[norm].float(), "is bfloat16 [64] on rank 0, and float32 [64] on rank 1"),
            (weights[norm][:32], "is bfloat16 [64] on rank 0, and bfloat16 [32] on rank 1"),
            (None, "is bfloat16 [64] on rank 0, and missing on rank 1"),
            (weights[norm].to(torch.int8), "is torch.int8"),  # one that only this rank refuses
        ):
            mine = dict(weights)
            if context.rank == 1:
                mine[norm] = other
            mine = {name: tensor for name, tensor in mine.items() if tensor is not None}
            refused(mine, rf"weight '{norm}' {re.escape(how)}", errors.CollectiveMismatchError)
        assert engine.weight_checksums() == expected

        # Shards of one rank that are gone: an error on both, no tokens from a mixture, and the next update heals it.
        broken = {**weights, q_proj: unmapped_like(weights[q_proj]) if context.rank == 1 else weights[q_proj]}
        with pytest.raises(errors.TransferError, match="rank 1 could not read a shard"):
            engine.update_weights(broken)
        with pytest.raises(errors.WeightsInconsistentError, match=f"weight version {version + 1} failed half-way"):
            greedy(engine)
        # `moved` is where the last committed update read from, so nothing seems to have moved since.
        engine.update_weights(moved)
        assert engine.weight_checksums() == expected and greedy(engine) == tokens
        with pytest.raises(errors.PlanError, match="does not know"):
            engine.update_weights(
                {"model.aaa.weight": torch.zeros(4), **models.make_model("qwen2", seed=3).state_dict()}
            )
        assert engine.update_weights(moved, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == expected

        # Ctrl-C in the middle ends the engine rather than leaving half a message behind.
        failures.interrupted(context, engine, lambda: failures.long_rollout(engine))
        return {}
