"""Names without those of the wrappers that trainers put around models."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from spmd_engine.errors import PlanError
from spmd_engine.trainer.names import checkpoint_names, join
from spmd_engine.trainer.sources import SourceReader

pytestmark = pytest.mark.usefixtures("process_group")
WRAPPERS = {
    "plain": lambda module: module,
    "compiled": torch.compile,
    "checkpointed": checkpoint_wrapper,
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp1": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    "fsdp1_original": lambda module: FullyShardedDataParallel(
        module, device_id=torch.device("cpu"), use_orig_params=True
    ),
}


class Model(nn.Module):
    """One of its own modules is called as DDP calls the module inside."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2, bias=False)


NAMES = {name for name, tensor in Model().state_dict().items() if tensor.is_floating_point()}


CHOICES = st.sampled_from(list(WRAPPERS))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(CHOICES, max_size=3, unique=True), st.lists(CHOICES, max_size=2, unique=True))
def test_wrappers_anywhere_leave_no_trace(outside, inside):
    model = Model()
    for wrapper in inside:
        model.module = WRAPPERS[wrapper](model.module)
    for wrapper in outside:
        model = WRAPPERS[wrapper](model)
    source = SourceReader(0).read(model)
    assert {weight.name for weight in source.layout.weights} == NAMES


def test_wrappers_in_a_mapping():
    weights = {
        "module._orig_mod.a.weight": torch.zeros(2),
        "module.a._fsdp_wrapped_module.module._checkpoint_wrapped_module.b": torch.ones(2),
    }
    assert [w.name for w in SourceReader(0).read(weights).layout.weights] == ["a.weight", "a.module.b"]
    assert list(checkpoint_names(["module.a", "b"], {}).values()) == ["module.a", "b"]
    assert join("", "a._orig_mod", "w") == "a.w"


class Lazy(Mapping):
    """Makes its tensors when they are asked for."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        return iter(self.names)

    def __getitem__(self, name):
        return torch.full((1000,), float(len(name)))


def test_a_mapping_may_make_its_tensors_on_access():
    reader = SourceReader(0)
    for _ in range(2):
        source = reader.read(Lazy(["a", "bb"]))
        assert [shard.data_ptr() for shard in source.shards] == source.addresses.tolist()
        assert [shard.unique().tolist() for shard in source.shards] == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a._orig_mod.w", "a.w"], r"'a._orig_mod.w' and 'a.w' are both 'a.w'"),
        (["q.base_layer.weight"], r"'q.base_layer.weight' belongs to a LoRA adapter.*merge_and_unload"),
        (["q.lora_A.default.weight", "q.weight"], r"'q.lora_A.default.weight' belongs to a LoRA adapter"),
    ],
)
def test_refusals_name_the_weight(names, match):
    with pytest.raises(PlanError, match=match):
        SourceReader(0).read({name: torch.zeros(2) for name in names})


def test_the_user_has_the_last_word_on_a_name():
    names = ["policy._orig_mod.layers.0.w", "policy.norm"]
    renamed = checkpoint_names(names, {}, lambda name: name.replace("policy.", "model."))
    assert renamed == dict(zip(names, ["model.layers.0.w", "model.norm"], strict=True))
    with pytest.raises(PlanError, match=r"'policy\.norm' are both 'same' after rename"):
        checkpoint_names(names, {}, lambda name: "same")
    for nothing in (None, ""):
        with pytest.raises(PlanError, match=r"rename must return a name for weight 'policy\._orig_mod\.layers\.0\.w'"):
            checkpoint_names(names, {}, lambda name, found=nothing: found)
