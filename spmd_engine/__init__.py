"""SGLang inside every rank of an RL trainer, fed with FSDP shards by a plan recorded once.

Importing this package imports neither torch nor sglang and changes no global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spmd_engine.errors import (
    AsleepError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    ConfigError,
    EngineBusyError,
    EngineClosedError,
    InvalidRequestError,
    MemoryNotOfferedError,
    MemoryOccupationError,
    PlanError,
    RankFailedError,
    SchedulerDiedError,
    SchedulerError,
    SpmdEngineError,
    TransferError,
    WeightsInconsistentError,
)

if TYPE_CHECKING:
    from spmd_engine.control.generation import FunctionCall
    from spmd_engine.engine import SpmdEngine
    from spmd_engine.planning.report import LinkSpeeds, PlanReport
    from spmd_engine.stats import EngineStats, UpdateStats
    from spmd_engine.verl_engine import VerlEngine

__version__ = "0.1.0"

__all__ = [
    "AsleepError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "ConfigError",
    "EngineBusyError",
    "EngineClosedError",
    "EngineStats",
    "FunctionCall",
    "InvalidRequestError",
    "LinkSpeeds",
    "MemoryNotOfferedError",
    "MemoryOccupationError",
    "PlanError",
    "PlanReport",
    "RankFailedError",
    "SchedulerDiedError",
    "SchedulerError",
    "SpmdEngine",
    "SpmdEngineError",
    "TransferError",
    "UpdateStats",
    "VerlEngine",
    "WeightsInconsistentError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "SpmdEngine":
        from spmd_engine.engine import SpmdEngine

        return SpmdEngine
    if name == "VerlEngine":
        from spmd_engine.verl_engine import VerlEngine

        return VerlEngine
    if name in ("EngineStats", "UpdateStats"):
        from spmd_engine import stats

        return getattr(stats, name)
    if name == "FunctionCall":
        from spmd_engine.control.generation import FunctionCall

        return FunctionCall
    if name in ("LinkSpeeds", "PlanReport"):
        from spmd_engine.planning import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
