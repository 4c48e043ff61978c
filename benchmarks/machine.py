"""What the machine can do, what the processes on it hold, and the floor under a weight update.

`python benchmarks/machine.py` prints the number of GPUs and the copy ceilings as JSON. The launcher runs it as a
process of its own, so that no context or memory of that measurement stays with the ranks.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

CEILING_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
HOST_BYTES = 1 << 30
SAMPLE_S = 0.001

Ceilings = Mapping[str, float | None]


# ---- copy ceilings and the floor ----


def median_copy_s(run: Callable[[], Any], *, device: torch.device, repeat: int = 10) -> float:
    """Median seconds of `run`, by the device's clock on a GPU."""
    times = []
    for _ in range(repeat + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def measure_ceilings() -> dict[str, float | None]:
    """GB/s of large copies, each byte counted once.

    Returns:
        "local" inside a device, "peer" from another one (None if alone), "host" from pinned CPU memory to a GPU.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    size = CEILING_BYTES[device.type]

    def rate(source: torch.device) -> float:
        here = torch.zeros(size, dtype=torch.uint8, device=device)
        there = torch.ones(size, dtype=torch.uint8, device=source)
        return size / median_copy_s(lambda: here.copy_(there), device=device) / 1e9

    local = rate(device)
    if device.type == "cpu":
        return {"local": local, "peer": local, "host": None}  # all ranks share one memory
    pinned = torch.ones(HOST_BYTES, dtype=torch.uint8).pin_memory()
    to_gpu = torch.empty(HOST_BYTES, dtype=torch.uint8, device=device)
    host = HOST_BYTES / median_copy_s(lambda: to_gpu.copy_(pinned, non_blocking=True), device=device) / 1e9
    peer = rate(torch.device("cuda", 1)) if torch.cuda.device_count() > 1 else None
    return {"local": local, "peer": peer, "host": host}


def floor_s(local: int, remote: int, staged: int = 0, *, written_per_read: float, ceilings: Ceilings) -> float:
    """Seconds that the copy of one rank takes at least.

    All its bytes go through its own memory, and at the same time those of other ranks come over the link.

    Args:
        local, remote: bytes read from the rank's own shard, and from those of other ranks.
        staged: bytes that come to a GPU from CPU memory.
        written_per_read: 1 without a cast; 0.5 for float32 to bfloat16. A ceiling counts a byte that is read and
            written once, so a cast counts the mean of what it reads and writes.
        ceilings: GB/s, from `measure_ceilings`.

    Raises:
        ValueError: bytes came from a peer, and its ceiling is unknown.
    """
    rate = ceilings["local"]
    assert rate is not None
    memory = (local + remote) * (1 + written_per_read) / 2 / (rate * 1e9)
    if staged and ceilings["host"]:
        memory = max(memory, staged / (ceilings["host"] * 1e9))
    if not remote:
        return memory
    link = ceilings["peer"]
    if link is None:
        raise ValueError(f"{remote} bytes came from other ranks, but the rate from a peer was not measured")
    return max(memory, remote / (link * 1e9))


# ---- which machine ----


def header(device: torch.device, **facts: Any) -> dict[str, Any]:
    """Commit, hardware and versions, and the `facts` of this run."""
    on_gpu = device.type == "cuda"
    commit = _ask("git", "rev-parse", "--short", "HEAD") or os.environ.get("SPMD_ENGINE_COMMIT") or "unknown"
    if commit != "unknown" and _ask("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "driver": _driver() if on_gpu else "none",
        "cuda": torch.version.cuda if on_gpu else "none",
        "torch": torch.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default",
        **facts,
    }


def _ask(*command: str) -> str:
    """First line of what a command prints in this folder; empty if it cannot run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


def _driver() -> str:
    return _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


# ---- memory and other resources ----


def resident_bytes(pids: Sequence[int]) -> int:
    """Resident memory of some processes, pages that they share counted in each."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


def device_used_bytes(device: torch.device) -> int:
    """Memory in use on a GPU, of all processes together."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def resources(device: torch.device, processes: Mapping[str, int]) -> dict[str, int]:
    """What processes hold: resident bytes, open descriptors and mappings of each, and the memory in use on the GPU.

    Args:
        processes: process ids by name.
    """
    found = {} if device.type == "cpu" else {"gpu_bytes": device_used_bytes(device)}
    for name, pid in processes.items():
        found[f"{name}_resident_bytes"] = resident_bytes([pid])
        found[f"{name}_descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
        found[f"{name}_mappings"] = Path(f"/proc/{pid}/maps").read_bytes().count(b"\n")
    return found


class PeakMemory:
    """Samples memory every millisecond while it is entered: of this rank's GPU, or of processes on the CPU.

    Args:
        device: this rank's device.
        pids: the processes to count on the CPU.

    Attributes:
        before: bytes when it was entered.
        peak: largest number of bytes seen since.
    """

    def __init__(self, device: torch.device, pids: Sequence[int]) -> None:
        self._device, self._pids = device, tuple(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self.before = self.peak = 0

    def level(self) -> int:
        """Bytes in use now."""
        return resident_bytes(self._pids) if self._device.type == "cpu" else device_used_bytes(self._device)

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self.level()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _sample(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread starts on device 0
        while not self._stop.wait(SAMPLE_S):
            self.peak = max(self.peak, self.level())


if __name__ == "__main__":
    print(json.dumps({"gpus": torch.cuda.device_count(), "ceilings_gb_s": measure_ceilings()}))
