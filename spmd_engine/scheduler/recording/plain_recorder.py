"""The quick way to record a loader that does nothing but slice weights and copy the slices, as nearly all loaders do.

A `PlainStandIn` is a `meta` tensor of torch's own: a view of it costs what it costs in C++, and the storage that it
shares says which weight it shows. What a loader calls is seen where Python calls torch, not in torch's dispatcher.
Whatever is neither a view, nor a question about the shape, nor a copy into a parameter, ends the attempt with a
`NotPlainError`: `recorder.Recorder` sees every operation, and takes twice as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from spmd_engine.planning.coverage import Region
from spmd_engine.planning.layout import Weight
from spmd_engine.planning.plan import RecordedCopy
from spmd_engine.scheduler.recording.recording import (
    DTYPE_NAMES,
    DTYPES,
    Parameters,
    Recording,
    region,
    storage_id,
    tensors_of,
)

_Tensor = torch.Tensor


def _functions(*names: str) -> set[Any]:
    """A function as a method of tensors and, where torch has it, as a function of its own."""
    return {getattr(owner, name) for owner in (_Tensor, torch) for name in names if hasattr(owner, name)}


def _getters(*names: str) -> set[Any]:
    return {getattr(_Tensor, name).__get__ for name in names}


# Some of them may convert or lay out anew instead: what is copied in the end tells by its storage.
_VIEWS = (
    _functions("narrow", "squeeze", "unsqueeze", "view", "reshape", "flatten", "transpose", "permute", "t", "select")
    | _functions("chunk", "split", "unbind", "contiguous", "detach", "view_as", "unflatten", "movedim")
    | _functions("to", "float", "half", "bfloat16")
    | {_Tensor.__getitem__}
    | _getters("data", "T", "mT")
)
_QUESTIONS = (
    _functions("size", "dim", "numel", "stride", "nelement", "ndimension", "element_size", "is_contiguous")
    | _functions("storage_offset", "is_floating_point", "is_complex")
    | {_Tensor.__len__}
    | _getters("shape", "dtype", "ndim", "requires_grad", "layout", "is_sparse", "is_quantized", "nbytes")
)


# Methods that change a tensor's elements.
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS)} | {
    name for name in dir(_Tensor) if name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
}


# The same as functions of their own.
_CHANGES = {value for name, value in vars(torch).items() if name.endswith("_") and callable(value)}


class NotPlainError(BaseException):
    """A loader does more with weights than to copy slices of them. Some loaders catch `Exception`, and go on."""


class PlainStandIn(torch.Tensor):
    """A weight without data, or a view of one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _QUESTIONS:
                return func(*args, **(kwargs or {}))
            stand_in = args[0] if args else None
            if func in _VIEWS and isinstance(stand_in, PlainStandIn):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, _Tensor):
                    return result.as_subclass(PlainStandIn)
                return tuple(one.as_subclass(PlainStandIn) for one in result)
        raise NotPlainError(f"its loader calls {getattr(func, '__name__', func)}")


class _Functions(TorchFunctionMode):
    """Sees the functions that are no methods: some change an argument, or another one (`out=`)."""

    def __init__(self, refuse: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "out" in kwargs:
            for target in tensors_of((kwargs["out"],)):
                self._refuse(target)
        elif func in _CHANGES:
            for target in tensors_of(args[:1]):
                self._refuse(target)
        return func(*args, **(kwargs or {}))


class PlainRecorder:
    """Records one pass of `load_weights`.

    Args:
        model: SGLang's model; its parameters are not written, except by constants that the loader itself writes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._parameters = model, Parameters(model)
        self._recording = Recording()
        self._fills: list[tuple[str, Region, Callable[[], Any]]] = []  # they wait until all copies are known
        self._weights: dict[int, tuple[str, torch.Tensor]] = {}  # by storage; the tensor keeps it

    def stand_in(self, weight: Weight) -> torch.Tensor:
        """A tensor that stands for a weight of the trainer."""
        meta = torch.empty(weight.shape, dtype=DTYPES[weight.dtype], device="meta")
        self._weights[storage_id(meta)] = weight.name, meta
        return meta.as_subclass(PlainStandIn)

    def run(self, weights: Sequence[tuple[str, torch.Tensor]]) -> Recording:
        """Call `load_weights` with stand-ins.

        Args:
            weights: (name for the loader, stand-in), which may be views of weights under other names.

        Raises:
            NotPlainError: the loader is none of those that this recorder understands, or it refuses a weight.
        """
        self._recording, self._fills = Recording(), []
        try:
            with torch.no_grad(), self._watch(), _Functions(self._refuse):
                self._model.load_weights(iter(weights))  # type: ignore[operator]
        except Exception as error:
            raise NotPlainError(str(error)) from error
        if any(self._parameters.overlap(name, where, self._recording.copies) for name, where, _ in self._fills):
            raise NotPlainError("its loader fills a part of a parameter twice")
        with torch.no_grad():
            for *_, fill in self._fills:
                fill()
        return self._recording

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """Note what the loader writes into parameters: stand-ins, and constants such as a vocabulary's padding."""

        def copy_(target: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if isinstance(source, PlainStandIn) or isinstance(target, PlainStandIn):
                self._copy(target, source)
                return target
            self._refuse(target)
            return originals["copy_"](target, source, *args, **kwargs)

        def constant(name: str) -> Callable[..., Any]:
            def fill(target: torch.Tensor, *args: Any) -> Any:
                parameter = None if isinstance(target, PlainStandIn) else self._parameters.at(target)
                if parameter is None or any(isinstance(value, _Tensor) for value in args):
                    self._refuse(target)
                    return originals[name](target, *args)
                self._recording.constants.append(region(target))
                self._fills.append((parameter, region(target), partial(originals[name], target, *args)))
                return target

            return fill

        def refused(name: str) -> Callable[..., Any]:
            def change(target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self._refuse(target)
                return originals[name](target, *args, **kwargs)

            return change

        watched = {name: refused(name) for name in _IN_PLACE}
        watched |= {"copy_": copy_, "fill_": constant("fill_"), "zero_": constant("zero_")}
        originals: dict[str, Callable[..., Any]] = {name: getattr(_Tensor, name) for name in watched}
        with contextlib.ExitStack() as undo:
            for name, method in watched.items():
                if name in vars(_Tensor):
                    undo.callback(setattr, _Tensor, name, vars(_Tensor)[name])
                else:  # inherited: what is set here hides it
                    undo.callback(delattr, _Tensor, name)
                setattr(_Tensor, name, method)
            yield

    def _refuse(self, target: torch.Tensor) -> None:
        if isinstance(target, PlainStandIn) or self._parameters.at(target) is not None:
            raise NotPlainError("its loader writes something else than a weight into a parameter")

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if not target.numel() and not source.numel():
                return  # the last ranks of a padded vocabulary may get no row at all
            parameter = None if isinstance(target, PlainStandIn) else self._parameters.at(target)
            if (
                parameter is None
                or not isinstance(source, PlainStandIn)
                or target.dtype not in DTYPE_NAMES
                or source.numel() != target.numel()
            ):
                raise NotPlainError("its loader copies a weight to somewhere else than a parameter, or repeats it")
            name, weight = self._weights.get(storage_id(source), ("", source))
            if not name or source.dtype != weight.dtype:
                raise NotPlainError("its loader converts a weight, or lays it out anew")
            view = source if source.shape == target.shape else source.expand(target.shape)
            self._recording.copies.append(
                RecordedCopy(
                    weight=name,
                    sizes=tuple(target.shape),
                    src_offset=int(view.storage_offset()),
                    src_strides=view.stride(),
                    dst_address=target.data_ptr(),
                    dst_strides=target.stride(),
                    dst_dtype=DTYPE_NAMES[target.dtype],
                    parameter=parameter,
                )
            )
