"""File descriptors between real processes, with temporary files in place of memory."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from spmd_engine.control import timeouts
from spmd_engine.transfer import fd_passing
from spmd_engine.transfer.fd_passing import DescriptorServer, PassingError, close_all, fetch, receive_batch, send_batch

# Prints what is in the files that a server has: python -c FETCHER ADDRESS NAME=COUNT...
FETCHER = """
import os, sys
from spmd_engine.transfer import fd_passing
counts = {bytes.fromhex(name): int(count) for name, count in (word.split("=") for word in sys.argv[2:])}
for descriptors in fd_passing.fetch(sys.argv[1], counts, timeout_s=20.0):
    assert len(descriptors) <= fd_passing.BATCH and not any(map(os.get_inheritable, descriptors))
    for descriptor in descriptors:
        print(os.pread(descriptor, 100, 0).decode())
    fd_passing.close_all(descriptors)
"""
# Serves one file under the name 0xaa and says where.
SERVER = """
import sys, tempfile
from spmd_engine.transfer.fd_passing import DescriptorServer
file = tempfile.TemporaryFile()
print(DescriptorServer({b"\\xaa": [file.fileno()]}).address, flush=True)
sys.stdin.read()
"""
# Serves 100 files and fetches those at all addresses that it reads; all in flight at once would exceed the limit.
RANK = """
import os, resource, sys, tempfile
from spmd_engine.transfer.fd_passing import DescriptorServer, close_all, fetch
made = []
for number in range(100):
    with tempfile.TemporaryFile() as file:
        file.write(b"%s %d" % (sys.argv[1].encode(), number))
        file.flush()
        made.append(os.dup(file.fileno()))
if os.geteuid() == 0:
    os.setuid(65534)  # the kernel does not limit root
resource.setrlimit(resource.RLIMIT_NOFILE, (190, 190))
server = DescriptorServer({b"\\xaa": made})
print(server.address, flush=True)
for address in sys.stdin.readline().split():
    texts = []
    for descriptors in fetch(address, {b"\\xaa": 100}):
        texts += [os.pread(descriptor, 100, 0).decode().split() for descriptor in descriptors]
        close_all(descriptors)
    print(*{rank for rank, _ in texts}, [int(number) for _, number in texts] == list(range(100)), flush=True)
sys.stdin.read()
server.close()
"""


def files(count: int, start: int = 0) -> list[int]:
    """Open files without a name; the i-th has its number in it."""
    made = []
    for number in range(start, start + count):
        with tempfile.TemporaryFile() as file:
            file.write(str(number).encode())
            file.flush()
            made.append(os.dup(file.fileno()))
    return made


def run_fetcher(address: str, *words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FETCHER, address, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def server():
    made = DescriptorServer({b"\xaa": files(700), b"\xbb": files(3, start=1000)}, timeout_s=10.0)
    yield made
    made.close()


def test_other_processes_read_the_same_files_at_the_same_time(server):
    command = [sys.executable, "-c", FETCHER, server.address]
    both = [subprocess.Popen([*command, "bb=3", "aa=700"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    only_one = run_fetcher(server.address, "bb=3")
    assert only_one.stdout.split() == ["1000", "1001", "1002"], only_one.stderr
    for process in both:
        text, _ = process.communicate(timeout=60)
        assert text.split() == [*map(str, range(1000, 1003)), *map(str, range(700))]


def test_nothing_stays_open():
    before, threads = open_files(), threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fd_passing, "BATCH", 2)
        server = DescriptorServer({b"a": files(5)})
        fetched = [descriptor for batch in fetch(server.address, {b"a": 5}) for descriptor in batch]
    server.close()
    server.close()
    assert [os.pread(descriptor, 9, 0) for descriptor in fetched] == [b"0", b"1", b"2", b"3", b"4"]
    close_all(fetched)
    assert (open_files(), threading.active_count()) == (before, threads)
    with pytest.raises(PassingError, match="is gone"):
        list(fetch(server.address, {b"a": 5}))
    with pytest.raises(PassingError, match="nobody offers"):
        list(fetch("", {b"a": 5}))
    assert open_files() == before


def test_a_server_hands_on_what_came_in_batches():
    left, right = socket.socketpair()
    descriptors = files(300)

    def send():
        for start in range(0, 300, fd_passing.BATCH):
            send_batch(left, descriptors[start : start + fd_passing.BATCH], timeout_s=10.0)
        close_all(descriptors)
        left.close()

    with right:
        thread = threading.Thread(target=send)
        thread.start()
        server = DescriptorServer.receive(right, {b"\xaa": 100, b"\xbb": 200}, timeout_s=10.0)
        thread.join()
    done = run_fetcher(server.address, "bb=200")
    server.close()
    assert done.stdout.split() == [str(number) for number in range(100, 300)], done.stderr


def test_a_low_limit_of_open_files_is_raised_or_named():
    code = (
        "import resource, socket, sys\n"
        "from spmd_engine.transfer.fd_passing import DescriptorServer, PassingError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, int(sys.argv[2])))\n"
        "try:\n"
        "    server = DescriptorServer.receive(socket.socket(fileno=int(sys.argv[1])), {b'a': 100}, timeout_s=20.0)\n"
        "    print('all here', resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 100)\n"
        "    server.close()\n"
        "except PassingError as error:\n"
        "    print(error)\n"
    )
    descriptors = files(100)
    for hard, expected in ((1024, "all here True"), (40, "only 40 files open (hard limit 40)")):
        left, right = socket.socketpair()
        with right:
            command = [sys.executable, "-c", code, str(right.fileno()), str(hard)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=(right.fileno(),))
        with left:
            try:
                for start in (0, 50):
                    send_batch(left, descriptors[start : start + 50], timeout_s=20.0)
                assert hard == 1024
            except PassingError:
                assert hard == 40
            assert expected in process.communicate(timeout=30)[0]
    close_all(descriptors)


def test_a_server_that_dies_is_noticed_at_once():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    close_all(next(fetch(address, {b"\xaa": 1}, timeout_s=20.0)))
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # a signal takes its time on a busy machine
    killer = threading.Timer(0.3, process.kill)
    began = time.monotonic()
    killer.start()
    with pytest.raises(PassingError, match="is gone"):
        list(fetch(address, {b"\xaa": 1}, timeout_s=20.0))
    assert 0.1 < time.monotonic() - began < 10
    process.communicate()
    killer.join()


def test_a_peer_that_does_nothing_is_waited_for_only_so_long():
    began, before = time.monotonic(), open_files()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("")
        silent.listen()
        name = silent.getsockname()[1:].decode()
        with pytest.raises(PassingError, match="no answer in"):
            list(fetch(f"{name}/token", {b"a": 1}, timeout_s=0.2))
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(PassingError, match="not taken: no answer in"):
            send_batch(left, [left.fileno()], timeout_s=0.2)
        close_all(receive_batch(right))
        with pytest.raises(PassingError, match="no descriptors came: no answer"):
            receive_batch(right, timeout_s=0.1)
    assert time.monotonic() - began < 5
    assert open_files() == before


def test_strangers_get_nothing_and_hold_nobody_up(server):
    name, _, _ = server.address.partition("/")
    wrong = run_fetcher(f"{name}/{'0' * 32}", "aa=700")
    assert "is gone, or refused" in wrong.stderr and not wrong.stdout
    assert "is gone, or refused" in run_fetcher(server.address, "cc=1").stderr
    with socket.socket(socket.AF_UNIX) as garbage:
        garbage.connect(f"\0{name}")
        garbage.sendall(b"\xff" * 64)
        assert run_fetcher(server.address, "bb=3").stdout.split() == ["1000", "1001", "1002"]
    with socket.socket(socket.AF_UNIX) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeouts, "HELLO_S", 0.2)
        silent.connect(f"\0{name}")
        assert run_fetcher(server.address, "bb=3").stdout.split() == ["1000", "1001", "1002"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_another_user_is_refused(server):
    # As little of Python as possible: the other user may not be able to read this tree.
    code = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect('\\0' + sys.argv[1])\n"
        "try:\n"
        "    print(sock.recv(1))\n"
        "except ConnectionResetError:\n"
        "    print(b'')\n"
    )
    name, _, _ = server.address.partition("/")
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "b''", done.stderr


def test_ranks_that_all_serve_and_fetch_do_not_wait_for_one_another_for_ever():
    count = 6
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank)], **pipes) for rank in range(count)]
    addresses = [rank.stdout.readline().strip() for rank in ranks]
    for rank in ranks:
        rank.stdin.write(" ".join(addresses) + "\n")
        rank.stdin.flush()
    for rank in ranks:
        assert [rank.stdout.readline().split() for _ in addresses] == [[str(i), "True"] for i in range(count)]
    for rank in ranks:
        assert rank.communicate(timeout=30) == ("", "") and rank.returncode == 0


def test_too_many_descriptors_in_flight_are_waited_for(monkeypatch):
    left, right = socket.socketpair()
    tries = []

    def refuse_twice(sock, buffers, descriptors):
        tries.append(descriptors)
        if len(tries) < 3:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return send_fds(sock, buffers, descriptors)

    send_fds = socket.send_fds
    monkeypatch.setattr(socket, "send_fds", refuse_twice)
    with left, right:
        thread = threading.Thread(target=lambda: close_all(receive_batch(right)))
        thread.start()
        send_batch(left, [left.fileno()], timeout_s=10.0)
        thread.join()
    assert len(tries) == 3


def test_seven_hundred_descriptors(server):
    for descriptors in fetch(server.address, {b"\xaa": 700}):
        close_all(descriptors)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
