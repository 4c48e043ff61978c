"""`spmd-engine doctor` where there are GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from spmd_engine.transfer import _native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="spmd_engine was built without CUDA"),
]


def run(*names: str, **environ: str) -> dict[str, dict[str, Any]]:
    only = [word for name in names for word in ("--only", name)]
    command = [sys.executable, "-m", "spmd_engine.cli", "doctor", "--json", *only]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTORCH_", "NCCL_"))}
    done = subprocess.run(command, env={**env, **environ}, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout, done.stderr
    print(done.stdout)
    return {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_memory_of_gpus_is_shared_for_real() -> None:
    pairs = torch.cuda.device_count() ** 2
    found = run("torch", "native-module", "gpus", "peer-to-peer", "cuda-ipc", "cuda-vmm", "memory-saver")
    assert found["peer-to-peer"]["status"] == ("ok" if pairs > 1 else "skipped"), found
    for name in {*found} - {"peer-to-peer"}:
        assert found[name]["status"] == "ok", found[name]
    assert torch.cuda.get_device_properties(0).name in found["gpus"]["found"]
    for name in ("cuda-ipc", "cuda-vmm"):
        assert f"{pairs} pairs, all bytes right" in found[name]["found"]
    assert "file descriptors" in found["cuda-vmm"]["found"] and "IPC handles" in found["cuda-ipc"]["found"]
    assert "of 256 MiB" in found["memory-saver"]["found"]


def test_memory_that_torch_does_not_make_shareable() -> None:
    """Torch then makes its chunks without a handle type; a trainer that asks for them cannot be served."""
    environ = {"TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "0"}
    found = run("cuda-vmm", "expandable-segments", **environ)
    assert found["cuda-vmm"]["status"] == "warning" and "cannot be shared" in found["cuda-vmm"]["found"]
    assert found["expandable-segments"]["status"] == "ok"
    found = run("cuda-vmm", "expandable-segments", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", **environ)
    assert {finding["status"] for finding in found.values()} == {"failure"}


def test_gpus_that_are_hidden_or_named_oddly() -> None:
    assert run("gpus", CUDA_VISIBLE_DEVICES="")["gpus"]["status"] == "warning"
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    found = run("gpus", CUDA_VISIBLE_DEVICES=uuid)["gpus"]
    assert found["status"] == "warning" and "name GPUs by ordinal" in found["fix"]
