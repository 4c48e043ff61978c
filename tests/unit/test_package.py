"""What importing the package does, and the small pieces that need no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import spmd_engine
from spmd_engine import errors
from spmd_engine.trainer.environment import child_environment, is_safe_cache, memory_saver_library
from spmd_engine.trainer.rendezvous import interface_of

PROBE = """
import json, os, sys, threading
import torch
import torch.distributed
before = (dict(os.environ), threading.active_count(), set(sys.modules))
import spmd_engine
from spmd_engine import SpmdEngine
new = {name.split(".")[0] for name in set(sys.modules) - before[2]}
print(json.dumps({
    "env": dict(os.environ) == before[0], "threads": threading.active_count() - before[1],
    "cuda": torch.cuda.is_initialized(),
    "heavy": sorted(new & {"sglang", "transformers", "ray", "verl", "zmq", "triton"}),
}))
"""


def test_import_brings_nothing_heavy_and_has_no_side_effects():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"env": True, "threads": 0, "cuda": False, "heavy": []}


def test_every_public_name_exists():
    assert all(getattr(spmd_engine, name) is not None for name in spmd_engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = spmd_engine.nonsense


def test_errors_cross_the_process_with_their_type():
    for name in spmd_engine.__all__:
        cls = getattr(errors, name, None)
        if isinstance(cls, type) and issubclass(cls, errors.SpmdEngineError):
            error = errors.ErrorReport(name, "what happened", 3).to_exception()
            assert type(error) is cls and str(error) == "what happened"
    died = errors.ErrorReport("SchedulerDiedError", "gone", 3).to_exception()
    assert isinstance(died, errors.SchedulerDiedError) and died.rank == 3
    odd = errors.ErrorReport("ErrorReport", "no exception", 1).to_exception()
    assert type(odd) is errors.SchedulerError and "no exception" in str(odd)


def make(environ, **kwargs):
    return child_environment(environ, **{"on_cpu": False, "tp_size": 2, "scratch": "/s", **kwargs})


def test_child_environment_leaves_the_launcher_out():
    launcher = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LOCAL_RANK": "1",
        "SGLANG_REQ_WAITING_TIMEOUT": "5",
    }
    made = make({**launcher, "PATH": "/bin", "NCCL_DEBUG": "INFO"})
    assert not launcher.keys() & made.keys()
    assert made["PATH"] == "/bin" and made["NCCL_DEBUG"] == "INFO" and made["NCCL_CUMEM_ENABLE"] == "0"
    assert made["TMPDIR"] == "/s"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("expandable_segments:True", None),
        ("expandable_segments:True,max_split_size_mb:128", "max_split_size_mb:128"),
        ("max_split_size_mb:128", "max_split_size_mb:128"),
    ],
)
def test_child_environment_drops_expandable_segments(value, kept):
    assert make({"PYTORCH_CUDA_ALLOC_CONF": value}).get("PYTORCH_CUDA_ALLOC_CONF") == kept


def test_child_environment_on_cpu_asks_for_our_platform_by_name():
    environ = dict(os.environ)
    made = make(environ, on_cpu=True)
    assert made["SGLANG_PLATFORM"] == "spmd_engine" and made["CUDA_VISIBLE_DEVICES"] == ""
    assert len(made["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2
    assert "SGLANG_PLATFORM" not in make({"SGLANG_PLATFORM": "spmd_engine"})
    assert "SGLANG_NUMA_BIND_V2" not in made and make({})["SGLANG_NUMA_BIND_V2"] == "false"


def test_child_environment_listens_on_one_interface():
    made = make({}, interface="eth1")
    assert (made["GLOO_SOCKET_IFNAME"], made["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")
    theirs = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}
    assert theirs.items() <= make(theirs, interface="eth1").items()
    assert not theirs.keys() & make({}).keys()
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") == ""
    assert interface_of("::1") in ("lo", "")  # "" where IPv6 is switched off


def test_compiled_kernels_are_taken_from_no_directory_that_others_can_write(tmp_path):
    assert is_safe_cache(str(tmp_path / "new" / "cache")) and is_safe_cache(str(tmp_path / "new" / "cache"))
    assert os.stat(tmp_path / "new" / "cache").st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert not any(is_safe_cache(str(tmp_path / name)) for name in ("link", "file", "open"))
    if os.getuid() == 0:
        os.chown(tmp_path / "new", 12345, -1)
        assert not is_safe_cache(str(tmp_path / "new"))


def test_child_environment_preloads_the_memory_saver():
    environ = {"LD_PRELOAD": "/lib/other.so"}
    assert make(environ, preload="/lib/saver.so")["LD_PRELOAD"] == "/lib/saver.so:/lib/other.so"
    assert make({}, preload="/lib/saver.so")["NCCL_GRAPH_REGISTER"] == "0"
    assert make(environ)["LD_PRELOAD"] == "/lib/other.so" and environ == {"LD_PRELOAD": "/lib/other.so"}
    assert "LD_PRELOAD" not in make({}) and "NCCL_GRAPH_REGISTER" not in make({})


@pytest.mark.needs_sglang
def test_a_missing_memory_saver_is_named(monkeypatch):
    assert os.path.isfile(memory_saver_library()) and "LD_PRELOAD" not in os.environ
    monkeypatch.setitem(sys.modules, "torch_memory_saver.utils", None)
    with pytest.raises(errors.ConfigError, match="pip install torch-memory-saver"):
        memory_saver_library()


def test_the_platform_plug_in_stays_out_of_other_programs(monkeypatch):
    from spmd_engine.scheduler.adapter.cpu_platform import activate

    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "spmd_engine")
    assert activate() == "spmd_engine.scheduler.adapter.cpu_platform.PlainCpuPlatform"
