"""Any trainer into any engine: every element right, and no plan moves less.

Each case records a model that loads as SGLang's layers do, plans for every rank, copies, and compares with a real
load. What had to move is found by looking at each element alone: who wants it, and who holds it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharding import CASES, DTYPES, draw_placements, meshes, random_weight, scatter

from spmd_engine.control import codec
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import Mesh, Replicate, Shard, SourceLayout, Weight
from spmd_engine.planning.plan import RecordedCopy, build_plan
from spmd_engine.planning.read_sets import PackedReadSets, pack, read_sets_of, unpack
from spmd_engine.planning.report import LinkSpeeds, make_report
from spmd_engine.scheduler.recording.recorder import Recorder
from spmd_engine.transfer import _native

SPEEDS = LinkSpeeds(hbm=1.0, nvlink=1.0, host=1.0, network=1.0)


def column(n, rank, p, w):
    """Rows of each part of a fused parameter; the last ranks of a padded vocabulary have fewer, or none."""
    size = p.shape[0] // len(w)
    for i, weight in enumerate(w.values()):
        rows = weight[rank * size :][:size]
        part = p[i * size :][:size]
        part[: len(rows)].copy_(rows)
        part[len(rows) :].fill_(0)


def row(n, rank, p, w):
    p.copy_(w["w"].chunk(n, dim=1)[rank])


def whole(n, rank, p, w):
    p.copy_(w["w"])


def qkv(n, rank, p, w):
    """Heads of one row each; with fewer KV heads than ranks, several ranks have the same."""
    q, k, v = w.values()
    heads, kv = len(q) // n, max(1, len(k) // n)
    p[:heads].copy_(q.narrow(0, rank * heads, heads))
    for i, weight in enumerate((k, v)):
        first = rank * kv if len(k) >= n else rank // (n // len(k))
        p[heads + i * kv :][:kv].copy_(weight.narrow(0, first, kv))


def experts(n, rank, p, w):
    """A stack, cut by expert, inside each expert, or both; the parameter may be transposed."""
    fused = w.get("w") if "w" in w else None
    count = len(fused) if fused is not None else len(w)
    ep = count // len(p)
    inside, my_ep, my_tp = n // ep, rank // (n // ep), rank % (n // ep)
    for i in range(len(p)):
        expert = fused[my_ep * len(p) + i] if fused is not None else w[f"experts.{my_ep * len(p) + i}.w"]
        halves = [half.chunk(inside)[my_tp] for half in expert.chunk(2)]
        rows = halves[0].shape[0]
        target = p[i] if p.shape[2] == expert.shape[1] and p.shape[1] == 2 * rows else p[i].t()
        for half, part in zip(halves, (target[:rows], target[rows:]), strict=True):
            part.copy_(half)


@st.composite
def layers(draw, n):
    """(loader, parameter shape, shapes of its weights) for `n` tensor-parallel ranks."""
    a, b, c = (draw(st.integers(1, 4)) for _ in range(3))
    kind = draw(st.sampled_from(["column", "fused", "row", "whole", "qkv", "stack", "experts"]))
    if kind == "column":
        rows = draw(st.integers(1, 4 * n))
        return column, (-(-rows // n), b), {"w": (rows, b)}
    if kind == "fused":
        return column, (2 * a, b), {"gate.w": (a * n, b), "up.w": (a * n, b)}
    if kind == "row":
        return row, (a, b), {"w": (a, b * n)}
    if kind == "whole":
        return whole, (a, b, c), {"w": (a, b, c)}
    if kind == "qkv":
        kv = draw(st.sampled_from([h for h in (1, 2, 4, 8, 16) if h % n == 0 or n % h == 0]))
        return qkv, (a + 2 * max(1, kv // n), b), {"q.w": (a * n, b), "k.w": (kv, b), "v.w": (kv, b)}
    ep = draw(st.sampled_from([e for e in range(1, n + 1) if n % e == 0]))
    rows = 2 * a * (n // ep)  # of an expert
    inner = (2 * a, b + 4 * n)  # never square: the loader sees by the shape whether it is transposed
    if draw(st.booleans()):
        inner = inner[::-1]
    count = c * ep
    if kind == "stack":
        return experts, (c, *inner), {"w": (count, rows, b + 4 * n)}
    return experts, (c, *inner), {f"experts.{i}.w": (rows, b + 4 * n) for i in range(count)}


class Engine(torch.nn.Module):
    """One tensor-parallel rank of an engine whose layers load as `layers` says."""

    def __init__(self, parts, n, rank, dtype):
        super().__init__()
        self.parts, self.n, self.rank = parts, n, rank
        for number, (_, shape, _) in enumerate(parts):
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            self.register_parameter(f"p{number}", parameter)

    def load_weights(self, weights):
        given = dict(weights)
        for number, (load, _, shapes) in enumerate(self.parts):
            own = {name: given[f"layers.{number}.{name}"] for name in shapes}
            load(self.n, self.rank, self.get_parameter(f"p{number}").data, own)


@st.composite
def jobs(draw):
    """A trainer, an engine over its ranks, and nodes."""
    mesh = draw(meshes())
    world = len(mesh.ranks)
    n = draw(st.sampled_from([t for t in (1, 2, 3, 4, 8, 16) if world % t == 0]))
    parts = draw(st.lists(layers(n), min_size=1, max_size=3))
    weights = []
    for number, (_, _, shapes) in enumerate(parts):
        dtype = draw(st.sampled_from(list(DTYPES)))
        placed = draw(st.integers(0, 9)) > 0
        for name, shape in shapes.items():
            placements = draw_placements(draw, shape, mesh) if placed else ()
            weights.append(Weight(f"layers.{number}.{name}", shape, dtype, 0 if placed else -1, placements))
    per_node = draw(st.integers(1, world))
    order = draw(st.one_of(st.just(range(world)), st.permutations(range(world))))
    nodes = {rank: i // per_node for i, rank in enumerate(order)}
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    return SourceLayout(tuple(weights), (mesh,)), parts, n, nodes, dtype


def test_a_node_reads_in_its_own_replica_of_the_weights():
    """Two replicas of two nodes: what a node lacks comes from the other one of its replica, and each sends as much."""
    layout = SourceLayout((Weight("w", (8,), "float32", 0, (Replicate(), Shard(0))),), (Mesh((2, 4), tuple(range(8))),))
    nodes = {rank: rank // 2 for rank in range(8)}
    whole = RecordedCopy("w", (8,), 0, (1,), 64, (1,), "float32", "p")
    wants = read_sets_of([whole], {"w": (8,)})
    report = make_report(layout, dict.fromkeys(range(8), wants), nodes=nodes, speeds=SPEEDS)
    assert report.network.tolist() == [[0, 16, 0, 0], [16, 0, 0, 0], [0, 0, 0, 16], [0, 0, 16, 0]]
    for rank in range(8):
        plan = build_plan(layout, [whole], rank=rank, nodes=nodes)
        assert set(plan.rank.tolist()) == set(range(4) if rank < 4 else range(4, 8))


def holders(layout):
    """For each weight, each element's holders as bits."""
    found = []
    for weight in layout.weights:
        bits = np.zeros(math.prod(weight.shape), dtype=np.int64)
        for rank, held in scatter(layout, torch.arange(len(bits)).view(weight.shape), weight).items():
            bits[held.flatten().numpy()] |= 1 << rank
        found.append(bits)
    return np.concatenate(found)


def wanted(layout, engine):
    """The numbers of the elements that fill an engine's parameters, over all weights."""
    first, numbered = 1, {}
    for weight in layout.weights:
        numbered[weight.name] = torch.arange(first, first + math.prod(weight.shape)).view(weight.shape)
        first += math.prod(weight.shape)
    engine.load_weights(numbered.items())
    flat = np.concatenate([p.flatten().numpy() for p in engine.parameters()])
    return flat[flat > 0] - 1


@pytest.mark.one_version
@CASES
@given(jobs())
def test_every_element_is_right_and_no_plan_moves_less(job):
    layout, parts, n, nodes, dtype = job
    full = {w.name: random_weight(layout, i, w) for i, w in enumerate(layout.weights)}
    shards = [scatter(layout, full[w.name], w) for w in layout.weights]
    ranks = layout.meshes[0].ranks
    addresses = {r: np.array([s[r].data_ptr() for s in shards], dtype=np.uint64) for r in ranks}
    held = holders(layout)
    item = np.concatenate([np.full(math.prod(w.shape), ITEM_SIZE[w.dtype]) for w in layout.weights])
    shapes = {w.name: w.shape for w in layout.weights}

    readers, wants = {}, {}
    matrix = np.zeros((len(ranks), len(ranks)), dtype=np.int64)
    for rank in ranks:
        engine = Engine(parts, n, rank % n, dtype)
        recorder = Recorder(engine)
        recording = recorder.run([(w.name, recorder.stand_in(w)) for w in layout.weights])
        assert not recording.fallback
        plan = build_plan(layout, recording.copies, rank=rank, nodes=nodes)
        moved = _native.copy_cpu(plan.bind(addresses), pids=[0]).bytes_read
        loaded = Engine(parts, n, rank % n, dtype)
        loaded.load_weights(full.items())
        for ours, theirs in zip(engine.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))

        wants[rank] = wanted(layout, Engine(parts, n, rank % n, torch.int64))
        on_node = sum(1 << other for other in ranks if nodes[other] == nodes[rank])
        mine, near = (held[wants[rank]] & bits != 0 for bits in (1 << rank, on_node))
        size = item[wants[rank]]
        assert moved == size.sum() == plan.local_bytes + plan.remote_bytes
        assert plan.local_bytes == size[mine].sum()
        from_node = np.array([nodes[int(source)] == nodes[rank] for source in plan.rank], dtype=bool)
        item_of_row = np.array([ITEM_SIZE[layout.weights[w].dtype] for w in plan.weight], dtype=np.int64)
        bytes_of_row = plan.table["rows"].astype(np.int64) * plan.table["row_elems"] * item_of_row
        assert bytes_of_row[from_node].sum() == size[near].sum()
        # What comes over the network is cast first if that makes it smaller.
        packed = np.where(
            from_node, bytes_of_row, bytes_of_row // item_of_row * np.minimum(item_of_row, dtype.itemsize)
        )
        np.add.at(matrix[rank], plan.rank, packed)
        packed = pack(read_sets_of(recording.copies, shapes), list(shapes))
        readers[rank] = unpack(codec.decode(codec.encode(packed), PackedReadSets), list(shapes))
        written = sum(want.written for want in readers[rank].values())
        assert written == len(wants[rank]) * ITEM_SIZE[str(dtype).removeprefix("torch.")]

    # The report counts the same without the plan.
    shared = {rank: readers[rank % n] for rank in ranks}
    report = make_report(layout, shared, nodes=nodes, speeds=SPEEDS)
    assert (report.matrix == matrix).all()
    assert sum(report.bytes.values()) == matrix.sum() and report.bytes["staged"] == 0
    assert sum(each.weights for each in report.classes) == len(layout.weights)
    item = np.minimum(item, dtype.itemsize)
    for node in set(nodes.values()):
        members = [rank for rank in ranks if nodes[rank] == node]
        far = held & sum(1 << rank for rank in members) == 0
        once = np.unique(np.concatenate([wants[rank] for rank in members]))
        assert report.network[node].sum() == item[once][far[once]].sum()
        every = sum(int(item[wants[rank]][far[wants[rank]]].sum()) for rank in members)
        assert report.repeated[node] == every - report.network[node].sum()
    assert report.bytes["network"] == report.network.sum()
    assert report.bytes["local"] == np.trace(matrix)
    assert 0 < report.floor_s == max(report.floors.values())
