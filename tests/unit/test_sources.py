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

from spmd_engine.errors import CollectiveTimeoutError, PlanError, SchedulerDiedError
from spmd_engine.handles import NOWHERE, Exporter, ShardMemory
from spmd_engine.layout import Mesh, Shard
from spmd_engine.rendezvous import Rendezvous, bounded, node_identity
from spmd_engine.sources import SourceReader, ranks_of

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
    received = ShardMemory.from_frame(*memory.to_frame())
    assert received.same_as(memory)
    assert (received.chunks, received.offered_at) == (memory.chunks, "name/token")
    header, blob = memory.to_frame()
    with pytest.raises(ValueError, match="cannot hold 2 handles"):
        ShardMemory.from_frame(header, blob[:-1])
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
    assert meeting.link.token == met[0].link.token and meeting.link.listener_fd >= 0 > met[0].link.listener_fd
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
    """Rank 2 comes late, when rank 1 has given up and rank 0 has seen all notes but its own fate."""
    ranks = (0, 1, 2)
    news, late = threading.Event(), threading.Event()
    found: dict[int, object] = {}

    def watch_of(rank):
        def watch():
            if rank == 1 and news.wait(0.2):
                raise SchedulerDiedError("the scheduler process of rank 1 ended", rank=1)

        return watch

    def meet(rank, timeout_s):
        if rank == 2:
            late.wait(5.0)
        try:
            point = Rendezvous(ranks, rank, "three")
            found[rank] = [
                note["n"] for note in point.meet({"n": rank}, timeout_s=timeout_s, watch=watch_of(rank)).notes
            ]
        except Exception as error:
            found[rank] = error
        if rank == 0:
            late.set()

    def attempt(timeout_s):
        found.clear()
        threads = [threading.Thread(target=meet, args=(rank, timeout_s)) for rank in ranks]
        for thread in threads:
            thread.start()
        return threads

    threads = attempt(1.5)
    news.set()
    for thread in threads:
        thread.join()
    assert isinstance(found[1], SchedulerDiedError)
    assert isinstance(found[0], SchedulerDiedError) and found[0].rank == 1 and "no longer" in str(found[0])
    assert isinstance(found[2], CollectiveTimeoutError)  # it waits for the next meeting, to which nobody comes in time
    news.clear()
    for thread in attempt(10.0):
        thread.join()
    assert found == {rank: [0, 1, 2] for rank in ranks}


def test_a_bounded_call_ends_in_time():
    assert bounded(lambda: 5, timeout_s=1.0) == 5
    assert bounded(lambda: 1 / 0, timeout_s=1.0) is None
    began = time.monotonic()
    assert bounded(lambda: time.sleep(3), timeout_s=0.1) is None
    assert time.monotonic() - began < 2
