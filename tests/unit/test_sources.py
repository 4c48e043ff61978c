"""Describing sources, on this process alone; several ranks are in the integration tests."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard

from spmd_engine.control import codec
from spmd_engine.errors import CollectiveTimeoutError, PlanError, SchedulerDiedError
from spmd_engine.planning.layout import Mesh, Shard
from spmd_engine.trainer.rendezvous import Rendezvous, bounded, node_identity
from spmd_engine.trainer.sources import SourceReader, ranks_of
from spmd_engine.transfer.handles import NOWHERE, Exporter, ShardMemory

pytestmark = pytest.mark.usefixtures("process_group")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def test_a_module_has_parameters_buffers_and_second_names():
    source = SourceReader(0).read(Model())
    assert {w.name for w in source.layout.weights} == {"embed.weight", "scale", "head.weight"}
    assert source.optional == {"scale", "head.weight"}
    assert source.device is None


def test_dtensors_are_described_by_their_placements():
    mesh = init_device_mesh("cpu", (1,))
    weights = {"w": distribute_tensor(torch.randn(4, 4), mesh, [TorchShard(-2)]), "p": torch.randn(2)}
    source = SourceReader(0).read(weights)
    sharded, plain = source.layout.weights
    assert (sharded.mesh, sharded.placements) == (0, (Shard(0),)) and plain.mesh == -1
    assert source.layout.meshes == (Mesh((1,), (0,)),)
    assert int(source.addresses[0]) == weights["w"].to_local().data_ptr()
    assert ranks_of(weights) == {0}


def test_the_same_source_is_recognised_and_a_moved_one_is_not():
    reader, model = SourceReader(0), Model()
    first = reader.read(model)
    second = reader.read(model)
    assert second.layout is first.layout and second.addresses is first.addresses
    model.scale = model.scale.clone()
    moved = reader.read(model)
    assert moved.layout is first.layout and not np.array_equal(moved.addresses, first.addresses)
    model.scale = torch.zeros(5)
    assert reader.read(model).layout is not first.layout


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda mesh: {"w": torch.zeros(2, dtype=torch.int8)}, "'w' is torch.int8"),
        (lambda mesh: {"w": torch.zeros(2, device="meta")}, "'w' is on the meta device"),
        (lambda mesh: {"w": torch.zeros(2, 3).t()}, "'w' is not contiguous"),
        (lambda mesh: {"w": [1.0]}, "'w' maps to list"),
        (lambda mesh: {}, "holds no weights"),
        (lambda mesh: 7, "got int"),
        (lambda mesh: {"w": DTensor.from_local(torch.zeros(2), mesh, [Partial()])}, "'w' has the placement"),
    ],
)
def test_refusals_name_the_weight(make, match):
    with pytest.raises(PlanError, match=match):
        SourceReader(0).read(make(init_device_mesh("cpu", (1,))))


def test_shard_memory_crosses_a_link():
    memory = ShardMemory(
        device="GPU-1",
        pid=7,
        handles=(b"a" * 64, b"b" * 64),
        chunks=((), (4096, 8192)),
        allocation=np.array([0, NOWHERE, 1], np.uint32),
        offset=np.array([8, 0, 16], np.uint64),
        offered_at="name/token",
    )
    received = codec.decode(codec.encode(memory), ShardMemory)
    assert received.same_as(memory)
    assert (received.chunks, received.offered_at) == (memory.chunks, "name/token")
    for part in ({"handles": memory.handles[:1]}, {"offset": memory.offset[:1]}, {"allocation": memory.offset}):
        with pytest.raises(codec.DecodeError):
            codec.decode(codec.encode({**vars(memory), **part}), ShardMemory)
    assert not memory.same_as(None)
    assert Exporter().export(np.array([1, 2], np.uint64), np.array([4, 4], np.uint64), device=None).is_cpu


def test_rendezvous_of_two_ranks_and_of_a_rank_that_never_comes():
    met = []
    ranks = (0, 5)
    points = [Rendezvous(ranks, rank, "pair") for rank in ranks]  # the second "rank" is a thread of this process
    thread = threading.Thread(target=lambda: met.append(points[1].meet({"n": 2}, timeout_s=5.0, watch=lambda: None)))
    thread.start()
    meeting = points[0].meet({"n": 1}, timeout_s=5.0, watch=lambda: None)
    thread.join()
    assert [note["n"] for note in meeting.notes] == [1, 2] == [note["n"] for note in met[0].notes]
    assert meeting.group.token == met[0].group.token and meeting.group.listener_fd >= 0 > met[0].group.listener_fd
    assert {note["node"] for note in meeting.notes} == {node_identity()}

    began = time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match="waited 0 s for rank 9"):
        Rendezvous((0, 9), 0, "pair").meet({}, timeout_s=0.2, watch=lambda: None)
    assert time.monotonic() - began < 5

    def watch():
        raise KeyError("news")

    with pytest.raises(KeyError, match="news"):
        Rendezvous((0, 9), 0, "pair").meet({}, timeout_s=5.0, watch=watch)


def test_a_meeting_that_one_rank_gives_up_is_given_up_by_all_and_the_next_one_meets():
    """Rank 1 gives up once rank 0 waits, and rank 2 comes after that: no wait of the test is a race with the clock."""
    ranks = (0, 1, 2)
    rank_0_waits, rank_0_left = threading.Event(), threading.Event()

    def attempt(watches, *, rank_2_waits_s):
        found: dict[int, object] = {}

        def meet(rank):
            if rank == 2:
                rank_0_left.wait(60.0)
            try:
                point = Rendezvous(ranks, rank, "three")
                meeting = point.meet(
                    {"n": rank},
                    timeout_s=rank_2_waits_s if rank == 2 else 60.0,
                    watch=watches.get(rank, lambda: None),
                )
                found[rank] = [note["n"] for note in meeting.notes]
            except Exception as error:
                found[rank] = error
            if rank == 0:
                rank_0_left.set()

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def gives_up():
        if rank_0_waits.wait(60.0):
            raise SchedulerDiedError("the scheduler process of rank 1 ended", rank=1)

    found = attempt({0: rank_0_waits.set, 1: gives_up}, rank_2_waits_s=0.2)
    assert isinstance(found[1], SchedulerDiedError)
    assert isinstance(found[0], SchedulerDiedError) and found[0].rank == 1 and "no longer" in str(found[0])
    assert isinstance(found[2], CollectiveTimeoutError)  # it waits for the next meeting, to which nobody comes in time
    rank_0_left.set()
    assert attempt({}, rank_2_waits_s=60.0) == {rank: [0, 1, 2] for rank in ranks}


def test_a_rank_that_waited_in_vain_names_the_cause_that_another_rank_decided():
    """Its time is over before it has looked again: the first cause counts, not its own timeout."""
    point = Rendezvous((0, 1), 0, "cause")

    def another_rank_gives_up():
        point._decide({"met": False, "kind": "SchedulerDiedError", "message": "rank 1 ended", "rank": 1})

    with pytest.raises(SchedulerDiedError, match="rank 1 ended"):
        point.meet({}, timeout_s=0.0, watch=another_rank_gives_up)


def test_a_bounded_call_ends_in_time():
    assert bounded(lambda: 5, timeout_s=1.0) == 5
    assert bounded(lambda: 1 / 0, timeout_s=1.0) is None
    began = time.monotonic()
    assert bounded(lambda: time.sleep(3), timeout_s=0.1) is None
    assert time.monotonic() - began < 2
