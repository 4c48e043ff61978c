"""The trainers that `update_weights` understands: what every rank holds, against what torch says."""

from __future__ import annotations

import ctypes
import random
from itertools import product
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from integration.scenarios.common import greedy
from spmd_engine.errors import PlanError
from spmd_engine.planning.layout import boxed_shape, local_box
from spmd_engine.trainer.sources import SourceReader

CPU = torch.device("cpu")
HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm = nn.BatchNorm1d(width, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(self.up(x).relu()))


class Model(nn.Module):
    """An embedding, blocks, and a head that may be tied to the embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        width, vocabulary = draw.randint(1, 9), draw.randint(2, 13)
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, draw.randint(1, 11)) for _ in range(draw.randint(1, 3)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if draw.random() < 0.5:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """All whole weights of a plain model, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_shards(
    context: Any, module: Any, full: dict[str, torch.Tensor], reader: SourceReader | None = None
) -> set[str]:
    """The memory that a source names holds the boxes of `full` that its layout says; returns the optional names."""
    source = (reader or SourceReader(context.rank)).read(module)
    described: list[Any] = [None] * context.world
    dist.all_gather_object(described, [source.layout.plain(), sorted(source.optional)])
    assert all(other == described[0] for other in described), described
    wanted = {name for name, tensor in full.items() if tensor.is_floating_point()}
    assert {weight.name for weight in source.layout.weights} == wanted
    for weight, address in zip(source.layout.weights, source.addresses.tolist(), strict=True):
        whole = full[weight.name]
        assert (weight.shape, weight.dtype) == (tuple(whole.shape), str(whole.dtype).removeprefix("torch."))
        if weight.mesh >= 0:
            box = local_box(weight.shape, source.layout.meshes[weight.mesh], weight.placements, context.rank)
            at = tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
            whole = whole.reshape(boxed_shape(weight.shape, weight.placements))[at]
        expected = whole.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert (ctypes.string_at(address, len(expected)) if expected else b"") == expected, weight
    return set(source.optional)


def unsharded(module: FSDP) -> dict[str, torch.Tensor]:
    """What FSDP itself gathers."""
    with FSDP.summon_full_params(module, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): t.detach().clone() for name, t in module.state_dict().items()
        }


def fsdp1(context: Any) -> None:
    """Every strategy, with original parameters and without, through the states of a training step."""
    for seed in range(24):
        draw = random.Random(seed)
        strategy = draw.choice(list(ShardingStrategy))
        model = Model(seed)
        full, tied = values(model), model.head.weight is model.embed.weight
        mesh = init_device_mesh("cpu", (2, 2) if strategy in HYBRID else (context.world,))
        kwargs: dict[str, Any] = {
            "sharding_strategy": strategy,
            "use_orig_params": draw.random() < 0.5,
            "auto_wrap_policy": ModuleWrapPolicy(
                draw.choice([{Block}, {Block, nn.BatchNorm1d}, set() if tied else {nn.Linear}, set()])
            ),
            "device_id": CPU,
        }
        if strategy in HYBRID and draw.random() < 0.5:
            kwargs["process_group"] = (mesh.get_group(1), mesh.get_group(0))
        else:
            kwargs["device_mesh"] = mesh
        if draw.random() < 0.5:
            kwargs["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16)
        if kwargs["use_orig_params"]:
            model.blocks[0].requires_grad_(False)  # frozen weights move like others
        trainer = FSDP(model, **kwargs)
        reader = SourceReader(context.rank)
        assert ("head.weight" in check_shards(context, trainer, full, reader)) == tied
        unchanged = reader.read(trainer)
        tokens = torch.tensor([0, 1, 1])
        trainer.eval()
        with torch.no_grad():
            trainer(tokens)
        check_shards(context, trainer, full, reader)
        optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.1)
        loss = trainer(tokens).float().square().sum()
        check_shards(context, trainer, full, reader)  # some units are unsharded between forward and backward
        loss.backward()
        check_shards(context, trainer, full, reader)
        optimizer.step()
        optimizer.zero_grad()
        stepped = unsharded(trainer)
        assert not torch.equal(stepped["embed.weight"], full["embed.weight"])
        check_shards(context, trainer, stepped, reader)
        assert reader.read(trainer) is unchanged  # through all of it, without a new description
        handle = trainer._handle
        handle.flat_param_to("cpu", copy=True)  # as off-loading and bringing back does
        handle.flat_param._local_shard = handle.flat_param.data
        check_shards(context, trainer, stepped, reader)
        assert reader.read(trainer) is not unchanged
    fsdp1_refusals(context)


def fsdp1_refusals(context: Any) -> None:
    reader = SourceReader(context.rank)
    for original in (False, True):
        trainer = FSDP(Model(1), use_orig_params=original, device_id=CPU)
        trainer(torch.tensor([0, 1, 1])).sum().backward()
        reader.read(trainer)
        with FSDP.summon_full_params(trainer):
            with pytest.raises(PlanError, match=r"'embed.weight'.*summon_full_params.*after leaving it"):
                reader.read(trainer)
        reader.read(trainer)
        flat = trainer._handle.flat_param
        if original:
            kept = trainer._handle.flat_param._params[0]
            if kept.numel():
                kept.data = kept.data.clone()
                with pytest.raises(PlanError, match=r"'embed.weight' was given new .data"):
                    reader.read(trainer)
        else:
            flat.data = flat.data.clone()
            with pytest.raises(PlanError, match=r"'embed.weight'.*set flat_param._local_shard"):
                reader.read(trainer)
            flat._local_shard = flat.data
            reader.read(trainer)
    shards, _ = dist.new_subgroups_by_enumeration([[0, 3], [1, 2]])
    replicas, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    hybrid = FSDP(
        nn.Linear(3, 4),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        process_group=(shards, replicas),
        device_id=CPU,
    )
    with pytest.raises(PlanError, match="not spaced evenly: give FSDP a two-dimensional device_mesh"):
        reader.read(hybrid)
    turned = nn.Linear(3, 4)
    turned.weight = nn.Parameter(torch.randn(3, 4).t())
    with pytest.raises(PlanError, match="'weight' was not contiguous"):
        reader.read(FSDP(turned, device_id=CPU))


def fsdp2(context: Any) -> None:
    """FSDP2, HSDP and FSDP2 over tensor parallelism, with uneven sizes; then DTensors that torch itself distributes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    for seed in range(24):
        draw = random.Random(seed)
        model = Model(seed)
        full, tied = values(model), model.head.weight is model.embed.weight
        data = [init_device_mesh("cpu", (4,)), mesh, mesh["outer"]][seed % 3]
        if seed % 3 == 2:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            for block in model.blocks:
                parallelize_module(block, mesh["inner"], {name: plan[name] for name in draw.sample(sorted(plan), 2)})
        for block in model.blocks:
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)
        reader = SourceReader(context.rank)
        assert ("head.weight" in check_shards(context, model, full, reader)) == tied
        unchanged = reader.read(model)
        assert [mesh.shape for mesh in unchanged.layout.meshes] == [(2, 2) if seed % 3 else (4,)]
        assert reader.read(model) is unchanged
    distributed_by_torch(context, mesh)


def distributed_by_torch(context: Any, mesh: Any) -> None:
    kinds = [TorchShard(0), TorchShard(-1), TorchReplicate(), _StridedShard(0, split_factor=2)]
    for size in range(1, 14):
        full = torch.arange(float(size * 3)).view(size, 3)
        for placements in product(kinds, [TorchShard(0), TorchShard(1), TorchReplicate()]):
            tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
            if isinstance(placements[0], _StridedShard) and placements[1] != TorchShard(0):
                with pytest.raises(PlanError, match=r"weight 'w' has the placement .*2\), .* not supported"):
                    SourceReader(context.rank).read({"w": tensor})
            else:
                check_shards(context, {"w": tensor}, {"w": full})


# ---- into a running engine ----


def layers_of(model: nn.Module) -> ModuleWrapPolicy:
    return ModuleWrapPolicy({type(model.model.layers[0])})


def fsdp1_full(model: nn.Module) -> nn.Module:
    return FSDP(model, auto_wrap_policy=layers_of(model), device_id=CPU)


def fsdp1_hybrid(model: nn.Module) -> nn.Module:
    kwargs: dict[str, Any] = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "use_orig_params": True}
    mesh = init_device_mesh("cpu", (2, 2))
    return FSDP(model, auto_wrap_policy=layers_of(model), device_mesh=mesh, device_id=CPU, **kwargs)


def wrapped(model: nn.Module) -> nn.Module:
    """FSDP1 around activation checkpointing and torch.compile, compiled once more."""
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = FSDP(checkpoint_wrapper(torch.compile(layer)), device_id=CPU, use_orig_params=True)
    return torch.compile(FSDP(model, device_id=CPU, use_orig_params=True))  # type: ignore[return-value]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    column = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    row = ("self_attn.o_proj", "mlp.down_proj")
    plan = {**{name: ColwiseParallel() for name in column}, **{name: RowwiseParallel() for name in row}}
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tensor"], plan)
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


KINDS = [fsdp1_full, fsdp1_hybrid, wrapped, ddp, hsdp, fsdp2_tensor_parallel]


def update(context: Any, name: str, path: str, tp: int) -> dict[str, Any]:
    """One engine that gets the same weights from trainers of all kinds, and other weights in between."""
    other = models.make_model(name, seed=3)
    with context.engine(path, tp) as engine:
        engine.update_weights(models.make_model(name, seed=2))
        expected = engine.weight_checksums()
        for kind in KINDS:
            engine.update_weights(other)
            assert engine.weight_checksums() != expected, kind
            trainer = kind(models.make_model(name, seed=2))
            first = engine.update_weights(trainer, verify=True)
            assert first.wrong_elements == 0 and first.fallback_weights == (), kind
            assert engine.weight_checksums() == expected, kind
            assert not engine.update_weights(trainer).planned, kind
        tokens = greedy(engine)
        stepped(context, engine, name)
        return {"checksums": expected, "tokens": tokens}


def stepped(context: Any, engine: Any, name: str) -> None:
    """float32 masters in FSDP1, stepped by an optimizer, arrive as FSDP itself gathers them."""
    model = models.make_model(name, seed=2, dtype=torch.float32)
    policy, precision = layers_of(model), MixedPrecision(param_dtype=torch.bfloat16)
    trainer = FSDP(model, auto_wrap_policy=policy, mixed_precision=precision, use_orig_params=True, device_id=CPU)
    engine.update_weights(trainer)
    before = engine.weight_checksums()
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.01)
    trainer(torch.tensor([[1, 2, 3, 4]])).logits.float().square().mean().backward()
    optimizer.step()
    update = engine.update_weights(trainer, verify=True)
    assert not update.planned and update.wrong_elements == 0
    after = engine.weight_checksums()
    assert after != before
    whole = unsharded(trainer)
    del whole["lm_head.weight"]  # tied: a copy is a weight of its own, which the engine does not know
    engine.update_weights(whole)
    assert engine.weight_checksums() == after
