"""Ranks on several nodes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from integration.scenarios.common import greedy, shard
from integration.scenarios.weights import unmapped_like
from spmd_engine import errors
from spmd_engine.transfer import _native


def update(
    context: Any,
    path: str,
    tp: int,
    config: dict[str, Any],
    before_end: Callable[[Any], dict[str, Any]] = lambda engine: {},
) -> dict[str, Any]:
    """Start from other weights, and move shards in that are spread over both nodes."""
    with context.engine(path, tp) as engine:
        model = shard(models.make_model("qwen2", seed=2, **config), context.world)
        report = engine.explain(model)
        first = engine.update_weights(model, verify=True)
        assert first.planned and first.wrong_elements == 0
        again = engine.update_weights(model, verify=True)
        assert not again.planned and again.wrong_elements == 0
        rows = [p for name, p in model.named_parameters() if "o_proj" in name or "down_proj" in name]
        return {
            "checksums": engine.weight_checksums(),
            "tokens": greedy(engine),
            "explained": report.network.sum(axis=1).tolist(),
            "network_bytes": again.network_bytes,
            "staged_bytes": again.staged_bytes,
            "model_bytes": sum(p.nbytes for p in model.parameters()),
            "row_parallel_bytes": sum(p.nbytes for p in rows),
            **before_end(engine),
        }


def sources(context: Any, path: str) -> dict[str, Any]:
    """Two replicas, one on each node, and one trainer over both. Buckets are small, so updates take many steps."""
    os.environ["SPMD_ENGINE_BUCKET_BYTES"] = "8192"
    with context.engine(path, 2, enable_memory_saver=True) as engine:

        def update(source: Any, **expected: Any) -> Any:
            stats = engine.update_weights(source, verify=True)
            assert stats.wrong_elements == 0
            assert {name: getattr(stats, name) for name in expected} == expected
            return stats, engine.weight_checksums()

        models_of = {seed: shard(models.make_model("qwen2", seed=seed), context.world) for seed in (2, 3)}
        first, checksums = update(models_of[2], planned=True)
        _, others = update(models_of[3], planned=False)  # the same layout elsewhere: bound anew, not planned
        assert others != checksums
        assert update(models_of[2], planned=False)[1] == checksums

        with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.ConfigError, match="4096 or more, is '9'"):
            patch.setenv("SPMD_ENGINE_BUCKET_BYTES", "9")
            engine.update_weights(models_of[2])

        # What the engine would round anyway is rounded before it travels.
        wide = shard(models.make_model("qwen2", seed=2).float(), context.world)
        _, found = update(wide, planned=True, network_bytes=first.network_bytes)
        assert found == checksums

        # Replicated over the nodes, sharded inside them: everything is near.
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        near = fully_shard(models.make_model("qwen2", seed=2), mesh=mesh)
        assert update(near, planned=True, network_bytes=0, staged_bytes=0)[1] == checksums

        # A refusal reaches all ranks, and the old weights serve.
        tokens = greedy(engine)
        parts = dict(models_of[3].named_parameters())
        parts.pop("model.norm.weight")
        with pytest.raises(errors.PlanError, match=r"no weight for model\.norm\.weight"):
            engine.update_weights(parts)
        assert greedy(engine) == tokens

        # A shard that cannot be read is noticed before anything moves.
        name = "model.layers.0.self_attn.q_proj.weight"
        whole = dict(models_of[2].named_parameters())
        local = whole[name].to_local()
        gone = unmapped_like(local) if context.rank == 3 else local
        broken = {**whole, name: DTensor.from_local(gone, whole[name].device_mesh, whole[name].placements)}
        with pytest.raises(errors.TransferError, match="rank 3 could not read a shard"):
            engine.update_weights(broken)
        assert greedy(engine) == tokens

        # A step that fails stops all ranks after it; the next update heals the mixture.
        update(models_of[3])
        with (
            packing_that_fails(at=3 if context.rank == 3 else 0),
            pytest.raises(errors.TransferError, match=r"of rank 3 .*no disk"),
        ):
            engine.update_weights(models_of[2])
        with pytest.raises(errors.WeightsInconsistentError, match="failed half-way"):
            greedy(engine)
        assert update(models_of[2])[1] == checksums
        update(wide, planned=True)  # no plan goes on with what may be broken
        assert update(models_of[2], planned=False)[1] == checksums

        # Asleep, the memory of the weights goes; plans and buckets stay good.
        engine.release_memory_occupation(["weights"])
        engine.resume_memory_occupation(["weights"])
        assert update(models_of[2], planned=False)[1] == checksums
        assert greedy(engine) == tokens

        death(context, engine, models_of[2])
        assert greedy(engine) == tokens
    return {}


@contextlib.contextmanager
def packing_that_fails(at: int) -> Iterator[None]:
    """This rank's packing fails at that bucket; at none if it is 0."""
    copy_cpu, count = _native.copy_cpu, itertools.count(1)

    def copy_or_fail(*args: Any, **kwargs: Any) -> _native.CopyStats:
        if next(count) == at:
            raise _native.TableError("there is no disk in the drive")
        return copy_cpu(*args, **kwargs)

    _native.copy_cpu = copy_or_fail
    try:
        yield
    finally:
        _native.copy_cpu = copy_cpu


def death(context: Any, engine: Any, model: Any) -> None:
    """A scheduler process of the other node is killed while weights travel. Linked replicas restart together."""
    dist.barrier()
    if context.rank == 3:
        threading.Timer(0.3, os.kill, (engine.scheduler_pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(errors.SchedulerDiedError) as caught:
        while True:
            engine.update_weights(model)
    assert caught.value.rank == 3 and time.monotonic() - began < 10.3
    dist.barrier()
    engine.restart()
    assert engine.update_weights(model, verify=True).wrong_elements == 0


def update_and_cut_off(context: Any, path: str, config: dict[str, Any], on_ray: bool = False) -> None:
    """What `update` does, and then a node is cut off while the ranks work.

    Every rank leaves what it got, and when, in the directory: those that are cut off can tell nobody else. No rank may
    wait for another one but in calls of the engine.
    """
    values = update(context, path, context.world, config, before_end=lambda engine: _until_cut_off(context, engine))
    target = context.directory / f"rank{context.rank}.json"
    error = values.pop("error")
    values["failure"] = {"rank": error.rank, "message": str(error), "at": time.time()}
    target.with_suffix(".part").write_text(json.dumps(values))
    target.with_suffix(".part").rename(target)
    if on_ray:
        raise error
    os._exit(0)  # at once: rank 0's store may be out of reach


def _until_cut_off(context: Any, engine: Any) -> dict[str, Any]:
    tokens = greedy(engine)
    (context.directory / f"ready{context.rank}").touch()
    try:
        while True:
            assert greedy(engine) == tokens
    except errors.SchedulerDiedError as error:
        return {"error": error}
