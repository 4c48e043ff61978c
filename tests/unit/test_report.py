"""What a report says, reckoned by hand. That it counts what plans move is in test_minimal.py."""

from __future__ import annotations

import json
import sys

import pytest

from spmd_engine.errors import ConfigError
from spmd_engine.planning.layout import Mesh, Replicate, Shard, SourceLayout, Weight, contiguous_strides
from spmd_engine.planning.plan import RecordedCopy
from spmd_engine.planning.read_sets import read_sets_of
from spmd_engine.planning.report import LinkSpeeds, WeightClass, make_report

SPEEDS = LinkSpeeds(hbm=1000.0, nvlink=100.0, host=10.0, network=1.0)
ROWS = (Shard(0),)
ONE_NODE = dict.fromkeys(range(4), 0)
TWO_NODES = {0: 0, 1: 0, 2: 1, 3: 1}


def reader(layout, rows=slice(None), dtype="float32"):
    """Reads some rows of every weight."""
    copies = []
    for weight in layout.weights:
        first, stop, _ = rows.indices(weight.shape[0])
        sizes, strides = (stop - first, *weight.shape[1:]), contiguous_strides(weight.shape)
        copies.append(RecordedCopy(weight.name, sizes, first * strides[0], strides, 64, strides, dtype, "p"))
    return read_sets_of(copies, {weight.name: weight.shape for weight in layout.weights})


def sharded(*names, placements=ROWS, shape=(4,), ranks=4):
    weights = tuple(Weight(name, (8, 4), "float32", 0, placements) for name in names)
    return SourceLayout(weights, (Mesh(shape, tuple(range(ranks))),))


NAMES = ("model.layers.0.up.weight", "model.layers.1.up.weight", "model.norm.weight")


def test_every_rank_reads_everything_over_nvlink():
    layout = sharded(*NAMES)  # 32 bytes a rank and weight
    everything = reader(layout, dtype="bfloat16")
    report = make_report(layout, dict.fromkeys(range(4), everything), nodes=ONE_NODE, speeds=SPEEDS)
    assert report.classes == (
        WeightClass("model.layers.*.up.weight", 2, local=256, nvlink=768, staged=0, network=0),
        WeightClass("model.norm.weight", 1, local=128, nvlink=384, staged=0, network=0),
    )
    assert report.bytes == {"local": 384, "nvlink": 1152, "staged": 0, "network": 0}
    assert report.bytes_of(2) == {"local": 96, "nvlink": 288, "staged": 0, "network": 0}
    assert report.matrix.tolist() == [[96] * 4] * 4 and report.written.tolist() == [192] * 4
    # Memory: 96 read by itself, 288 by the others, 192 written. NVLink: 288 each way.
    assert report.floors == {"hbm": (96 + 288 + 192) / 2 / 1000, "nvlink": 2.88, "staged": 0, "network": 0}
    assert report.floor_s == 2.88
    with pytest.raises(KeyError):
        report.bytes_of(9)


def test_what_several_ranks_of_a_node_want_crosses_the_network_once():
    layout = sharded("a")
    report = make_report(layout, dict.fromkeys(range(4), reader(layout)), nodes=TWO_NODES, speeds=SPEEDS)
    assert report.network.tolist() == [[0, 64], [64, 0]] and report.repeated.tolist() == [64, 64]
    assert report.bytes == {"local": 128, "nvlink": 128 + 128, "staged": 0, "network": 128}
    assert report.bytes_of(0) == {"local": 32, "nvlink": 32, "staged": 0, "network": 64}
    # Over NVLink go 32 bytes each way, and the 64 that came for both ranks to one more.
    assert report.floors["nvlink"] == (2 * 32 + 64) / 2 / 100
    assert report.floor_s == report.floors["network"] == 64


def test_replicas_on_each_node_leave_the_network_alone():
    layout = sharded("a", placements=(Replicate(), Shard(0)), shape=(2, 2))
    report = make_report(layout, dict.fromkeys(range(4), reader(layout)), nodes=TWO_NODES, speeds=SPEEDS)
    assert report.bytes == {"local": 256, "nvlink": 256, "staged": 0, "network": 0}
    across = {0: 0, 2: 0, 1: 1, 3: 1}  # now each node has one half twice
    report = make_report(layout, dict.fromkeys(range(4), reader(layout)), nodes=across, speeds=SPEEDS)
    assert report.bytes == {"local": 256, "nvlink": 128, "staged": 0, "network": 128}


def test_shards_in_cpu_memory_are_staged_on_their_node():
    layout = sharded("a")
    readers = {0: reader(layout, slice(0, 4)), 1: reader(layout, slice(2, 8))}
    report = make_report(layout, readers, nodes=TWO_NODES, speeds=SPEEDS, off_loaded=frozenset({1, 2}))
    halved = {0: reader(layout, slice(0, 4), "bfloat16"), 1: reader(layout, slice(2, 8), "bfloat16")}
    cast = make_report(layout, halved, nodes=TWO_NODES, speeds=SPEEDS, off_loaded=frozenset({1, 2}))
    assert cast.bytes == {"local": 32, "nvlink": 0, "staged": 32, "network": 32}
    # Rank 0 reads of 0 and 1; rank 1 of itself, 2 and 3, which are on the other node.
    assert report.bytes == {"local": 32, "nvlink": 0, "staged": 64, "network": 64}
    assert report.floors["staged"] == 32 / 10 and report.bytes_of(1)["staged"] == 32


def test_weights_that_every_rank_has_stay_where_they_are():
    layout = SourceLayout(
        (Weight("a", (8, 4), "float32"), Weight("b", (0,), "float32", 0, ROWS)), (Mesh((2,), (0, 1)),)
    )
    readers = dict.fromkeys(range(2), reader(SourceLayout(layout.weights[:1], ()), dtype="bfloat16"))
    report = make_report(layout, readers, nodes=ONE_NODE, speeds=SPEEDS)
    assert report.matrix.tolist() == [[128, 0], [0, 128]]
    report = make_report(layout, readers, nodes={0: 0, 1: 2}, speeds=SPEEDS, off_loaded=frozenset({1}))
    assert report.bytes == {"local": 128, "nvlink": 0, "staged": 64, "network": 0}


def test_ranks_that_only_hold_or_only_read():
    layout = sharded("a", shape=(2,), ranks=2)
    report = make_report(layout, {1: reader(layout), 3: reader(layout)}, nodes=ONE_NODE, speeds=SPEEDS)
    assert report.ranks == (0, 1, 3)
    assert report.matrix.tolist() == [[0, 0, 0], [64, 64, 0], [64, 64, 0]]


def test_it_prints_and_can_be_saved(tmp_path):
    layout = sharded(*NAMES)
    reasons = dict.fromkeys(NAMES, "the loader adds to it")
    everything = dict.fromkeys(range(4), reader(layout))
    report = make_report(layout, everything, nodes=TWO_NODES, speeds=SPEEDS, fallback=reasons)
    text = str(report)
    assert "4 ranks on 2 nodes" in text and "model.layers.*.up.weight ×2" in text
    assert "3 weights take the model's own loader, whole: the loader adds to it" in text
    assert "floor     192000.000 ms" in text and "B that each rank (line) reads" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["bytes"] == report.bytes and plain["matrix"] == report.matrix.tolist()
    assert plain["floors_s"] == report.floors and plain["classes"][0]["weights"] == 2
    report.save_heat_map(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_many_ranks_are_shown_by_node_and_very_many_not_at_all():
    def text(world, per_node):
        layout = sharded("a", shape=(world,), ranks=world)
        nodes = {rank: rank // per_node for rank in range(world)}
        report = make_report(layout, dict.fromkeys(range(world), reader(layout)), nodes=nodes, speeds=SPEEDS)
        assert (report.to_dict()["matrix"] is None) == (world > 64)
        return str(report)

    assert "each node (line) reads" in text(32, 8)
    assert "(line)" not in text(80, 4)


def test_a_heat_map_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    layout = sharded("a")
    report = make_report(layout, {0: reader(layout)}, nodes=ONE_NODE, speeds=SPEEDS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        report.save_heat_map(tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()
