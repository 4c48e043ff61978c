from __future__ import annotations

import logging
import os

import numpy as np
import torch

from spmd_engine.planning.layout import Mesh, Shard, SourceLayout, Weight
from spmd_engine.planning.plan import RecordedCopy, build_plan
from spmd_engine.transfer import direct
from spmd_engine.transfer.handles import CPU, ShardMemory


def test_the_log_says_where_the_first_difference_is(caplog):
    sources, parameters = torch.randn(2, 4, 3), torch.zeros(2, 4, 3)
    names = ("a", "b")
    layout = SourceLayout(tuple(Weight(name, (4, 3), "float32", 0, (Shard(0),)) for name in names), (Mesh((1,), (0,)),))
    copies = [
        RecordedCopy(name, (4, 3), 0, (3, 1), parameter.data_ptr(), (3, 1), "float32", name)
        for name, parameter in zip(names, parameters, strict=True)
    ]
    plan = build_plan(layout, copies, rank=0, nodes={0: 0})
    moved = direct.prepare(plan, rank=0, device=torch.device("cpu"), handles=None)
    offsets = np.array([source.data_ptr() for source in sources], np.uint64)
    moved.bind({0: ShardMemory(CPU, os.getpid(), (), (), np.zeros(2, np.uint32), offsets)})
    moved.start()
    moved.finish()
    with caplog.at_level(logging.ERROR):
        assert moved.compare() == 0 and not caplog.records
        parameters[1, 2, 1] += 1
        assert moved.compare() == 1
    (record,) = caplog.records
    assert "1 elements differ" in record.getMessage() and "weight 1 of the source" in record.getMessage()
    assert "element 7 of row" in record.getMessage() and "shard of rank 0" in record.getMessage()
