"""What `Fingerprint` must notice, on real modules, dicts and DTensors."""

import gc
import struct
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from spmd_engine.transfer import _native
from spmd_engine.transfer import fingerprint as fingerprint_module
from spmd_engine.transfer.fingerprint import Fingerprint


@pytest.fixture
def model(process_group):
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)))
    mesh = init_device_mesh("cpu", (1,))
    module[0].weight = nn.Parameter(distribute_tensor(module[0].weight.detach(), mesh, [Shard(0)]))
    return module


def take_fingerprint(source):
    tensors = source.state_dict(keep_vars=True) if isinstance(source, nn.Module) else source
    return Fingerprint(source, tensors.values())


def test_values_may_change(model):
    fingerprint = take_fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert fingerprint.holds(model) and fingerprint.holds(model)


def in_place(model):
    model[1][0].weight.data = model[1][0].weight.data.t()


def new_data(model):
    model[0].bias.data = torch.zeros(4)


def new_parameter(model):
    model[0].bias = nn.Parameter(model[0].bias.data)


def more_parameters(model):
    model[1].register_parameter("more", nn.Parameter(torch.zeros(1)))


def fewer_parameters(model):
    del model[0].bias


def new_buffer(model):
    model[1][1].running_mean = torch.zeros(4)


def new_module(model):
    model[1] = nn.Sequential(*model[1])


def renamed_module(model):
    model[1]._modules = dict(zip("ab", model[1]._modules.values(), strict=True))


def moved_parameter(model):
    model[1][0].register_parameter("bias", model[0]._parameters.pop("bias"))


def new_shard(model):
    model[0].weight._local_tensor = model[0].weight._local_tensor.clone()


def moved_shard(model):
    model[0].weight._local_tensor.data = torch.zeros(4, 4)


def dtype(model):
    model.to(torch.float16)


def none_for_a_parameter(model):
    model[0].bias = None


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        new_data,
        new_parameter,
        more_parameters,
        fewer_parameters,
        new_buffer,
        new_module,
        renamed_module,
        moved_parameter,
        new_shard,
        moved_shard,
        dtype,
        none_for_a_parameter,
    ],
)
def test_a_changed_module_is_noticed(model, change):
    fingerprint = take_fingerprint(model)
    assert fingerprint.holds(model)
    change(model)
    assert not fingerprint.holds(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda source: source.update(a=torch.zeros(2)),
        lambda source: source.update(c=torch.zeros(2)),
        lambda source: source.pop("a"),
        lambda source: source.update(c=source.pop("b")),
        lambda source: source.update(a=source["b"], b=source["a"]),
    ],
)
def test_a_changed_mapping_is_noticed(change):
    source = {"a": torch.zeros(2), "b": torch.zeros(3)}
    fingerprint = take_fingerprint(source)
    assert fingerprint.holds(source) and fingerprint.holds(dict(source))
    change(source)
    assert not fingerprint.holds(source)


def test_another_source_and_tensors_that_no_module_registers_are_never_recognised(model):
    fingerprint = take_fingerprint(model)
    assert (
        not fingerprint.holds(dict(model.state_dict()))
        and not fingerprint.holds(nn.Sequential(*model))
        and not fingerprint.holds(7)
    )
    assert not Fingerprint(model, [torch.zeros(2)]).holds(model)


def test_what_cannot_be_looked_at_is_never_recognised():
    scripted = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    assert not take_fingerprint(scripted).holds(scripted)
    strange = nn.Linear(2, 2)
    fingerprint = take_fingerprint(strange)
    strange._parameters["bias"] = "no tensor"
    assert not fingerprint.holds(strange) and not take_fingerprint(strange).holds(strange)
    on_meta = nn.Linear(2, 2, device="meta")
    assert not take_fingerprint(on_meta).holds(on_meta)
    without_parts = nn.Linear(2, 2)
    del without_parts.__dict__["_buffers"]
    with pytest.raises(TypeError, match="registers its parts in a dict"):
        _native.snapshot([without_parts], {}, torch.Tensor, DTensor)
    with pytest.raises(TypeError, match="no tensor is registered"):
        _native.snapshot([], {"a": 7}, torch.Tensor, DTensor)
    with pytest.raises(AttributeError, match="__dlpack_c_exchange_api__"):  # torch before 2.10
        _native.snapshot([], {}, int, DTensor)


def test_what_makes_updates_slow_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(fingerprint_module, "_warned", set())
    strange = nn.Linear(2, 2)
    fingerprint = take_fingerprint(strange)
    assert fingerprint.holds(strange) and not caplog.records
    strange._parameters["bias"] = "no tensor"
    for _ in range(3):
        assert not fingerprint.holds(strange)
    (record,) = caplog.records
    assert "describes all weights anew" in record.message and "no tensor is registered" in record.message
    Fingerprint(nn.Linear(2, 2), [torch.zeros(2)])
    assert "that no module registers" in caplog.records[-1].message
    monkeypatch.setattr(_native, "snapshot", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect is no strange module
        fingerprint.holds(strange)


def test_what_was_visited_may_be_gone():
    seen, visited = _native.snapshot([nn.Linear(2, 2)], {}, torch.Tensor, DTensor)
    gc.collect()
    _native.prefetch(visited)
    _native.prefetch(struct.pack("<4Q", 0, 1, 2**47, 2**64 - 1) + b"odd")
    assert len(visited) % 8 == 0 and seen != visited


def test_nothing_is_kept_alive():
    model = nn.Linear(2, 2)
    watched = [weakref.ref(model), weakref.ref(model.weight)]
    fingerprint = take_fingerprint(model)
    assert fingerprint.holds(model)
    other = nn.Linear(2, 2)
    del model
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    assert not fingerprint.holds(other)
