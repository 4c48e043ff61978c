"""`spmd-engine doctor` on this machine, and on one that lacks something. For GPUs: tests/gpu."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from spmd_engine import cli, doctor
from spmd_engine.doctor.findings import Status
from spmd_engine.doctor.network import chosen_interfaces
from spmd_engine.trainer.environment import with_this_package

TIMEOUT_S = 120
# Runs its arguments as a command without the system call process_vm_readv, as Docker's seccomp profile once did:
# a filter of four instructions (seccomp(2)), for x86-64 and aarch64.
WITHOUT_PROCESS_VM_READV = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 310, "aarch64": 270}[platform.machine()]
program = b"".join(struct.pack("HBBI", *code) for code in [
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)])
filters = ctypes.create_string_buffer(program)
fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, fprog, 0, 0) == 0, "PR_SET_SECCOMP"
os.execvp(sys.argv[1], sys.argv[1:])
"""


def run(*arguments, prefix=(), environ=None):
    """The findings of a real run by name, in a process of its own, and its exit status."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "GLOO_", "MASTER_", "PYTORCH_"))}
    env = with_this_package({**env, **(environ or {})})
    command = [*prefix, sys.executable, "-m", "spmd_engine.cli", "doctor", "--json", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] == (done.returncode == 0)
    return {finding["check"]: finding for finding in answer["findings"]}, done.returncode


def only(name, **kwargs):
    findings, status = run("--only", name, **kwargs)
    assert list(findings) == [name]
    found = findings[name]
    assert status == (found["status"] == "failure")
    assert bool(found["fix"]) == (found["status"] in ("warning", "failure"))
    return found


@pytest.mark.needs_sglang
def test_this_machine():
    findings, status = run()
    assert list(findings) == list(doctor.CHECKS)
    failed = [finding for finding in findings.values() if finding["status"] == "failure"]
    assert not failed and status == 0, failed
    assert {findings[name]["status"] for name in ("torch", "native-module", "process-memory")} == {"ok"}
    assert "its scheduler can be imported" in findings["sglang"]["found"]


def test_text_and_status(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nonsense0")
    assert cli.main(["doctor", "--only", "nccl", "--only", "open-files"]) == 1
    text = capsys.readouterr().out
    assert "open-files: " in text and "failure   nccl: NCCL_SOCKET_IFNAME=nonsense0 names none" in text
    assert "fix: unset NCCL_SOCKET_IFNAME" in text and "1 failure" in text.splitlines()[-1]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert cli.main(["doctor", "--only", "nccl"]) == 0


def test_a_check_that_breaks_is_a_failure_among_the_others(monkeypatch):
    def broken(machine):
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(doctor.CHECKS, "nccl", broken)
    findings = doctor.examine({}, only=("nccl", "open-files"))
    assert [finding.name for finding in findings] == ["open-files", "nccl"]
    assert findings[1].status is Status.FAILURE and "ZeroDivisionError: by zero" in findings[1].found


def test_memory_of_other_processes_that_the_kernel_keeps():
    found = only("process-memory", prefix=[sys.executable, "-c", WITHOUT_PROCESS_VM_READV])
    assert found["status"] in ("failure", "warning")  # a warning where there are GPUs
    assert "Operation not permitted" in found["found"] and "--cap-add=SYS_PTRACE" in found["fix"]


def test_shared_memory_of_a_container():
    unshare = [shutil.which("unshare") or "unshare", "-m", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], capture_output=True, check=False).returncode:
        pytest.skip("a file system of one's own cannot be mounted here")
    found = only("shared-memory", prefix=[*unshare, f'{mount} && exec "$@"', "sh"])
    assert found["status"] == "warning" and "of 64 MiB" in found["found"] and "--shm-size" in found["fix"]


@pytest.mark.parametrize(
    ("metadata", "code", "message"),
    [
        ("Version: 0.4.9", "", r"SGLang 0.4.9; supported are 0.5.17 to below 0.6"),
        ("Version: 0.5.17\nRequires-Dist: torch==1.0.0", "", "wants torch==1.0.0, but .* is installed"),
        ("Version: 0.5.17", "raise ImportError('libcudart.so.99 is missing')", "libcudart.so.99 is missing"),
    ],
)
def test_another_sglang(tmp_path, metadata, code, message):
    (tmp_path / "sglang-0.dist-info").mkdir()
    (tmp_path / "sglang-0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\n{metadata}\n")
    if code:
        (tmp_path / "sglang").mkdir()
        (tmp_path / "sglang" / "__init__.py").write_text(code)
    found = only("sglang", environ={"PYTHONPATH": str(tmp_path)})
    assert found["status"] == "failure" and "sglang==0.5.17" in found["fix"]

    assert re.search(message, found["found"]), found


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, Status.OK),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, Status.OK),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, Status.FAILURE),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "0"},
            Status.FAILURE,
        ),
    ],
)
def test_configurations_of_the_allocator(environ, status):
    (found,) = doctor.examine(environ, only=["expandable-segments"])
    assert found.status is status and bool(found.fix) == (status is Status.FAILURE)


@pytest.mark.parametrize(
    ("value", "exact", "chosen"),
    [
        ("eth", False, ["eth0", "eth1"]),
        ("=eth", False, []),
        ("=eth1,ib0", False, ["eth1", "ib0"]),
        ("^lo,docker", False, ["eth0", "eth1", "ib0"]),
        ("eth", True, []),
        ("eth0,ib0", True, ["eth0", "ib0"]),
    ],
)
def test_interfaces_are_chosen_as_nccl_and_gloo_choose_them(value, exact, chosen):
    assert chosen_interfaces(value, ["lo", "docker0", "eth0", "eth1", "ib0"], exact=exact) == chosen


@pytest.mark.parametrize(
    ("environ", "status", "message"),
    [
        ({"NCCL_P2P_DISABLE": "1"}, Status.WARNING, "through CPU memory"),
        ({"NCCL_CUMEM_ENABLE": "0"}, Status.WARNING, "ncclUnhandledCudaError"),
        ({"GLOO_SOCKET_IFNAME": "lo,nonsense0"}, Status.OK, "lo,nonsense0"),
        ({"GLOO_SOCKET_IFNAME": "l"}, Status.FAILURE, "names none"),
        ({"NCCL_IB_DISABLE": "0"}, Status.OK, "NCCL_IB_DISABLE=0"),
    ],
)
def test_variables_of_nccl(environ, status, message):
    (found,) = doctor.examine(environ, only=["nccl"])
    assert found.status is status and message in found.found


@pytest.mark.parametrize(
    ("rendezvous", "environ", "status", "message"),
    [
        ("", {}, Status.SKIPPED, "neither --rendezvous"),
        ("127.0.0.1", {}, Status.OK, "one node"),
        ("", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, Status.OK, "one node"),
        ("no-such-host.invalid:29500", {}, Status.FAILURE, "no known name"),
    ],
)
def test_rendezvous(rendezvous, environ, status, message):
    (found,) = doctor.examine(environ, only=["rendezvous"], rendezvous=rendezvous)
    assert found.status is status and message in found.found


def test_rendezvous_at_this_node():
    own = socket.gethostbyname(socket.gethostname())
    (found,) = doctor.examine({}, only=["rendezvous"], rendezvous=own)
    assert found.status is Status.OK and ("this very node" in found.found or own.startswith("127."))
