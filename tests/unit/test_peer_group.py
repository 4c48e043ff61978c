from __future__ import annotations

import select
import socket
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from spmd_engine.control import codec, timeouts
from spmd_engine.control.framing import frame
from spmd_engine.control.messages import GroupAddress
from spmd_engine.control.peer_group import BroadcastFirst, Goodbye, PeerGone, PeerGroup, PeerTimeout, listen


class Part(msgspec.Struct, frozen=True):
    rank: int
    turn: int
    data: bytes


def address(ranks, token="secret", host="127.0.0.1"):
    listener = listen(host)
    port = listener.getsockname()[1]
    fd = listener.detach()
    return {rank: GroupAddress(ranks, host, port, token, fd if rank == ranks[0] else -1) for rank in ranks}


def connect(ranks, **kwargs):
    addresses = address(ranks, **kwargs)
    with ThreadPoolExecutor(len(ranks)) as pool:
        made = list(pool.map(lambda rank: PeerGroup(rank, addresses[rank], timeout_s=5.0), ranks))
    return dict(zip(ranks, made, strict=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_all_gather_comes_in_the_order_of_the_ranks(host):
    ranks = (3, 0, 7)
    groups = connect(ranks, host=host)
    with ThreadPoolExecutor(3) as pool:
        for turn in range(3):
            sent = {r: Part(r, turn, bytes([r]) * (r * 1000)) for r in ranks}
            got = list(pool.map(lambda r, s=sent: groups[r].all_gather(s[r], timeout_s=5.0), ranks))
            assert all(frames == [sent[r] for r in ranks] for frames in got)
    for group in groups.values():
        group.close()


def test_one_rank_needs_no_socket():
    group = PeerGroup(4, GroupAddress((4,), "127.0.0.1", 1, "t", -1), timeout_s=1.0)
    assert group.all_gather("x", timeout_s=1.0) == ["x"]


def test_a_rank_whose_trainer_ends_before_it_joins_is_named_at_once():
    for has_ended in (False, True):
        trainer = subprocess.Popen(["sleep", "60"])
        if has_ended:
            trainer.kill()
            trainer.wait()
        root = msgspec.structs.replace(address((0, 1))[0], trainers={1: trainer.pid})
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(PeerGroup, 0, root, timeout_s=60.0)
            trainer.kill()
            with pytest.raises(PeerGone, match="rank 1"):
                made.result(timeout=10.0)
        trainer.wait()


def test_a_rank_that_does_not_come_is_named():
    groups = connect((0, 1))
    with pytest.raises(PeerTimeout, match="rank 1"):
        groups[0].all_gather("", timeout_s=0.1)
    with pytest.raises(PeerTimeout, match="rank 0"):
        groups[1].all_gather("", timeout_s=0.1)


def test_a_peer_that_goes_away_is_named():
    groups = connect((0, 1))
    groups[1].close()
    with pytest.raises(PeerGone, match="rank 1"):
        groups[0].all_gather("", timeout_s=5.0)


def test_a_member_that_never_joins_ends_the_start():
    root = address((0, 1))[0]
    with pytest.raises(PeerTimeout, match="rank 1"):
        PeerGroup(0, root, timeout_s=0.2)


def test_strangers_are_turned_away(monkeypatch):
    monkeypatch.setattr(timeouts, "HELLO_S", 1.0)
    addresses = address((0, 1))
    root: list[PeerGroup] = []
    thread = threading.Thread(target=lambda: root.append(PeerGroup(0, addresses[0], timeout_s=20.0)))
    thread.start()
    target = (addresses[0].host, addresses[0].port)
    for hello in ({"token": "wrong", "rank": 1, "lane": "data"}, {"token": "secret", "rank": 9, "lane": "data"}, [1]):
        with socket.create_connection(target) as stranger:
            stranger.sendall(frame(codec.encode(hello)))
            stranger.settimeout(10.0)
            assert stranger.recv(1) == b""
    with socket.create_connection(target) as stranger:  # a frame that claims to be huge
        stranger.sendall(struct.pack("<Q", 1 << 40))
        stranger.settimeout(10.0)
        assert stranger.recv(1) == b""
    with socket.create_connection(target) as stranger:  # one that never comes to an end
        stranger.sendall(struct.pack("<Q", 1000))
        stranger.settimeout(0.3)
        for _ in range(20):
            try:
                stranger.sendall(b" ")
                assert stranger.recv(1) == b""
                break
            except ConnectionError:  # what it sent last had not been read
                break
            except TimeoutError:
                pass
        else:
            pytest.fail("a stranger may hold up the members for long")
    member = PeerGroup(1, addresses[1], timeout_s=5.0)
    thread.join(10.0)
    assert root and set(root[0].data) == {1}
    member.close()
    root[0].close()


def test_alarms_reach_all_but_the_skipped_and_survive_a_dead_peer():
    groups = connect((0, 1, 2))
    groups[2].close()
    groups[0].alarm(Goodbye(5))
    assert PeerGroup.recv_alarm(groups[1].alarms[0]) == Goodbye(5)
    groups[0].alarm(Goodbye(6), skip=1)
    groups[1].alarms[0].settimeout(0.2)
    with pytest.raises(TimeoutError):
        groups[1].alarms[0].recv(1)


def test_what_the_root_broadcasts_comes_before_the_all_gather_that_a_member_has_begun():
    groups = connect((0, 1))
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(lambda: groups[1].all_gather("stale", timeout_s=20.0))
        while not select.select([groups[0].data[1]], [], [], 0.01)[0]:
            pass
        groups[0].broadcast("one")
        with pytest.raises(BroadcastFirst) as first:
            early.result()
        assert codec.decode(first.value.data, str) == "one"
        groups[0].broadcast("two")
        assert groups[1].recv_broadcast(str, timeout_s=20.0) == "two"
        late = pool.submit(lambda: groups[1].all_gather("fresh", timeout_s=20.0))
        assert groups[0].all_gather("", timeout_s=20.0) == ["", "fresh"] == late.result()


def test_a_member_that_does_not_read_holds_nobody_up_for_longer_than_the_timeout():
    groups = connect((0, 1))
    much = bytes(64 << 20)  # more than the sockets hold
    with pytest.raises(PeerTimeout):
        groups[1].all_gather(much, timeout_s=0.5)
    groups[0]._timeout_s = 0.5
    with pytest.raises(PeerTimeout):
        groups[0].broadcast(much)
    with ThreadPoolExecutor(2) as pool:
        pair = connect((0, 1))
        got = list(pool.map(lambda rank: pair[rank].all_gather((rank, much), timeout_s=30.0), (0, 1)))
    assert [tuple(each) for each in got[0]] == [tuple(each) for each in got[1]] == [(0, much), (1, much)]
