"""`spmd-engine doctor`: is this machine fit for SpmdEngine, and if not, what must change?

What can be tried is tried, with the functions that the engine itself uses and between processes of their own: nothing
here makes a CUDA context or imports SGLang in the calling process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from spmd_engine.doctor import gpus, network, software, system
from spmd_engine.doctor.findings import Finding, Machine, Status

Check = Callable[[Machine], Finding]

#: All checks by name, in the order in which they are made and shown.
CHECKS: dict[str, Check] = {
    "torch": software.check_torch,
    "native-module": software.check_native_module,
    "sglang": software.check_sglang,
    "memory-saver": software.check_memory_saver,
    "gpus": gpus.check_gpus,
    "peer-to-peer": gpus.check_peer_to_peer,
    "cuda-ipc": gpus.check_cuda_ipc,
    "cuda-vmm": gpus.check_cuda_vmm,
    "expandable-segments": gpus.check_expandable_segments,
    "process-memory": system.check_process_memory,
    "shared-memory": system.check_shared_memory,
    "open-files": system.check_open_files,
    "nccl": network.check_nccl,
    "rendezvous": network.check_rendezvous,
}


def examine(
    environ: Mapping[str, str], *, only: Collection[str] = (), rendezvous: str = "", timeout_s: float = 120.0
) -> list[Finding]:
    """Make the checks, one after the other.

    Args:
        environ: the environment that a trainer rank would have.
        only: names from `CHECKS`; empty for all of them.
        rendezvous: "host" or "host:port" where the ranks of a job meet; by default that of MASTER_ADDR.
        timeout_s: for every process that a check starts.

    Returns:
        One finding for each check. A check that itself breaks is a failure that says how.
    """
    machine = Machine(environ, rendezvous=rendezvous, timeout_s=timeout_s)
    return [_run(name, check, machine) for name, check in CHECKS.items() if not only or name in only]


def _run(name: str, check: Check, machine: Machine) -> Finding:
    try:
        return check(machine).named(name)
    except Exception as error:
        return Finding(
            Status.FAILURE,
            f"the check itself broke: {type(error).__name__}: {error}",
            "report this, with the output of spmd-engine doctor --json",
        ).named(name)
