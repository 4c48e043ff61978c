"""Tries the fallback once with zeros instead of weights, so that it fails before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spmd_engine.errors import PlanError
from spmd_engine.scheduler.recording.recording import Parameters, Recording, written_by

_NAMES_SHOWN = 5


def dry_run(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], recording: Recording, parameters: Parameters
) -> None:
    """Load weights as the fallback will, without writing any parameter, and note which regions it will write.

    Args:
        weights: `zeros` in their place, by their names for the loader.
        recording: added to.
        parameters: of the model.

    Raises:
        PlanError: the loader fails on them.
    """
    try:
        with torch.no_grad(), everywhere(lambda: _DryRunMode(recording, parameters)):
            model.load_weights((name, zero.contiguous()) for name, zero in weights.items())  # type: ignore[operator]
    except Exception as error:
        names = ", ".join(sorted(weights)[:_NAMES_SHOWN]) + (", ..." if len(weights) > _NAMES_SHOWN else "")
        raise PlanError(
            f"the engine's loader would have to load {names} by itself, and fails on zeros in their place: "
            f"{type(error).__name__}: {error}"
        ) from error


def zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in place of a weight, which take no memory before they are made contiguous."""
    return torch.zeros((), dtype=dtype, device=device).expand(*shape)


class _DryRunMode(TorchDispatchMode):
    """Notes which regions of parameters a loader writes, and lets it write none."""

    def __init__(self, recording: Recording, parameters: Parameters) -> None:
        super().__init__()
        self._recording, self._parameters = recording, parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = written_by(func, args, kwargs or {})
        targets = self._parameters.among(written)
        if not targets:
            return func(*args, **(kwargs or {}))
        self._recording.leave_to_fallback(targets)
        return written[0] if func._schema.returns else None


@contextlib.contextmanager
def everywhere(mode: Callable[[], TorchDispatchMode]) -> Iterator[None]:
    """A dispatch mode for this thread, and for those that a loader starts meanwhile."""
    submit = ThreadPoolExecutor.submit

    def submit_in_mode(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with torch.no_grad(), mode():
                return function(*args, **kwargs)

        return submit(pool, run)

    ThreadPoolExecutor.submit = submit_in_mode  # type: ignore[method-assign, assignment]
    try:
        with mode():
            yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
