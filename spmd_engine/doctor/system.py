"""Checks of the operating system: memory of other processes, shared memory, open files."""

from __future__ import annotations

import json
import os
import resource

from spmd_engine.doctor import children
from spmd_engine.doctor.findings import Finding, Machine, failure, ok, warning

_SHARED_MEMORY = "/dev/shm"
# NCCL's documentation (Troubleshooting, Shared memory) asks for --shm-size=1g in containers, whose default is 64 MB.
_SHARED_BYTES = 1 << 30
# Chunks of expandable segments: 760 descriptors for 15 GB, beside torch's and SGLang's own files.
_OPEN_FILES = 4096
_PTRACE_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"
_MODULE = "spmd_engine.doctor.sharing"


def check_process_memory(machine: Machine) -> Finding:
    """Can one process read another one's memory with process_vm_readv, as a sibling and not as a descendant?"""
    scope = ""
    if os.path.exists(_PTRACE_SCOPE):
        with open(_PTRACE_SCOPE) as file:
            scope = f"; {_PTRACE_SCOPE} is {file.read().strip()}"
    try:
        with children.answering(
            ["-m", _MODULE, "offer", "cpu"], machine.environ, timeout_s=machine.timeout_s
        ) as offered:
            printed = children.run(
                ["-m", _MODULE, "read"], machine.environ, text=json.dumps(offered), timeout_s=machine.timeout_s
            )
        error = json.loads(printed)["error"]
    except children.ChildError as broken:
        error = str(broken)
    if not error:
        return ok(f"a process read 12 MiB of another one with process_vm_readv{scope}")
    found = f"a process cannot read another one's memory: {error}{scope}"
    fix = (
        "in a container: --cap-add=SYS_PTRACE, or a seccomp profile that allows process_vm_readv, and one container "
        f"for all ranks of a node; on the host: sysctl kernel.yama.ptrace_scope=1 or 0 if {_PTRACE_SCOPE} is 2 or 3"
    )
    if machine.gpu_count:
        return warning(f"{found}. Engines on GPUs need it only to verify weights that are kept in CPU memory", fix)
    return failure(f"{found}. Engines on the CPU read weights so", fix)


def check_shared_memory(machine: Machine) -> Finding:
    """Is there enough of /dev/shm for NCCL's and torch's transports?"""
    fix = "docker run --shm-size=1g (or --ipc=host); in Kubernetes an emptyDir of medium Memory at /dev/shm"
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return failure(f"no shared memory: {error}", fix)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    if not os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return failure(f"{_SHARED_MEMORY} cannot be written by this user", f"chmod 1777 {_SHARED_MEMORY}")
    text = f"{free / 2**20:.0f} MiB free of {total / 2**20:.0f} MiB in {_SHARED_MEMORY}"
    if total < _SHARED_BYTES:
        return warning(f"{text}: NCCL between GPUs of one node may run out of it", fix)
    if free < _SHARED_BYTES:
        return warning(f"{text}: something has filled it", f"ls -l {_SHARED_MEMORY}; remove what ended jobs left")
    return ok(text)


def check_open_files(machine: Machine) -> Finding:
    """May a process have as many files open as expandable segments need?"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} by default, {_limit(hard)} at most (the engine raises its own limit)"
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        return warning(
            f"{text}: too few for the descriptors of large models in expandable segments",
            "docker run --ulimit nofile=65536:65536; on the host LimitNOFILE= or /etc/security/limits.conf",
        )
    return ok(text)


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)
