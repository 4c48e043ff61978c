"""The two processes of the checks of shared memory: one offers memory, another one reads it.

    python -m spmd_engine.doctor.sharing offer cpu|cuda    prints an offer as JSON, keeps it until its input ends
    python -m spmd_engine.doctor.sharing read              takes an offer as JSON, prints what became of it

They use what an update uses: `Exporter`, `DescriptorServer`, `OpenHandles`, and the copies of the native module.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from spmd_engine.control import codec, timeouts
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.transfer import _native
from spmd_engine.transfer.fd_passing import DescriptorServer, PassingError
from spmd_engine.transfer.handles import Exporter, OpenHandles

_ELEMENTS = 3 << 20  # 12 MiB: over several chunks of an expandable segment


def _pattern(seed: int) -> np.ndarray:
    return np.arange(seed, seed + _ELEMENTS, dtype=np.int32)


def offer_cpu() -> dict[str, Any]:
    """Memory of this process, which others may read."""
    global _kept
    memory = _pattern(os.getpid())
    _kept = memory
    _native.allow_ptrace_by_any()
    return {"pid": os.getpid(), "address": memory.ctypes.data, "seed": os.getpid()}


def offer_cuda() -> dict[str, Any]:
    """Memory on every GPU, and what they are."""
    global _kept
    import torch

    count = torch.cuda.device_count()
    devices = [
        {"name": properties.name, "uuid": f"GPU-{properties.uuid}", "bytes": properties.total_memory}
        for properties in map(torch.cuda.get_device_properties, range(count))
    ]
    peers = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]
    kept = [torch.from_numpy(_pattern(device)).to(f"cuda:{device}") for device in range(count)]
    memories: list[dict[str, Any]] = []
    servers = []
    for device, tensor in enumerate(kept):
        torch.cuda.synchronize(device)
        try:
            memory, server = _export(tensor, device)
        except (RuntimeError, PassingError) as error:
            memories.append({"error": str(error)})
            continue
        servers.append(server)
        told = codec.encode(replace(memory, offered_at=server.address)).hex()
        memories.append({"memory": told, "chunks": sum(map(len, memory.chunks))})
    _kept = (kept, servers)
    return {"devices": devices, "peers": peers, "memories": memories}


_kept: object = None  # what is offered stays as long as this process


def _export(tensor: Any, device: int) -> tuple[ShardMemory, DescriptorServer]:
    exporter = Exporter()
    memory = exporter.export(
        np.array([tensor.data_ptr()], np.uint64), np.array([tensor.nbytes], np.uint64), device=device
    )
    counts = {handle: len(sizes) for handle, sizes in zip(memory.handles, memory.chunks, strict=True) if sizes}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(
            target=exporter.send_descriptors, args=(ours,), kwargs={"timeout_s": timeouts.DOCTOR_DESCRIPTORS_S}
        )
        thread.start()
        try:
            return memory, DescriptorServer.receive(theirs, counts, timeout_s=timeouts.DOCTOR_DESCRIPTORS_S)
        finally:
            thread.join()


def read_cpu(offer: dict[str, Any]) -> dict[str, Any]:
    """Copy the other process's memory here and compare."""
    here = np.zeros(_ELEMENTS, np.int32)
    raw = ElementType.RAW32
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table[0] = (offer["address"], here.ctypes.data, 1, _ELEMENTS, 0, 0, 0, raw, raw)
    try:
        _native.copy_cpu(table, pids=[offer["pid"]])
    except (_native.SourceError, _native.PosixError) as error:
        return {"error": str(error)}
    return {"error": "" if np.array_equal(here, _pattern(offer["seed"])) else "other bytes arrived than were offered"}


def read_cuda(offer: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the memory of every GPU with every GPU, and compare."""
    import torch

    results = []
    for reader in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{reader}")
        handles = OpenHandles(reader)
        for owner, offered in enumerate(offer["memories"]):
            error = offered.get("error") or _read_one(handles, reader, owner, offered)
            results.append({"owner": owner, "reader": reader, "error": error})
        handles.close()
    return results


def _read_one(handles: OpenHandles, reader: int, owner: int, offered: dict[str, Any]) -> str:
    """What went wrong; "" if nothing did."""
    import torch

    memory = codec.decode(bytes.fromhex(offered["memory"]), ShardMemory)
    raw = ElementType.RAW32
    try:
        address = handles.addresses(memory, np.array([0]))[0]
        here = torch.zeros(_ELEMENTS, dtype=torch.int32, device=f"cuda:{reader}")
        torch.cuda.synchronize(reader)
        table = np.zeros(1, BLOCK_COPY_DTYPE)
        table[0] = (address, here.data_ptr(), 1, _ELEMENTS, 0, 0, 0, raw, raw)
        with _native.CopyTable(table, device=reader) as copies:
            copies.launch()
            copies.elapsed_ms()  # waits
        right = np.array_equal(here.cpu().numpy(), _pattern(owner))
    except (RuntimeError, PassingError) as error:
        return str(error)
    return "" if right else "other bytes arrived than were offered"


def main() -> None:
    if sys.argv[1] == "offer":
        print(json.dumps(offer_cpu() if sys.argv[2] == "cpu" else offer_cuda()), flush=True)
        sys.stdin.read()
    else:
        offer = json.load(sys.stdin)
        print(json.dumps(read_cpu(offer) if "pid" in offer else read_cuda(offer)))


if __name__ == "__main__":
    main()
