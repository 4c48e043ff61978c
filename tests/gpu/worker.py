"""One trainer rank of a job: starts the engine once and runs scenarios on it, with torchrun's environment variables."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.scenarios import END, START
from gpu.scenarios.common import BACKEND, ON_GPU, Trainer

GARBAGE = 50_000  # objects, not 700: importing torch and transformers takes half as long again otherwise


class _Both(io.TextIOBase):
    """Writes to two streams."""

    def __init__(self, *streams: io.TextIOBase) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()
        return len(text)


@contextlib.contextmanager
def step(name: str, records: Path) -> Iterator[None]:
    """Run the body, write down how it went and what it printed, and end this process if it failed."""
    began, printed, passed = time.monotonic(), io.StringIO(), False
    print(f"==== {name} ====", flush=True)
    try:
        with contextlib.redirect_stdout(_Both(sys.stdout, printed)):  # type: ignore[type-var,arg-type]
            yield
        passed = True
    except BaseException:
        traceback.print_exc()
    record = {"step": name, "passed": passed, "seconds": time.monotonic() - began, "text": printed.getvalue()}
    with open(records, "a") as file:
        print(json.dumps(record), file=file)
    if not passed:
        sys.stdout.flush()
        os._exit(1)  # the engine may be in any state, and other ranks in the midst of a call


def run(trainer: Trainer, scenarios: list[str], records: Path) -> None:
    environment = dict(os.environ)
    with step(START, records):
        trainer.start()
    for name in scenarios:
        module, function = name.split(".")
        scenario: Callable[[Trainer], None] = getattr(importlib.import_module(f"gpu.scenarios.{module}"), function)
        dist.barrier()
        with step(name, records):
            scenario(trainer)
        gc.collect()  # FSDP's modules are in cycles
        if ON_GPU:
            torch.cuda.empty_cache()
    dist.barrier()
    with step(END, records):
        trainer.shutdown()
        assert not [name for name in sys.modules if name.split(".")[0] == "sglang"]
        assert dict(os.environ) == environment


def main() -> None:
    gc.set_threshold(GARBAGE)
    job = json.loads(sys.argv[1])
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(BACKEND)
    trainer = Trainer(job["path"], job["model"], job["tp"], job["server_args"])
    run(trainer, job["scenarios"], Path(f"rank{dist.get_rank()}.jsonl"))
    dist.barrier()  # rank 0 serves the store of all
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
