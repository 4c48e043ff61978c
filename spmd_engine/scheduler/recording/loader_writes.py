"""What a loader writes into parameters besides weights: constants, and what it computes from parameters.

Recording runs on parameters that may be in use, and whose values are not yet those of the weights. So these writes wait
until all copies are known. Constants are written then, unless a weight overwrites them; the weights on which other
writes depend are left to the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from spmd_engine.planning.coverage import Region
from spmd_engine.scheduler.recording.recording import Parameters, Recording, storage_id, tensors_of, written_by

aten = torch.ops.aten
WEIGHT = ""  # in place of a parameter's name: what a weight should have filled, and a recording does not
_FILLS = {aten.fill_.Scalar, aten.zero_.default}


@dataclass(frozen=True)
class _Write:
    """An operation that changes parameters by something else than a weight. It waits until all copies are known.

    Attributes:
        targets: the parameters, and which regions of them.
        sources: names of parameters that it depends on; None for a constant.
    """

    run: Callable[[], Any]
    targets: list[tuple[str, Region]]
    sources: frozenset[str] | None

    def touches(self, parameters: set[str]) -> bool:
        """Whether it has to do with some of the parameters."""
        return not parameters.isdisjoint(self.sources or ()) or any(name in parameters for name, _ in self.targets)


class LoaderWrites:
    """Those of one recording.

    Args:
        recording: what is known of the loader's copies; added to.
        parameters: of the model.

    Attributes:
        filled: regions to which weights are copied.
    """

    def __init__(self, recording: Recording, parameters: Parameters) -> None:
        self._recording, self._parameters = recording, parameters
        self.filled: set[Region] = set()
        self._writes: list[_Write] = []
        # Tensors of the loader's own that come from parameters, which have their old values: by storage, with names of
        # the parameters, or WEIGHT. The reference keeps another storage from having the id.
        self._derived: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}

    def perform(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation on the loader's own tensors and on parameters does."""
        written = written_by(func, args, kwargs)
        targets = self._parameters.among(written)
        if not targets:
            result = func(*args, **kwargs)
            sources = self._sources(tensors_of(args, kwargs))
            if sources is not None:
                for tensor in (*written, *tensors_of((result,))):
                    if self._parameters.at(tensor) is None:  # else it is a view of one
                        self.derive(tensor, sources)
            return result
        # What is changed in place comes from itself; what is filled or copied to does not.
        inputs = [] if func in _FILLS else tensors_of(args[1:] if func is aten.copy_.default else args, kwargs)
        sources = self._sources(inputs)
        if sources is not None and WEIGHT in sources:
            self._recording.leave_to_fallback(targets)
        else:
            if sources is None and not self.filled.isdisjoint(where for _, where in targets):
                sources = frozenset()  # it replaces a weight
            self._recording.constants += [where for _, where in targets]
            self._writes.append(_Write(partial(func, *args, **kwargs), targets, sources))
        return written[0] if func._schema.returns else None

    def derive(self, tensor: torch.Tensor, sources: frozenset[str]) -> None:
        """Note what a tensor of the loader's own comes from."""
        self._derived[storage_id(tensor)] = StorageWeakRef(tensor.untyped_storage()), sources

    def _sources(self, tensors: Iterable[torch.Tensor]) -> frozenset[str] | None:
        """Names of the parameters that the tensors come from, and WEIGHT; None if they come from neither."""
        found: set[str] | None = None
        for tensor in tensors:
            name = self._parameters.at(tensor)
            known = frozenset([name]) if name is not None else self._derived.get(storage_id(tensor), (None, None))[1]
            if known is not None:
                found = (found or set()) | known
        return None if found is None else frozenset(found)

    def settle(self) -> None:
        """Do the writes that depend on no weight, and leave the weights on which others depend to the fallback."""
        recording = self._recording
        weighted = {copy.parameter for copy in recording.copies} | recording.fallback_parameters
        involved: set[str] = set()
        constant = self._writes
        while True:  # until no more of them turn out to depend on weights
            of_weights, others = list[_Write](), list[_Write]()
            for one in constant:
                depends = one.sources is not None and one.touches(weighted)
                (of_weights if depends else others).append(one)
            if not of_weights:
                break
            for one in of_weights:
                involved |= {*(name for name, _ in one.targets), *(one.sources or ())}
                recording.fallback_parameters |= {name for name, _ in one.targets}
            weighted |= involved
            constant = others
        for copy in recording.copies:
            if copy.parameter in involved:
                why = f"its loader changes {copy.parameter}, or computes with it, after having filled it"
                recording.fallback.setdefault(copy.weight, why)
        with torch.no_grad():
            for one in constant:
                # The parameters may be in use: what weights replace keeps its values until they come.
                if not any(self._parameters.overlap(name, where, recording.copies) for name, where in one.targets):
                    one.run()
