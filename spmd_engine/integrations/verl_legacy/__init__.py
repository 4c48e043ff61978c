"""verl 0.3 to 0.5: SpmdEngine in the place of their SGLang rollout.

Switched on by `actor_rollout_ref.model.external_lib=spmd_engine.integrations.verl_legacy`, beside the usual
`actor_rollout_ref.rollout.name=sglang`. verl imports that module in every worker before it builds the rollout, and
looks for the rollout's classes afterwards, by importing modules of its own. Those have no registry: importing this
package puts modules of the same names, with classes of the same names, into `sys.modules`. That is all it changes.
"""

from __future__ import annotations

import sys
import types

from spmd_engine.errors import ConfigError
from spmd_engine.integrations.verl_legacy.rollout import SGLangRollout
from spmd_engine.integrations.verl_legacy.sharding_manager import FSDPSGLangShardingManager

__all__ = ["FSDPSGLangShardingManager", "SGLangRollout", "install"]

_PLACES: tuple[tuple[str, type], ...] = (
    ("verl.workers.rollout.sglang_rollout", SGLangRollout),
    ("verl.workers.rollout.sglang_rollout.sglang_rollout", SGLangRollout),
    ("verl.workers.sharding_manager.fsdp_sglang", FSDPSGLangShardingManager),
)


def install() -> None:
    """Put the classes where verl looks for its own. Does nothing the second time.

    Raises:
        ConfigError: verl's own classes were imported before; they may be in use.
    """
    for name, cls in _PLACES:
        found = sys.modules.get(name)
        if found is not None and getattr(found, cls.__name__, None) is not cls:
            raise ConfigError(
                f"{name} was imported before spmd_engine.integrations.verl_legacy: name the latter in "
                "actor_rollout_ref.model.external_lib and import neither of them yourself"
            )
    for name, cls in _PLACES:
        module = types.ModuleType(name, f"Stands in for verl's module of this name: {__name__}.")
        module.__path__ = []  # type: ignore[attr-defined]  # a package without modules of its own
        setattr(module, cls.__name__, cls)
        sys.modules.setdefault(name, module)


install()
