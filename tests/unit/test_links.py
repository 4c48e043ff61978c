from __future__ import annotations

import select
import socket
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from spmd_engine.control import links as links_module
from spmd_engine.control.framing import frame, recv_frame
from spmd_engine.control.links import Interjection, Links, LinkTimeout, PeerGone, listen
from spmd_engine.control.messages import LinkAddress


def address(ranks, token="secret", host="127.0.0.1"):
    listener = listen(host)
    port = listener.getsockname()[1]
    fd = listener.detach()
    return {rank: LinkAddress(ranks, host, port, token, fd if rank == ranks[0] else -1) for rank in ranks}


def connect(ranks, **kwargs):
    addresses = address(ranks, **kwargs)
    with ThreadPoolExecutor(len(ranks)) as pool:
        made = list(pool.map(lambda rank: Links(rank, addresses[rank], timeout_s=5.0), ranks))
    return dict(zip(ranks, made, strict=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_exchange_is_an_all_gather_in_the_order_of_the_ranks(host):
    ranks = (3, 0, 7)
    links = connect(ranks, host=host)
    with ThreadPoolExecutor(3) as pool:
        for turn in range(3):
            sent = {r: ({"rank": r, "turn": turn}, bytes([r]) * (r * 1000)) for r in ranks}
            got = list(pool.map(lambda r, s=sent: links[r].exchange(*s[r], timeout_s=5.0), ranks))
            assert all(frames == [sent[r] for r in ranks] for frames in got)
    for link in links.values():
        link.close()


def test_one_rank_needs_no_socket():
    link = Links(4, LinkAddress((4,), "127.0.0.1", 1, "t", -1), timeout_s=1.0)
    assert link.exchange({"a": 1}, b"x", timeout_s=1.0) == [({"a": 1}, b"x")]


def test_a_rank_whose_trainer_ends_before_it_joins_is_named_at_once():
    for has_ended in (False, True):
        trainer = subprocess.Popen(["sleep", "60"])
        if has_ended:
            trainer.kill()
            trainer.wait()
        hub = replace(address((0, 1))[0], trainers={1: trainer.pid})
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(Links, 0, hub, timeout_s=60.0)
            trainer.kill()
            with pytest.raises(PeerGone, match="rank 1"):
                made.result(timeout=10.0)
        trainer.wait()


def test_a_rank_that_does_not_come_is_named():
    links = connect((0, 1))
    with pytest.raises(LinkTimeout, match="rank 1"):
        links[0].exchange({}, timeout_s=0.1)
    with pytest.raises(LinkTimeout, match="rank 0"):
        links[1].exchange({}, timeout_s=0.1)


def test_a_peer_that_goes_away_is_named():
    links = connect((0, 1))
    links[1].close()
    with pytest.raises(PeerGone, match="rank 1"):
        links[0].exchange({}, timeout_s=5.0)


def test_a_member_that_never_joins_ends_the_start():
    hub = address((0, 1))[0]
    with pytest.raises(LinkTimeout, match="rank 1"):
        Links(0, hub, timeout_s=0.2)


def test_strangers_are_turned_away(monkeypatch):
    monkeypatch.setattr(links_module, "_HELLO_S", 1.0)
    addresses = address((0, 1))
    hub: list[Links] = []
    thread = threading.Thread(target=lambda: hub.append(Links(0, addresses[0], timeout_s=20.0)))
    thread.start()
    target = (addresses[0].host, addresses[0].port)
    for hello in ({"token": "wrong", "rank": 1, "lane": "data"}, {"token": "secret", "rank": 9, "lane": "data"}, [1]):
        with socket.create_connection(target) as stranger:
            stranger.sendall(frame(hello))  # type: ignore[arg-type]
            stranger.settimeout(10.0)
            assert stranger.recv(1) == b""
    with socket.create_connection(target) as stranger:  # a frame that claims to be huge
        stranger.sendall(struct.pack("<II", 1 << 31, 1 << 31))
        stranger.settimeout(10.0)
        assert stranger.recv(1) == b""
    with socket.create_connection(target) as stranger:  # one that never comes to an end
        stranger.sendall(struct.pack("<II", 1000, 0))
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
    member = Links(1, addresses[1], timeout_s=5.0)
    thread.join(10.0)
    assert hub and set(hub[0].data) == {1}
    member.close()
    hub[0].close()


def test_alarms_reach_all_but_the_skipped_and_survive_a_dead_peer():
    links = connect((0, 1, 2))
    links[2].close()
    links[0].alarm({"bye": 5})
    assert recv_frame(links[1].alarms[0]) == ({"bye": 5}, b"")
    links[0].alarm({"bye": 6}, skip=1)
    links[1].alarms[0].settimeout(0.2)
    with pytest.raises(TimeoutError):
        links[1].alarms[0].recv(1)


def test_what_the_hub_tells_comes_before_the_exchange_that_a_member_has_begun():
    links = connect((0, 1))
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(lambda: links[1].exchange({"stale": True}, timeout_s=20.0))
        while not select.select([links[0].data[1]], [], [], 0.01)[0]:
            pass
        links[0].tell({"news": 1}, b"one")
        with pytest.raises(Interjection) as first:
            early.result()
        assert first.value.frame == ({"news": 1}, b"one")
        links[0].tell({"news": 2})
        assert links[1].hear(timeout_s=20.0) == ({"news": 2}, b"")
        late = pool.submit(lambda: links[1].exchange({"fresh": True}, timeout_s=20.0))
        assert links[0].exchange({}, timeout_s=20.0) == [({}, b""), ({"fresh": True}, b"")] == late.result()


def test_a_member_that_does_not_read_holds_nobody_up_for_longer_than_the_timeout():
    links = connect((0, 1))
    much = bytes(64 << 20)  # more than the sockets hold
    with pytest.raises(LinkTimeout):
        links[1].exchange({}, much, timeout_s=0.5)
    links[0]._timeout_s = 0.5
    with pytest.raises(LinkTimeout):
        links[0].tell({}, much)
    with ThreadPoolExecutor(2) as pool:
        pair = connect((0, 1))
        frames = list(pool.map(lambda rank: pair[rank].exchange({"rank": rank}, much, timeout_s=30.0), (0, 1)))
    assert frames[0] == frames[1] == [({"rank": 0}, much), ({"rank": 1}, much)]
