"""What the ranks of a replica must have in common before anything is started."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch.distributed as dist

from spmd_engine.control.messages import GroupAddress
from spmd_engine.errors import CollectiveMismatchError, ConfigError
from spmd_engine.trainer.rendezvous import Meeting, Rendezvous, check_reachable, interface_of
from spmd_engine.trainer.startup import _check_agreement, shared_scratch

RANKS = (4, 5, 6, 7)


def meeting(nodes: str, **changes: object) -> Meeting:
    notes = [{"digest": "d", "arguments": "{}", "refusal": None, "node": node} for node in nodes]
    notes[1].update(changes)
    return Meeting(notes, GroupAddress(RANKS, "10.0.0.1", 1, "token"))


def test_ranks_that_agree():
    for nodes in ("aaaa", "aabb", "abab", "abcd"):
        _check_agreement(RANKS, meeting(nodes), None)


@pytest.mark.parametrize(
    ("bad", "kind", "match"),
    [
        (meeting("aaaa", digest="e"), CollectiveMismatchError, "different arguments:\nrank 4"),
        (meeting("aaaa", refusal="no GPU"), ConfigError, "rank 5: no GPU"),
        (meeting("aaab"), ConfigError, r"on 2 nodes, \[1, 3\] of them on each: SGLang needs equally many"),
    ],
)
def test_ranks_that_do_not(bad, kind, match):
    with pytest.raises(kind, match=match):
        _check_agreement(RANKS, bad, None)


@pytest.mark.parametrize(("nodes", "host"), [("aaaa", "127.0.0.1"), ("aaaa", "::1"), ("aabb", "10.0.0.1")])
def test_nodes_that_reach_one_another(nodes, host):
    check_reachable(RANKS, [{"network": node, "host": host} for node in nodes])


@pytest.mark.parametrize("host", ["127.0.1.1", "::1"])
def test_nodes_that_do_not(host):
    match = f"rank 4 knows its node only by the loopback address {host}: set MASTER_ADDR"
    with pytest.raises(ConfigError, match=match):
        check_reachable(RANKS, [{"network": node, "host": host} for node in "aabb"])


def test_temporary_directories_leave_room_for_the_names_of_sockets(tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        made = [shared_scratch("token", str(base), on_cpu=False) for base in (short, long)]
        assert [os.path.dirname(path) for path in made] == [short, "/tmp"]
        assert {os.stat(path).st_mode & 0o777 for path in made} == {0o700}
        os.rmdir(made[1])
    on_cpu = shared_scratch("token", str(long), on_cpu=True)
    assert os.path.dirname(on_cpu) == str(long)


def test_meetings_are_counted_by_store():
    """Who stays, while others begin anew, meets them on a new store."""
    for rounds in (2, 1):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            for number in range(rounds):
                rendezvous = Rendezvous((0,), 0, "test")
                assert rendezvous._number == number
                listener = rendezvous.meet({"a": number}, timeout_s=5.0, watch=lambda: None).group.listener_fd
                os.close(listener)
        finally:
            dist.destroy_process_group()


def test_who_does_not_come_says_so():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = (0, 1, 2, 3)
        of_rank = [Rendezvous(ranks, rank, "test") for rank in ranks]
        assert [one.next_number() for one in of_rank] == [0] * 4
        mismatch = CollectiveMismatchError("they made different calls")
        of_rank[1].give_up(0, mismatch)
        of_rank[0].give_up(0, mismatch)
        for rank in (2, 3):  # they had agreed on that number
            with pytest.raises(CollectiveMismatchError, match=f"rank {rank} waits no longer .*: they made different"):
                of_rank[rank].meet({}, timeout_s=5.0, watch=lambda: None, number=0)
        assert [Rendezvous(ranks, rank, "test").next_number() for rank in ranks] == [1] * 4
    finally:
        dist.destroy_process_group()


def test_interfaces_have_names():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == ""
