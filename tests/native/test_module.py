# SPDX-License-Identifier: Apache-2.0
"""Importing the native module, and what it says when it is not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType
from spmd_engine.transfer import _native


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_layout_of_the_table() -> None:
    assert BLOCK_COPY_DTYPE.itemsize == 56
    assert [BLOCK_COPY_DTYPE.fields[name][1] for name in BLOCK_COPY_DTYPE.names] == [0, 8, 16, 24, 32, 40, 48, 52, 54]
    assert [t.itemsize for t in ElementType] == [4, 2, 2, 1, 2, 4, 8]


def test_import_has_no_side_effects() -> None:
    code = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import numpy\n"
        "threads = set(os.listdir('/proc/self/task'))\n"
        "import spmd_engine.transfer._native\n"
        "print('torch' in sys.modules, os.environ == before, set(os.listdir('/proc/self/task')) == threads)"
    )
    assert run(code).split() == ["False", "True", "True"]


def nvcc_version() -> tuple[int, ...]:
    """Of the CUDA toolkit that is here, () if there is none."""
    if shutil.which("nvcc") is None:
        return ()
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"release (\d+)\.(\d+)", said)[0]))


@pytest.mark.skipif(nvcc_version() < (12, 5), reason="no nvcc of 12.5 or newer: the CUDA backend cannot be built here")
@pytest.mark.skipif(os.environ.get("SPMD_ENGINE_CUDA") == "OFF", reason="SPMD_ENGINE_CUDA=OFF")
def test_cuda_is_built_where_it_can_be() -> None:
    assert _native.has_cuda()


def test_a_missing_build_says_how_to_build() -> None:
    code = (
        "import sys\n"
        "sys.modules['spmd_engine._C'] = None\n"
        "try:\n"
        "    import spmd_engine.transfer._native\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "pip install -e ." in run(code)


@pytest.mark.skipif(_native.has_cuda(), reason="the CUDA backend was built")
def test_without_cuda_its_functions_say_so() -> None:
    for call in (
        lambda: _native.export_allocation(4096),
        lambda: _native.IpcMapping(b"\0" * 64, device=0),
        lambda: _native.ChunkMapping([1 << 21], device=0),
        lambda: _native.device_uuid(0),
    ):
        with pytest.raises(_native.NativeError, match="SPMD_ENGINE_CUDA=ON"):
            call()
