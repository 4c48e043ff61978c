"""verl 0.9: the rollout `spmd`, SGLang inside the ranks of verl's hybrid workers.

Switched on by `actor_rollout_ref.rollout.name=spmd`. verl finds it by the entry point `verl.plugins` of this package,
or by `VERL_USE_EXTERNAL_MODULES=spmd_engine.integrations.verl` in the environment of every process. Importing this
package registers it, which is what both ways rely on.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

NAME = "spmd"
_PACKAGE = "spmd_engine.integrations.verl"


def register() -> None:
    """Tell verl of the rollout and its replica. Their modules are imported when verl asks for them.

    Raises:
        ImportError: this verl has no registry of replicas (it came with 0.6).
    """
    try:
        from verl.workers.rollout.base import _ROLLOUT_REGISTRY
        from verl.workers.rollout.replica import RolloutReplicaRegistry
    except ImportError as error:
        # verl keeps quiet about a plug-in that fails, and says later only that it does not know the rollout.
        logger.error(
            "the rollout %r cannot be registered with this verl (%s); for verl 0.3 to 0.5 set "
            "actor_rollout_ref.model.external_lib=spmd_engine.integrations.verl_legacy instead",
            NAME,
            error,
        )
        raise
    _ROLLOUT_REGISTRY[(NAME, "async")] = f"{_PACKAGE}.rollout.SpmdRollout"
    RolloutReplicaRegistry.register(NAME, _load_replica)


def _load_replica() -> type[Any]:
    from spmd_engine.integrations.verl.replica import SpmdReplica

    return SpmdReplica


register()
