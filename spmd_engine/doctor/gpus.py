"""Checks of GPUs: which are seen, whether they reach one another, and whether processes can share their memory."""

from __future__ import annotations

import json
from typing import Any

from spmd_engine.doctor import children
from spmd_engine.doctor.findings import Finding, Machine, failure, ok, skipped, warning

_NO_GPU = "no GPU"
_MODULE = "spmd_engine.doctor.sharing"
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_BUSY = (
    "two processes must share each GPU: nvidia-smi -c DEFAULT leaves exclusive-process mode; in a container, start it "
    "with --gpus and, if processes of several containers take part, --ipc=host --pid=host"
)


def check_gpus(machine: Machine) -> Finding:
    """Which GPUs does a trainer rank see?"""
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if not machine.gpu_count:
        if machine.has_gpu_nodes:
            return warning(
                f"this machine has NVIDIA devices, but none is seen (CUDA_VISIBLE_DEVICES={visible!r}): the engine "
                "would run on the CPU",
                "unset CUDA_VISIBLE_DEVICES, or give it ordinals, e.g. 0,1",
            )
        return skipped(f"{_NO_GPU}: the engine runs on the CPU, with process memory in place of CUDA's")
    try:
        devices = _share(machine, expandable=False)["devices"]
    except children.ChildError as error:
        return failure(f"CUDA does not start in a process of its own: {error}", _BUSY)
    names = "; ".join(f"{i}: {device['name']}, {device['bytes'] / 2**30:.0f} GiB" for i, device in enumerate(devices))
    if visible and not all(name.strip().isdecimal() for name in visible.split(",")):
        return warning(
            f"{names}; CUDA_VISIBLE_DEVICES={visible}: SGLang reads ordinals there, and without them does not use its "
            "custom all-reduce",
            "name GPUs by ordinal: CUDA_VISIBLE_DEVICES=0,1",
        )
    return ok(names)


def check_peer_to_peer(machine: Machine) -> Finding:
    """Can every GPU read every other one?"""
    if machine.gpu_count < 2:
        return skipped(f"{machine.gpu_count} GPUs: there is no pair" if machine.gpu_count else _NO_GPU)
    try:
        peers = _share(machine, expandable=False)["peers"]
    except children.ChildError as error:
        return failure(f"CUDA does not start in a process of its own: {error}", _BUSY)
    apart = [f"{j} → {i}" for i, row in enumerate(peers) for j, reaches in enumerate(row) if not reaches]
    if apart:
        return failure(
            f"no peer-to-peer access: {', '.join(apart)} (owner → reader)",
            "shards of one trainer must be on GPUs that reach one another: nvidia-smi topo -p2p r says why they do "
            "not; switch off the IOMMU or ACS on bare metal, or use GPUs joined by NVLink",
        )
    return ok(f"each of {len(peers)} GPUs reaches each other one")


def check_cuda_ipc(machine: Machine) -> Finding:
    """Can another process read memory of cudaMalloc, that of torch's default allocator?"""
    return _check_sharing(
        machine,
        expandable=False,
        what="memory of cudaMalloc",
        fix=f"{_BUSY}; leave backend:cudaMallocAsync out of PYTORCH_CUDA_ALLOC_CONF",
    )


def check_cuda_vmm(machine: Machine) -> Finding:
    """Can another process read memory of torch's expandable segments, through file descriptors?"""
    found = _check_sharing(
        machine,
        expandable=True,
        what="memory of expandable segments",
        fix=f"{_BUSY}; or leave expandable_segments out of PYTORCH_CUDA_ALLOC_CONF, and unset "
        "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC",
    )
    if found.status == "failure" and not expandable_segments(machine):
        return warning(f"{found.found}. This trainer's environment does not ask for expandable segments", found.fix)
    return found


def check_expandable_segments(machine: Machine) -> Finding:
    """Does the allocator's configuration fit?"""
    set_ = " ".join(f"{name}={machine.environ[name]}" for name in _ALLOCATOR_VARIABLES if name in machine.environ)
    if "backend:cudaMallocAsync" in set_.replace(" ", ""):
        return failure(
            f"{set_}: memory of cudaMallocAsync cannot be shared with another process",
            "leave backend:cudaMallocAsync out",
        )
    if not expandable_segments(machine):
        return ok(f"off ({set_})" if set_ else "off: weights are shared by CUDA IPC handles")
    if machine.environ.get("TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC") == "0":
        return failure(
            f"{set_}, but TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=0 makes their memory one that cannot be shared",
            "unset TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC, or leave expandable_segments out",
        )
    return ok(f"on ({set_}): weights are shared by file descriptors; scheduler processes run without")


def expandable_segments(machine: Machine) -> bool:
    """Whether the trainer's allocator shall make them."""
    text = ",".join(machine.environ.get(name, "") for name in _ALLOCATOR_VARIABLES)
    return "expandable_segments:true" in text.lower().replace(" ", "")


def _check_sharing(machine: Machine, *, expandable: bool, what: str, fix: str) -> Finding:
    if not machine.gpu_count:
        return skipped(_NO_GPU)
    from spmd_engine.transfer import _native

    if not _native.has_cuda():
        return skipped("the native module was built without CUDA: see native-module")
    try:
        shared = _share(machine, expandable=expandable)
    except children.ChildError as error:
        return failure(f"{what} cannot be shared between two processes: {error}", fix)
    results = shared["results"]
    bad = [result for result in results if result["error"]]
    if bad:
        pairs = ", ".join(f"{result['owner']} → {result['reader']}" for result in bad)
        return failure(
            f"{what} of another process cannot be read for {len(bad)} of {len(results)} pairs of GPUs, owner → reader "
            f"{pairs}: {bad[0]['error']}",
            fix,
        )
    chunks = sum(memory["chunks"] for memory in shared["memories"])
    if expandable and not chunks:
        return warning(
            "torch makes no expandable segments here although PYTORCH_CUDA_ALLOC_CONF asks for them",
            "leave expandable_segments out of PYTORCH_CUDA_ALLOC_CONF",
        )
    how = f"by {chunks} file descriptors" if expandable else "by CUDA IPC handles"
    return ok(f"every GPU read {what} of another process on every GPU, {how}: {len(results)} pairs, all bytes right")


def _share(machine: Machine, *, expandable: bool) -> dict[str, Any]:
    """What one process offered and another one read; done once for each kind of memory.

    Raises:
        ChildError: a process broke.
    """
    key = f"sharing/{expandable}"
    if key not in machine.shared:
        environ = {name: value for name, value in machine.environ.items() if name not in _ALLOCATOR_VARIABLES}
        # Torch before 2.9 knows the second name only, later ones both.
        environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{expandable}"
        try:
            with children.answering(["-m", _MODULE, "offer", "cuda"], environ, timeout_s=machine.timeout_s) as offer:
                text, results = json.dumps(offer), []
                if any("memory" in memory for memory in offer["memories"]):
                    printed = children.run(["-m", _MODULE, "read"], environ, text=text, timeout_s=machine.timeout_s)
                    results = json.loads(printed)
                else:
                    results = [{"owner": i, "reader": i, **memory} for i, memory in enumerate(offer["memories"])]
            machine.shared[key] = {**offer, "results": results}
        except children.ChildError as error:
            machine.shared[key] = error
    found = machine.shared[key]
    if isinstance(found, children.ChildError):
        raise found
    shared: dict[str, Any] = found
    return shared
