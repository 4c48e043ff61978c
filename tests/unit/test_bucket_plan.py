"""Buckets against brute force: what crosses between nodes, in which bucket, and whether it arrives."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharding import CASES, DTYPES, layouts, random_weight, recorded, scatter, view_of

from spmd_engine.planning import bucket_plan
from spmd_engine.planning.dtypes import ElementType
from spmd_engine.planning.plan import build_plan
from spmd_engine.transfer import _native

BUCKET = 512


class Ranks:
    """All ranks of an update in this one process, each with its buckets."""

    def __init__(self, plans, shards, ranks):
        self.plans, self.ranks = plans, ranks
        self.shards = {r: np.array([t.data_ptr()], np.uint64) for r, t in shards.items()}
        self.buckets = {r: torch.zeros(bucket_plan.BUCKETS, BUCKET, dtype=torch.uint8) for r in ranks}

    def run(self):
        steps = max(len(plan.steps) for plan in self.plans.values())
        for number in range(steps):
            now = {r: plan.steps[number] for r, plan in self.plans.items() if number < len(plan.steps)}
            for rank, step in now.items():
                packed = self.buckets[rank][bucket_plan.PACKED[number % len(bucket_plan.PACKED)]]
                table = step.pack.bind(self.shards)
                assert (table["dst"] < BUCKET).all()
                table["dst"] += np.uint64(packed.data_ptr())
                _native.copy_cpu(table, pids=[0])
                assert step.kept + sum(step.sends) <= BUCKET
            for rank, step in now.items():
                self._receive(rank, step, now, number)
            for step in now.values():
                places = {r: np.array([b.data_ptr() for b in self.buckets[r]], np.uint64) for r in self.ranks}
                table = step.unpack.bind(places)
                _native.copy_cpu(table, pids=[0])

    def _receive(self, rank, step, now, number):
        """What an all-to-all does."""
        arrived = self.buckets[rank][bucket_plan.ARRIVED[number % len(bucket_plan.ARRIVED)]]
        at = 0
        for sender, size in zip(self.ranks, step.receives, strict=True):
            sent = now[sender].sends if sender in now else (0,) * len(self.ranks)
            assert size == sent[self.ranks.index(rank)]
            packed = self.buckets[sender][bucket_plan.PACKED[number % len(bucket_plan.PACKED)]]
            begin = now[sender].kept + sum(sent[: self.ranks.index(rank)]) if size else 0
            arrived[at : at + size] = packed[begin : begin + size]
            at += size
        assert at <= BUCKET


@CASES
@given(st.data())
def test_every_element_arrives_and_crosses_once(data):
    layout = data.draw(layouts())
    full = random_weight(layout, data.draw(st.integers(0, 1000)))
    shards = scatter(layout, full)
    holders = sorted(shards)
    ranks = sorted({*holders, *range(data.draw(st.integers(1, 6)))})
    nodes = {rank: data.draw(st.integers(0, 2)) for rank in ranks}
    off_loaded = data.draw(st.booleans())
    dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    # Few different views, so that ranks of a node want the same things, as replicas and replicated heads do.
    views = [view_of(data.draw, full) for _ in range(data.draw(st.integers(1, 2)))]
    plans, wanted, staged, targets = {}, {}, {}, {}
    for rank in ranks:
        view = data.draw(st.sampled_from(views))
        targets[rank] = (torch.zeros(view.shape, dtype=dtype), view.to(dtype))
        plan = build_plan(layout, [recorded(view, targets[rank][0])], rank=rank, nodes=nodes)
        far = [r for r in ranks if off_loaded or nodes[r] != nodes[rank]]
        direct, staged[rank] = bucket_plan.split(plan, far, rank=rank)
        assert direct.local_bytes + direct.remote_bytes + staged[rank].local_bytes + staged[rank].remote_bytes == (
            plan.local_bytes + plan.remote_bytes
        )
        # What a rank of the own node holds is read from there.
        table = direct.bind({r: np.array([t.data_ptr()], np.uint64) for r, t in shards.items()})
        _native.copy_cpu(table, pids=[0])
        wanted[rank] = bucket_plan.request_packs(staged[rank])
    for rank in ranks:
        plans[rank] = bucket_plan.plan_buckets(staged[rank], wanted, rank=rank, nodes=nodes, bucket_bytes=BUCKET)
    Ranks(plans, shards, ranks).run()
    for found, expected in targets.values():
        assert torch.equal(bits(found), bits(expected))
    assert {plan.routes for plan in plans.values()} == {plans[ranks[0]].routes}
    received = sum(plan.network_bytes for plan in plans.values())
    assert minimum(wanted, nodes) <= received <= minimum(wanted, nodes) + padding(plans)


def bits(tensor):
    return torch.cat([tensor.flatten(), tensor.new_zeros(1)]).view(torch.uint8)


def minimum(wanted, nodes) -> int:
    """Bytes that must cross: every block that some rank of a node wants and that none of the node holds, once."""
    crossing: dict[int, set] = defaultdict(set)
    for rank, rows in wanted.items():
        crossing[nodes[rank]] |= {row.tobytes() for row in rows if nodes[int(row["source"])] != nodes[rank]}
    rows = [np.frombuffer(row, bucket_plan.PACK_REQUEST_DTYPE)[0] for blocks in crossing.values() for row in blocks]
    return sum(int(r["rows"] * r["row_elems"]) * ElementType(int(r["packed_dtype"])).itemsize for r in rows)


def padding(plans) -> int:
    """What the alignment of fragments may add."""
    return sum(64 * len(step.pack.table) for plan in plans.values() for step in plan.steps)


def test_a_block_larger_than_a_bucket_takes_several_steps():
    rows = np.zeros(2, bucket_plan.PACK_REQUEST_DTYPE)
    rows["rows"], rows["row_elems"], rows["src"] = [1, 3], [1000, 300], [0, 4000]
    packed = bucket_plan._Packed.make(rows, 512)
    assert max(packed.sizes) <= 512
    moved = defaultdict(int)
    for block, n, m in zip(packed.block, packed.rows, packed.elems, strict=True):
        moved[int(block)] += int(n * m)
    assert dict(moved) == {0: 1000, 1: 900}
    assert math.ceil(4 * 1900 / 512) <= len(packed.sizes) <= math.ceil(4 * 1900 / 512) + 3
