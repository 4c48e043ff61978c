"""Recognises a module or a mapping whose tensors are where they were: the steady path's look at every weight.

Describing the 339 parameters of a 7B model takes fifty times as long as this. Where a tensor's data lies is asked
through DLPack's C exchange API, which torch has from 2.10 on (torch/_tensor.py: `__dlpack_c_exchange_api__`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from spmd_engine.transfer import _native

logger = logging.getLogger(__name__)

# What csrc/python/snapshot.cpp raises for what is no ordinary module or tensor: TorchScript's modules have no
# registries, and some tensors no address.
_STRANGE = (TypeError, AttributeError, BufferError, RuntimeError)
_warned: set[str] = set()


def _warn(why: str) -> None:
    """Say once that updates will take longer than they need."""
    if why not in _warned:
        _warned.add(why)
        logger.warning("each update describes all weights anew, which takes about fifty times as long: %s", why)


class Fingerprint:
    """Remembers which tensors a source has, and where.

    It keeps no tensor alive and holds no weak reference to one, either: with these, torch could not swap them, as
    `module.to()` does with DTensors.

    Args:
        source: a module, or a dict of tensors.
        tensors: those that matter.
    """

    def __init__(self, source: torch.nn.Module | dict[str, torch.Tensor], tensors: Iterable[torch.Tensor]) -> None:
        from torch.distributed.tensor import DTensor

        self._sharded_type = DTensor
        self._source = weakref.ref(source) if isinstance(source, torch.nn.Module) else None
        modules = list(source.modules()) if isinstance(source, torch.nn.Module) else []
        self._modules = list(map(weakref.ref, modules))
        registries: list[Any] = [r for m in modules for r in (m._parameters, m._buffers)] or [source]
        registered = {id(tensor) for registry in registries for tensor in registry.values()}
        listed = list(tensors)
        # Kept, so that no other sharding can get the identity of one of these.
        self._shardings = [tensor._spec for tensor in listed if isinstance(tensor, DTensor)]
        # A tensor that is not registered (made by a hook, say) could change unseen.
        sees_all = registered.issuperset(map(id, listed))
        if not sees_all:
            _warn("some weights are tensors that no module registers, made by a hook, for example")
        self._visited = b""
        self._seen = self._look(source) if sees_all else None

    def holds(self, source: object) -> bool:
        """Whether `source` is the one that was seen, with the same tensors at the same addresses, sharded alike."""
        if self._seen is None or (self._source is None and type(source) is not dict):
            return False
        _native.prefetch(self._visited)
        return self._look(source) == self._seen

    def _look(self, source: Any) -> bytes | None:
        """What is there now; None for another module, if some of its modules are gone, or if it cannot be told."""
        modules = [module() for module in self._modules]
        if (self._source is not None and self._source() is not source) or None in modules:
            return None
        try:
            mapping = source if self._source is None else {}
            seen, self._visited = _native.snapshot(modules, mapping, torch.Tensor, self._sharded_type)
        except _STRANGE as error:
            _warn(f"{type(error).__name__}: {error}")
            return None
        return seen
