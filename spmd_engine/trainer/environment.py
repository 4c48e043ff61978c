"""Makes the environment of a scheduler process."""

from __future__ import annotations

import os
import site
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from spmd_engine.errors import ConfigError

_LAUNCHER_VARIABLES = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", "SGLANG_DP_RANK", "SGLANG_USE_CPU_ENGINE", "SGLANG_PLATFORM",
}  # fmt: skip
_TIMEOUTS = {
    "SGLANG_REQ_WAITING_TIMEOUT", "SGLANG_REQ_RUNNING_TIMEOUT", "SGLANG_QUEUED_TIMEOUT_MS", "SGLANG_FORWARD_TIMEOUT_MS",
}  # fmt: skip
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def with_this_package(environ: Mapping[str, str]) -> dict[str, str]:
    """A copy of `environ` in which another Python, of this environment, finds this very package."""
    env, home = dict(environ), str(Path(__file__).resolve().parents[2])
    if home not in (*site.getsitepackages(), site.getusersitepackages()):  # not installed: imported from a source tree
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
    return env


def child_environment(
    environ: Mapping[str, str],
    *,
    on_cpu: bool,
    tp_size: int,
    nnodes: int = 1,
    interface: str = "",
    scratch: str,
    gpus: str = "",
    preload: str = "",
) -> dict[str, str]:
    """The environment of a scheduler process: made from `environ`, which stays as it is.

    It sees `gpus`, a value of CUDA_VISIBLE_DEVICES, whatever its trainer rank sees, and its communication libraries
    listen on the network `interface` alone, if that is known and the environment names no other. Left out are the
    launcher's rendezvous variables (with TORCHELASTIC_USE_AGENT_STORE the child would wait for ever for a store that
    nobody serves) and expandable segments (SGLang's memory saver refuses them). The library `preload` is loaded before
    all others. The `tp_size` ranks of its replica are on `nnodes` nodes, equally many on each.
    """
    env = {k: v for k, v in environ.items() if k not in _LAUNCHER_VARIABLES and not k.startswith("TORCHELASTIC_")}
    for name in _ALLOCATOR_VARIABLES:
        if name in env:
            kept = [item for item in env[name].split(",") if not item.strip().startswith("expandable_segments")]
            env[name] = ",".join(kept)
            if not env[name]:
                del env[name]
    env.setdefault("NCCL_CUMEM_ENABLE", "0")
    env.setdefault("NCCL_NVLS_ENABLE", "0")
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    env["PYTHONUNBUFFERED"] = "1"
    env = with_this_package(env)
    # What SGLang leaves behind in the temporary directory goes with the engine.
    env["TMPDIR"] = scratch
    # Each rank would end requests by a clock of its own.
    env = {name: value for name, value in env.items() if name not in _TIMEOUTS}
    # It takes shared memory and a process of its own, for broadcasts that no scheduler of ours makes.
    env["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"
    if interface:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without =, a prefix of names
    if preload:
        env["LD_PRELOAD"] = ":".join(filter(None, [preload, env.get("LD_PRELOAD")]))
        # Graphs whose memory is paused get other physical pages at the same addresses, which NCCL must not register.
        env.setdefault("NCCL_GRAPH_REGISTER", "0")
    if not on_cpu:
        env["CUDA_VISIBLE_DEVICES"] = gpus
        # Where SGLang would start its processes with numactl, near their GPUs: let ours do the same by itself.
        env["SGLANG_NUMA_BIND_V2"] = "false"
        cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
        if is_safe_cache(cache):  # compiled kernels are kept
            env.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    else:
        cores, ranks_here = sorted(os.sched_getaffinity(0)), tp_size // nnodes
        env["SGLANG_PLATFORM"] = "spmd_engine"
        env["CUDA_VISIBLE_DEVICES"] = ""
        env["SGLANG_NCCL_SO_PATH"] = "/nonexistent/libnccl.so"
        env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _core_bindings(cores, tp_size, ranks_here))
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // ranks_here)))
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # SGLang compiles a few small functions with Inductor, which takes a C++ compiler and 15 s at the first call.
        env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return env


def is_safe_cache(path: str) -> bool:
    """Whether only this user can have written below `path`, a directory that is made if it is not there.

    Inductor unpickles and runs what it finds in its cache, and anyone may make a directory of that name in /tmp.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _core_bindings(cores: list[int], tp_size: int, ranks_here: int) -> str:
    share = max(1, len(cores) // ranks_here)
    groups = [cores[(i * share) % len(cores) :][:share] for i in range(tp_size)]
    return "|".join(",".join(map(str, group)) for group in groups)


def memory_saver_library() -> str:
    """Path of the library that must be preloaded into a scheduler process whose GPU memory is to be released.

    Raises:
        ConfigError: torch_memory_saver is not installed, or not for this CUDA version.
    """
    try:
        from torch_memory_saver.utils import get_binary_path_from_package

        return str(get_binary_path_from_package("torch_memory_saver_hook_mode_preload"))
    except (ImportError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"enable_memory_saver needs torch_memory_saver: pip install torch-memory-saver ({error})"
        ) from error
