from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from spmd_engine.control.calls import Checksums
from spmd_engine.control.channel import Channel, ChannelClosed, ChannelTimeout
from spmd_engine.control.messages import Reply
from spmd_engine.errors import ErrorReport


@pytest.fixture
def pair():
    left, right = (Channel(sock, Reply) for sock in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_and_descriptors_arrive_in_order(pair):
    left, right = pair
    read, write = os.pipe()
    left.send(Reply(1, Checksums({"a": "x" * 10})))
    left.send(Reply(2, error=ErrorReport("PlanError", "no", 3)), fds=(write,))
    assert right.recv(1.0) == (Reply(1, Checksums({"a": "x" * 10})), ())
    message, fds = right.recv(1.0)
    assert message.error == ErrorReport("PlanError", "no", 3)
    os.write(fds[0], b"!")
    assert os.read(read, 1) == b"!"
    assert not os.get_inheritable(fds[0])
    for fd in (read, write, *fds):
        os.close(fd)


def test_large_messages_from_two_threads_do_not_mix(pair):
    left, right = pair
    threads = [
        threading.Thread(target=left.send, args=(Reply(i, Checksums({"a": str(i) * 3_000_000})),)) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    got = [right.recv(10.0)[0] for _ in threads]
    for thread in threads:
        thread.join()
    assert sorted(m.seq for m in got) == [0, 1]
    assert all(set(text := m.answer.by_name["a"]) == {str(m.seq)} and len(text) == 3_000_000 for m in got)


def test_timeout_and_end_of_stream(pair):
    left, right = pair
    began = time.monotonic()
    with pytest.raises(ChannelTimeout):
        right.recv(0.1)
    assert 0.05 < time.monotonic() - began < 5
    left.close()
    with pytest.raises(ChannelClosed):
        right.recv(1.0)
    with pytest.raises(ChannelClosed):
        right.send(Reply(1))


def test_half_a_message_is_an_error(pair):
    left, right = pair
    left.sock.send(b"M" + b"\x10" + b"\0" * 7 + b"abc")
    left.close()
    with pytest.raises(ChannelClosed, match="inside a message"):
        right.recv(1.0)


def test_a_dead_process_ends_the_wait_even_if_a_fork_of_it_keeps_the_socket(pair):
    _, right = pair
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    pidfd = os.pidfd_open(process.pid)
    try:
        with pytest.raises(ChannelClosed):
            right.recv(20.0, pidfd)
    finally:
        process.wait()
        os.close(pidfd)


def test_an_end_that_does_not_read_ends_the_wait_of_the_other(pair):
    left, right = pair
    began = time.monotonic()
    with pytest.raises(ChannelTimeout, match="read nothing"):
        left.send(Reply(1, Checksums({"a": "x" * 10_000_000})), timeout_s=0.2)
    assert time.monotonic() - began < 5
    with pytest.raises(ChannelClosed):  # half a message cannot be mended
        left.send(Reply(2))
    with pytest.raises(ChannelClosed, match="inside a message"):
        right.recv(1.0)


def test_a_thread_that_waits_does_not_hold_up_another_for_ever(pair):
    left, right = pair

    def send() -> None:
        with pytest.raises(ChannelClosed):
            left.send(Reply(1, Checksums({"a": "x" * 10_000_000})))

    waiting = threading.Thread(target=send)
    waiting.start()
    while not right.is_readable():
        time.sleep(0.001)
    with pytest.raises(ChannelTimeout, match="another thread"):
        left.send(Reply(2), timeout_s=0.1)
    right.close()
    waiting.join(10.0)
    assert not waiting.is_alive()


def test_an_event_loop_that_makes_the_socket_non_blocking_changes_nothing(pair):
    left, right = pair
    for channel in pair:
        os.set_blocking(channel.fileno(), False)  # as uvloop does
    sending = threading.Thread(target=left.send, args=(Reply(1, Checksums({"a": "x" * 10_000_000})),))
    sending.start()
    assert right.recv(10.0)[0] == Reply(1, Checksums({"a": "x" * 10_000_000}))
    sending.join()
