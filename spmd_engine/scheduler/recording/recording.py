"""What a recording holds, and what recorders have to know of models, tensors and operations."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from spmd_engine.planning import coverage
from spmd_engine.planning.coverage import Region
from spmd_engine.planning.dtypes import ELEMENT_TYPES
from spmd_engine.planning.plan import RecordedCopy

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ELEMENT_TYPES}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Recording:
    """What `load_weights` did.

    Attributes:
        copies: in the order in which they were made.
        fallback: names of weights whose loading is not a plain copy, and why it is not.
        fallback_parameters: names of the parameters that such weights reach.
        constants: (address, sizes, strides) of regions that the loader filled by itself, or the fallback will.
    """

    copies: list[RecordedCopy] = field(default_factory=list)
    fallback: dict[str, str] = field(default_factory=dict)
    fallback_parameters: set[str] = field(default_factory=set)
    constants: list[Region] = field(default_factory=list)

    def used(self) -> set[str]:
        """Names of the weights that the loader took."""
        return {copy.weight for copy in self.copies} | self.fallback.keys()

    def leave_to_fallback(self, targets: Iterable[tuple[str, Region]]) -> None:
        """Note regions of parameters that the fallback writes."""
        self.fallback_parameters |= {name for name, _ in targets}
        self.constants += [where for _, where in targets]


class Parameters:
    """Where the parameters and buffers of a model are."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.device = next(model.parameters()).device
        self._tensors: dict[str, torch.Tensor] = {}
        self._spans: dict[int, tuple[int, str]] = {}  # start -> end, the first of its names
        for name, tensor in list_tensors(model):
            self._tensors[name] = tensor
            if tensor.numel():
                self._spans.setdefault(tensor.data_ptr(), (tensor.data_ptr() + tensor.nbytes, name))
        self._starts = sorted(self._spans)

    def at(self, tensor: torch.Tensor) -> str | None:
        """Name of the parameter or buffer that `tensor` is a view of."""
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at < 0 or not tensor.numel():
            return None
        end, name = self._spans[self._starts[at]]
        return name if address < end else None

    def among(self, tensors: Iterable[torch.Tensor]) -> list[tuple[str, Region]]:
        """Of those tensors that are views of parameters or buffers the names of these, and the regions."""
        return [(name, region(tensor)) for tensor in tensors if (name := self.at(tensor)) is not None]

    def overlap(self, name: str, where: Region, copies: Iterable[RecordedCopy]) -> bool:
        """Whether some of the copies write to a region of a parameter, as far as it can be told."""
        regions = {coverage.region_of(copy) for copy in copies if copy.parameter == name}
        if not regions:
            return False
        tensor = self._tensors[name]
        base, shape = tensor.data_ptr(), tuple(tensor.shape)
        return (
            where in regions
            or not tensor.is_contiguous()
            or coverage.uncovered([where, *regions], base, tensor.element_size(), shape) is None
        )


def list_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; one storage may appear under several names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def region(tensor: torch.Tensor) -> Region:
    """Address, sizes and strides."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def tensors_of(args: Any, kwargs: Any = None) -> list[torch.Tensor]:
    """The tensors among arguments or results, which may be in lists. (torch's pytree takes ten times as long.)"""
    found = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operation's arguments that it changes."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return tensors_of([given.get(x.name) for x in func._schema.arguments if x.alias_info and x.alias_info.is_write])


def storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
