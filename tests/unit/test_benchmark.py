"""The arithmetic of `benchmarks/weight_sync.py`."""

from __future__ import annotations

import machine
import pytest
import report

CEILINGS = {"local": 2000.0, "peer": 400.0, "host": 50.0}


def floor(local, remote, staged=0, written_per_read=1.0, **ceilings):
    return machine.floor_s(local, remote, staged, written_per_read=written_per_read, ceilings={**CEILINGS, **ceilings})


def test_own_bytes_take_the_rate_inside_a_device():
    assert floor(15_231_000_000, 0) == pytest.approx(7.6155e-3)


def test_the_slower_of_memory_and_link_counts():
    assert floor(6_000_000_000, 1_000_000_000) == pytest.approx(3.5e-3)  # memory: 7 GB at 2000 GB/s
    assert floor(1_000_000_000, 6_000_000_000) == pytest.approx(15e-3)  # link: 6 GB at 400 GB/s


def test_a_cast_reads_more_than_it_writes():
    # 8 GB of float32 are read, 4 GB of bfloat16 written: as much traffic as a copy of 6 GB.
    assert floor(8_000_000_000, 0, written_per_read=0.5) == pytest.approx(3e-3)
    # All that crosses the link is read there.
    assert floor(0, 8_000_000_000, written_per_read=0.5) == pytest.approx(20e-3)


def test_what_comes_from_the_cpu_takes_the_rate_from_there():
    assert floor(0, 0, staged=5_000_000_000) == pytest.approx(0.1)
    assert floor(2_000_000_000, 0, staged=5_000_000, host=None) == pytest.approx(1e-3)


def test_no_floor_is_invented_for_an_unmeasured_link():
    assert floor(2_000_000_000, 0, peer=None) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="rate from a peer was not measured"):
        floor(1, 1, peer=None)


def test_each_update_counts_as_its_slowest_rank():
    of_ranks = [
        [{"copy": 1.0, "total": 5.0}, {"copy": 4.0, "total": 6.0}, {"copy": 2.0, "total": 9.0}],
        [{"copy": 3.0, "total": 4.0}, {"copy": 1.0, "total": 8.0}, {"copy": 2.5, "total": 7.0}],
    ]
    assert report.slowest(of_ranks) == {
        "copy": {"min": 2.5, "median": 3.0, "max": 4.0},
        "total": {"min": 5.0, "median": 8.0, "max": 9.0},
    }


def test_phases_are_listed_in_the_order_in_which_they_happen():
    row = {"commit": 1.0, "device": 1.0, "total": 1.0, "other": 1.0, "new": 1.0, "copy": 1.0, "wait": 1.0}
    assert list(report.slowest([[row]])) == ["wait", "copy", "device", "commit", "new", "other", "total"]
