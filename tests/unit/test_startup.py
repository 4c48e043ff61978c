"""What the ranks of a replica must have in common before anything is started."""

from __future__ import annotations

import pytest

from spmd_engine.channel import LinkAddress
from spmd_engine.errors import CollectiveMismatchError, ConfigError
from spmd_engine.rendezvous import Meeting, interface_of
from spmd_engine.startup import _check_agreement

RANKS = (4, 5, 6, 7)


def meeting(nodes: str, host: str = "10.0.0.1", **changes: object) -> Meeting:
    notes = [{"digest": "d", "arguments": "{}", "refusal": None, "node": node} for node in nodes]
    notes[1].update(changes)
    return Meeting(notes, LinkAddress(RANKS, host, 1, "token"))


def test_ranks_that_agree():
    for nodes in ("aaaa", "aabb", "abab", "abcd"):
        _check_agreement(RANKS, meeting(nodes), None)
    _check_agreement(RANKS, meeting("aaaa", host="127.0.0.1"), None)


@pytest.mark.parametrize(
    ("bad", "kind", "match"),
    [
        (meeting("aaaa", digest="e"), CollectiveMismatchError, "different arguments:\nrank 4"),
        (meeting("aaaa", refusal="no GPU"), ConfigError, "rank 5: no GPU"),
        (meeting("aaab"), ConfigError, r"on 2 nodes, \[1, 3\] of them on each: SGLang needs equally many"),
        (meeting("aabb", host="127.0.1.1"), ConfigError, "loopback address 127.0.1.1: set MASTER_ADDR"),
        (meeting("aabb", host="::1"), ConfigError, "rank 4 knows its node only by the loopback address ::1"),
    ],
)
def test_ranks_that_do_not(bad, kind, match):
    with pytest.raises(kind, match=match):
        _check_agreement(RANKS, bad, None)


def test_interfaces_have_names():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == ""
