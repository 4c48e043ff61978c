"""`sglang.Engine` in a process of its own, as a rank of the benchmark sees it.

Run as a script, this is that process: it holds the engine as a trainer's first rank would, and does what the rank asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from launcher import end_with_parent
from processes import Held, cpu_s, held_by

from spmd_engine.trainer.environment import child_environment

CPU_ARGS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
}
_END_S = 30.0


class StockError(Exception):
    """The process of `sglang.Engine` ended, or did not answer."""


def stock_environment(*, on_cpu: bool, tp_size: int, scratch: Path) -> dict[str, str]:
    """The environment of `sglang.Engine` as if no launcher had started this process."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    made = child_environment(
        os.environ, on_cpu=on_cpu, tp_size=tp_size, nnodes=1, interface="lo", scratch=str(scratch), gpus=gpus
    )
    # Stock SGLang broadcasts requests, and binds its processes to NUMA nodes by numactl: leave that as it is.
    for name in ("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "SGLANG_NUMA_BIND_V2"):
        made.pop(name, None)
    return made


class StockEngine:
    """`sglang.Engine` in a process of its own, stopped while nobody uses it: SGLang's schedulers never sleep.

    Args:
        arguments: of `sglang.Engine`.
        on_cpu: whether it computes on the CPU.
        scratch: a directory for temporary files of its processes.
        timeout_s: seconds that any answer may take.

    Attributes:
        start_s: seconds that it took to import SGLang and to start the engine.
        max_total_tokens: of its KV cache.

    Raises:
        StockError: it did not start.
    """

    def __init__(self, arguments: Mapping[str, Any], *, on_cpu: bool, scratch: Path, timeout_s: float) -> None:
        import psutil

        self._timeout_s = timeout_s
        env = stock_environment(on_cpu=on_cpu, tp_size=arguments["tp_size"], scratch=scratch)
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], env=env, pass_fds=(theirs.fileno(),)
            )
        self._connection = Connection(ours.detach())
        try:
            self._answer()  # torch is there, as it is in a trainer
            self._before = held_by({self._popen.pid: "driver"})[0]
            self._connection.send(dict(arguments))
            self.start_s, self.max_total_tokens = self._answer()
        except BaseException:
            self.shutdown()
            raise
        children = psutil.Process(self._popen.pid).children(recursive=True)
        self.pids = {self._popen.pid: "driver", **{child.pid: _role(child.cmdline()) for child in children}}
        self._signal(signal.SIGSTOP)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: Mapping[str, Any], *, beside: bool
    ) -> tuple[float, float, list[list[int]]]:
        """Seconds that it took, CPU seconds of all its processes, and the tokens.

        Args:
            beside: a request each through `async_generate`, all at once, rather than one call for all.
        """
        with self.awake():
            before = cpu_s(self.pids)
            self._connection.send((list(prompts), dict(sampling_params), beside))
            seconds, tokens = self._answer()
            return seconds, cpu_s(self.pids) - before, tokens

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let its processes run for a while."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def held(self) -> tuple[list[Held], Held]:
        """What its processes hold now, and what the first of them held before it imported SGLang."""
        return held_by(self.pids), self._before

    def shutdown(self) -> None:
        """End its processes. May be called again."""
        if self._popen.poll() is None:
            if hasattr(self, "pids"):
                self._signal(signal.SIGCONT)
            with contextlib.suppress(OSError):
                self._connection.send(None)
            try:
                self._popen.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait(_END_S)
        self._connection.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _answer(self) -> Any:
        deadline = time.monotonic() + self._timeout_s
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise StockError(f"sglang.Engine gave no answer within {self._timeout_s:.0f} s")
            return self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise StockError("the process of sglang.Engine ended; what it printed is above") from error


def _role(command: list[str]) -> str:
    """SGLang names its processes."""
    name = " ".join(command).split()[0] if any(command) else "?"
    return name.removeprefix("sglang::") if name.startswith("sglang::") else "helper"


def main() -> None:
    end_with_parent()
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    connection.send(None)
    arguments = connection.recv()
    began = time.perf_counter()
    import sglang

    engine = sglang.Engine(**arguments)
    started_s = time.perf_counter() - began
    connection.send((started_s, engine.get_server_info()["max_total_num_tokens"]))

    async def beside(prompts: list[list[int]], params: dict[str, Any]) -> list[dict[str, Any]]:
        requests = (engine.async_generate(input_ids=prompt, sampling_params=params) for prompt in prompts)
        return await asyncio.gather(*requests)

    try:
        while (request := connection.recv()) is not None:
            prompts, params, is_beside = request
            began = time.perf_counter()
            if is_beside:
                outputs = engine.loop.run_until_complete(beside(prompts, params))
            else:
                outputs = engine.generate(input_ids=prompts, sampling_params=params)
            seconds = time.perf_counter() - began
            connection.send((seconds, [list(output["output_ids"]) for output in outputs]))
    finally:
        engine.shutdown()


# SGLang's processes import this file again.
if __name__ == "__main__":
    main()
