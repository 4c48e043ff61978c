"""One thread for the connections of all gloo process groups of a process.

SGLang makes a dozen groups at TP 2. Torch gives each a device of its own, whose thread looks for work a hundred times a
second, and together they take more than a hundredth of a core for as long as the engine idles.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import Store, distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroupGloo, default_pg_timeout


class _OnOneDevice(ProcessGroupGloo):
    _devices: Any = None  # of the first group

    def __init__(
        self, store: Store, rank: int, size: int, timeout: timedelta = default_pg_timeout, **others: Any
    ) -> None:
        if _OnOneDevice._devices is None:
            super().__init__(store, rank, size, timeout=timeout, **others)
            _OnOneDevice._devices = self.options._devices  # type: ignore[attr-defined]
            return
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._timeout = _OnOneDevice._devices, timeout
        for name, value in others.items():  # newer versions of torch have more
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """Let the gloo groups that this process makes from now on share the device of the first one."""
    distributed_c10d.ProcessGroupGloo = _OnOneDevice  # type: ignore[misc]
