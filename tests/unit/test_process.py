from __future__ import annotations

import os
import resource
import socket

import pytest

from spmd_engine.control.channel import Channel
from spmd_engine.control.messages import PROTOCOL, Failed, GroupAddress, Packing, Parsed, Start, ToScheduler, ToTrainer
from spmd_engine.trainer.process import SchedulerProcess, open_log

_AFTER = Parsed("text-1", "", [])


@pytest.fixture
def start(tmp_path):
    """Of a process that fails as soon as it looks at what it was handed as its listening socket."""
    group = GroupAddress(ranks=(3,), host="127.0.0.1", port=1, token="", listener_fd=os.open(os.devnull, os.O_RDONLY))
    return Start(
        protocol=PROTOCOL,
        rank=3,
        tp_rank=0,
        group=group,
        model_path="",
        server_args={},
        random_seed=0,
        store_port=0,
        store_fd=-1,
        gpu_id=0,
        on_cpu=True,
        node="",
        nnodes=1,
        node_rank=0,
        host="127.0.0.1",
        trainer_pid=os.getpid(),
        scratch=str(tmp_path / "scratch"),
        timeout_s=60.0,
        weight_version=0,
        is_restart=False,
        keeps_mapped=False,
    )


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_a_failure_is_reported_wherever_the_log_goes(start, tmp_path, disk_is_full):
    log = open("/dev/full", "w+b") if disk_is_full else open_log(tmp_path / "logs", 3)  # noqa: SIM115
    descriptors = len(os.listdir("/proc/self/fd"))
    process = SchedulerProcess(start, env=dict(os.environ), log=log)
    try:
        message = process.recv(timeout_s=60.0)
        assert isinstance(message, Failed) and message.error.rank == 3
        assert message.error.kind == "SchedulerError" and "OSError" in message.error.message
        assert process.wait(60.0) == 1
        assert disk_is_full or "Traceback" in process.log_tail()
    finally:
        process.stop(grace_s=0.0)
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2  # the log, and what was handed over


def test_logs_are_their_owners(tmp_path):
    with open_log(tmp_path / "new", 3) as one, open_log(tmp_path / "new", 3) as two:
        assert one.fileno() != two.fileno()
    files = list((tmp_path / "new").iterdir())
    assert len(files) == 2 and all(path.name.startswith("scheduler-rank3-") for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_of_a_crash_the_log_shows_how_it_begins(start, tmp_path):
    log = open_log(tmp_path / "logs", 3)
    process = SchedulerProcess(start, env=dict(os.environ), log=log)
    try:
        process.wait(60.0)
        log.write(b"x" * 5000 + b"\nncclCommAbort: the cause\nFatal Python error: Aborted\n" + b"a stack\n" * 3000)
        log.write(b"Extension modules: " + b"numpy, " * 2000)
        log.flush()
        tail = process.log_tail()
        assert "the cause\nFatal Python error: Aborted\na stack" in tail and "Extension" not in tail
        assert len(tail) <= 4000
    finally:
        process.stop(grace_s=0.0)


@pytest.fixture
def asked_to_pack(monkeypatch):
    """A trainer's end whose scheduler process asks it to pack and then says goodbye, and the other end of the link."""
    monkeypatch.setattr(SchedulerProcess, "__init__", lambda self: None)
    process, (ours, theirs) = SchedulerProcess(), socket.socketpair()
    process.rank, process.channel, process._pidfd = 3, Channel(ours, ToTrainer), -1
    scheduler, (link, end) = Channel(theirs, ToScheduler), socket.socketpair()
    with end:
        scheduler.send(Packing(), (end.fileno(),))
    scheduler.send(_AFTER)
    link.settimeout(10.0)
    return process, link


def test_without_a_descriptor_left_the_packers_link_is_closed_and_the_process_goes_on(asked_to_pack, caplog):
    process, link = asked_to_pack
    process.on_packing = lambda sock: pytest.fail("there was a descriptor")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        assert process.recv(timeout_s=10.0) == _AFTER
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "rank 3 cannot pack its shards: too many files are open" in caplog.text
    assert link.recv(1) == b""


def test_without_a_thread_left_the_packers_link_is_closed_and_the_process_goes_on(asked_to_pack, caplog):
    process, link = asked_to_pack

    def refuse(sock):
        raise RuntimeError("can't start new thread")

    process.on_packing = refuse
    assert process.recv(timeout_s=10.0) == _AFTER
    assert "rank 3 cannot pack its shards: can't start new thread" in caplog.text
    assert link.recv(1) == b""
