"""The scheduler process of this trainer rank: how it is started, heard, and ended."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import site
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from spmd_engine.channel import Channel, ChannelClosed, ChannelTimeout, Packing, Shutdown, Start
from spmd_engine.errors import ConfigError

logger = logging.getLogger(__name__)

LOG_TAIL_BYTES = 4000
# How a process that crashes begins; stacks of all its threads, and a list of all its modules, follow.
_CRASHES = ("terminate called", "Fatal Python error")
_CRASH_BYTES = 64 << 10
# Launchers and Ctrl-C send these to whole process groups: what they mean for the engine is the trainer rank's choice.
FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_KILL_S = 30.0
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
    env, home = dict(environ), str(Path(__file__).resolve().parents[1])
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


class ProcessDied(Exception):
    """The scheduler process ended without saying why."""


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """A process that is started in here does not hear `FOR_THE_TRAINER` until it has chosen to."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SchedulerProcess:
    """A running `python -m spmd_engine.scheduler`, the child of this process.

    Args:
        start: its first message; `start.link.listener_fd` and `start.store_fd`, if any, are handed over and closed
            here, and `start.scratch` is removed when the process has ended.
        env: its whole environment.
        log: open file for what it prints, from `open_log`; closed when the process has ended.

    Attributes:
        on_packing: takes the socket over which the process asks for shards to be packed.
    """

    def __init__(self, start: Start, *, env: dict[str, str], log: IO[bytes]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.rank = start.rank
        self._scratch = start.scratch
        self.log = log
        handed_over = [fd for fd in (start.link.listener_fd, start.store_fd) if fd >= 0]
        # -P: a package of the same name in the working directory is not ours.
        command = [sys.executable, "-P", "-m", "spmd_engine.scheduler", str(theirs.fileno())]
        try:
            with _blocked():
                self._popen = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *handed_over),
                )
        except BaseException:
            ours.close()
            self.log.close()
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            theirs.close()
            for fd in handed_over:
                os.close(fd)
        self.pid = self._popen.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except (OSError, AttributeError):  # not offered by this kernel or Python: a closed socket still tells
            self._pidfd = -1
        self._owner_pid = os.getpid()
        self.channel = Channel(ours)
        self.on_packing: Callable[[socket.socket], None] = lambda sock: sock.close()
        self._timeout_s = start.timeout_s
        self.send(start)

    def send(self, message: object, fds: tuple[int, ...] = ()) -> None:
        """Send a message. A process that is gone is noticed by the next `recv`, which knows more.

        Raises:
            ChannelTimeout: the process did not read for `timeout_s` seconds.
        """
        with contextlib.suppress(ChannelClosed):
            self.channel.send(message, fds, timeout_s=self._timeout_s)

    def recv(self, *, timeout_s: float, spin_s: float = 0.0) -> Any:
        """The next message. Arguments as for `Channel.recv`.

        Raises:
            ChannelTimeout: nothing in `timeout_s` seconds.
            ProcessDied: the process ended.
        """
        while True:
            try:
                message, fds = self.channel.recv(timeout_s, self._pidfd, spin_s)
            except ChannelClosed:
                raise ProcessDied from None
            if not isinstance(message, Packing):
                return message
            # If nobody takes the socket it is closed, and the scheduler process fails the update, on all ranks.
            if not fds:
                logger.error("rank %d cannot pack its shards: too many files are open (ulimit -n)", self.rank)
                continue
            sock = socket.socket(fileno=fds[0])
            try:
                self.on_packing(sock)
            except RuntimeError as error:  # there is no thread left
                sock.close()
                logger.error("rank %d cannot pack its shards: %s", self.rank, error)

    def wait(self, timeout_s: float) -> int | None:
        """Exit status once the process has ended, None if it still runs after `timeout_s` seconds."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def is_stopped(self) -> bool:
        """Whether the process is stopped, by SIGSTOP or a debugger."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
        return False

    def log_tail(self) -> str:
        """The end of the log; of a crash, how it begins."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self.log.fileno()).st_size
            text = os.pread(self.log.fileno(), _CRASH_BYTES, max(0, size - _CRASH_BYTES)).decode(errors="replace")
            crashes = [at for word in _CRASHES if (at := text.find(word)) >= 0]
            if crashes:
                text = text[: min(crashes) + LOG_TAIL_BYTES // 2]
            return text[-LOG_TAIL_BYTES:].strip()
        return ""

    def stop(self, *, grace_s: float) -> None:
        """End the process: asked first, killed after `grace_s` seconds. Safe to call again.

        One that hangs in a call of the kernel, of the GPU's driver, say, is left behind.
        """
        if os.getpid() != self._owner_pid:  # a forked copy of the trainer must not end its parent's engine
            return
        if self._popen.poll() is None and grace_s > 0:
            with contextlib.suppress(ChannelClosed, ChannelTimeout):
                self.channel.send(Shutdown(), timeout_s=grace_s)
            self.wait(grace_s)
        if self._popen.poll() is None:
            self._popen.kill()
        if self.wait(_KILL_S) is None:
            logger.error("rank %d: scheduler process %d does not end: it hangs in the kernel", self.rank, self.pid)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self.channel.close()
        self.log.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def open_log(log_dir: str | os.PathLike[str] | None, rank: int) -> IO[bytes]:
    """A new log in `log_dir`, for its owner alone; without one, a file without a name that vanishes with the processes
    that have it open."""
    if log_dir is None:
        return tempfile.TemporaryFile(prefix="spmd-engine-")
    directory = Path(log_dir)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    prefix = f"scheduler-rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-"
    fd, _ = tempfile.mkstemp(prefix=prefix, suffix=".log", dir=directory)
    return open(fd, "w+b")
