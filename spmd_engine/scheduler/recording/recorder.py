"""Runs the model's own `load_weights` on tensors that hold nothing, and writes down the copies that it makes.

A `RecordingTensor` stands for a weight of the trainer. View operations go through to a `meta` tensor, whose offset and
strides always say which elements of the weight are meant; `copy_` into a real parameter becomes a `RecordedCopy`.
Arithmetic makes a *derived* tensor: what is loaded from one cannot be a plain copy, and its sources go through the
model's own loader with real values instead (the fallback). So do the weights of parameters that a loader changes once
more, or computes others from, after it has filled them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from spmd_engine.errors import PlanError
from spmd_engine.planning.layout import Weight
from spmd_engine.planning.plan import RecordedCopy
from spmd_engine.scheduler.recording.dry_run import dry_run, everywhere, zeros
from spmd_engine.scheduler.recording.loader_writes import WEIGHT, LoaderWrites
from spmd_engine.scheduler.recording.recording import (
    DTYPE_NAMES,
    DTYPES,
    Parameters,
    Recording,
    region,
    storage_id,
    tensors_of,
)

aten = torch.ops.aten
# Operations whose result has the same elements as their input, laid out anew: nothing changes for a recorder.
_RELAYOUTS = {aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.lift_fresh.default}


class NeedsValuesError(BaseException):
    """A loader asked for the values of weights, which a recording does not have. Some catch `Exception`, and go on."""

    def __init__(self, names: Iterable[str], what: str) -> None:
        super().__init__(what)
        self.names, self.what = frozenset(names), what


class RecordingTensor(torch.Tensor):
    """A weight without data, a view of one, or something derived from weights.

    Attributes:
        meta: its shape; for a view also which elements of the weight it shows.
        origins: names of the weights that it comes from.
        derived_by: the operation that made its elements, if they are not those of a weight.
        casts: dtypes that a view was converted to, in order.
        is_relaid: a loader asked for a copy with other strides than `meta` has.
    """

    meta: torch.Tensor
    origins: frozenset[str]
    derived_by: str
    casts: tuple[torch.dtype, ...]
    is_relaid: bool
    recorder: Recorder

    @staticmethod
    def __new__(
        cls,
        meta: torch.Tensor,
        origins: frozenset[str],
        recorder: Recorder,
        *,
        derived_by: str = "",
        casts: tuple[torch.dtype, ...] = (),
        is_relaid: bool = False,
    ) -> RecordingTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=casts[-1] if casts else meta.dtype,
            device=recorder.device,
        )
        self.meta, self.origins, self.recorder = meta, origins, recorder
        self.derived_by, self.casts, self.is_relaid = derived_by, casts, is_relaid
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RecordingTensor({sorted(self.origins)}, {list(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        inputs = _stand_ins(args, kwargs)
        return inputs[0].recorder.dispatch(func, args, kwargs or {}, inputs)


class _RecordingMode(TorchDispatchMode):
    """Sees all operations of a loader, and hands them on."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the skipping takes longer than what it wraps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _stand_ins(args, kwargs)
        if inputs:
            return self._recorder.dispatch(func, args, kwargs or {}, inputs)
        return self._recorder.loader_writes.perform(func, args, kwargs or {})


class Recorder:
    """Records one pass of `load_weights`, whatever the loader does.

    Args:
        model: SGLang's model; its parameters are not written, except by constants that the loader itself writes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.recording = Recording()
        self._model = model
        self.parameters = Parameters(model)
        self.device = self.parameters.device
        self._begin(Recording())

    def _begin(self, recording: Recording) -> None:
        self.recording = recording
        self.loader_writes = LoaderWrites(recording, self.parameters)

    def stand_in(self, weight: Weight) -> RecordingTensor:
        """A tensor that stands for a weight of the trainer."""
        meta = torch.empty(weight.shape, dtype=DTYPES[weight.dtype], device="meta")
        return RecordingTensor(meta, frozenset([weight.name]), self)

    def run(self, weights: Sequence[tuple[str, RecordingTensor]]) -> Recording:
        """Call `load_weights` with stand-ins.

        Args:
            weights: (name for the loader, stand-in), which may be views of weights under other names.

        Raises:
            PlanError: the loader refuses a weight, for example because of its shape.
        """
        left, unseen = list(weights), list[tuple[str, RecordingTensor]]()
        self._begin(Recording())
        while True:
            try:
                with torch.no_grad(), everywhere(lambda: _RecordingMode(self)):
                    self._model.load_weights(iter(left))  # type: ignore[operator]
                if unseen:
                    stand_for = {name: zeros(x.shape, x.dtype, self.device) for name, x in unseen}
                    dry_run(self._model, stand_for, self.recording, self.parameters)
                return self._settled()
            except NeedsValuesError as error:
                fallback = self.recording.fallback | dict.fromkeys(error.names, error.what)
                kept = [(name, tensor) for name, tensor in left if not tensor.origins & error.names]
                if len(kept) == len(left):
                    raise PlanError(f"cannot record how {sorted(error.names)} are loaded: {error}") from error
                unseen += [(name, tensor) for name, tensor in left if tensor.origins & error.names]
                left = kept
                self._begin(Recording(fallback=fallback))
            except PlanError:
                raise
            except Exception as error:
                names = _culprits(error.__traceback__)
                shapes = ", ".join(
                    f"{tensor.origins and sorted(tensor.origins)[0]} {list(tensor.shape)}" for tensor in names
                )
                raise PlanError(
                    f"the engine's loader refuses {'weight ' + shapes if shapes else 'the source'}: "
                    f"{type(error).__name__}: {error or 'wrong shape'}"
                ) from error

    def _settled(self) -> Recording:
        """The recording, without copies of weights that turned out to need the fallback after they were made."""
        self.loader_writes.settle()
        recording = self.recording
        dropped = [copy for copy in recording.copies if copy.weight in recording.fallback]
        recording.constants += [(copy.dst_address, copy.sizes, copy.dst_strides) for copy in dropped]
        recording.fallback_parameters |= {copy.parameter for copy in dropped}
        recording.copies = [copy for copy in recording.copies if copy.weight not in recording.fallback]
        return recording

    # ---- operations on stand-ins ----

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[RecordingTensor]) -> Any:
        """What an operation with stand-ins (`inputs`, at least one) among its arguments does."""
        origins = inputs[0].origins if len(inputs) == 1 else frozenset().union(*(x.origins for x in inputs))
        target: Any = args[0] if args else None
        if func is aten.copy_.default and not isinstance(target, RecordingTensor):
            self._copy(target, args[1])
            return target
        if func._schema.is_mutable:
            # A weight changed in place, or a parameter changed by something else than a copy.
            self._fall_back(target, origins, f"its loader applies {_name(func)} in place")
            return target
        if func in _RELAYOUTS and isinstance(target, RecordingTensor) and not target.derived_by:
            dtype = kwargs.get("dtype") or target.dtype
            if dtype in DTYPE_NAMES:
                casts = target.casts if dtype == target.dtype else (*target.casts, dtype)
                return RecordingTensor(target.meta, target.origins, self, casts=casts, is_relaid=True)
        return self._apply(func, args, kwargs, inputs, origins)

    def _apply(self, func: Any, args: Any, kwargs: Any, inputs: list[RecordingTensor], origins: frozenset[str]) -> Any:
        meta_args = [_to_meta(x) for x in args]
        meta_kwargs = {name: _to_meta(x) for name, x in kwargs.items()}
        if "device" in meta_kwargs:
            meta_kwargs["device"] = torch.device("meta")
        try:
            result = func(*meta_args, **meta_kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if not any(x.is_relaid for x in inputs) and _fails_with_values(func, meta_args, meta_kwargs):
                raise
            raise NeedsValuesError(origins, f"its loader looks at values ({_name(func)})") from error
        only = inputs[0] if len(inputs) == 1 and not inputs[0].derived_by else None

        def wrap(x: torch.Tensor) -> RecordingTensor:
            if only is not None and _same_storage(x, only.meta) and x.dtype == only.meta.dtype:
                return RecordingTensor(x, origins, self, casts=only.casts, is_relaid=only.is_relaid)
            return RecordingTensor(x, origins, self, derived_by=_name(func))

        if isinstance(result, torch.Tensor):
            return wrap(result)
        return tree_map_only(torch.Tensor, wrap, result)

    def _fall_back(self, destination: Any, origins: frozenset[str], why: str) -> None:
        for name in sorted(origins):
            self.recording.fallback.setdefault(name, why)
        if not isinstance(destination, torch.Tensor) or isinstance(destination, RecordingTensor):
            return
        targets = self.parameters.among([destination])
        self.recording.leave_to_fallback(targets)
        if not targets:
            self.loader_writes.derive(destination, frozenset([WEIGHT]))

    def _copy(self, destination: torch.Tensor, source: RecordingTensor) -> None:
        if not destination.numel() and not source.numel():
            return  # the last ranks of a padded vocabulary may get no row at all
        parameter = self.parameters.at(destination)
        # A widening to float32 keeps all values; a narrowing to what the parameter has is what the copy itself does.
        casts = [str(cast) for cast in source.casts if cast not in (destination.dtype, torch.float32)]
        why = ""
        if source.derived_by:
            why = f"its loader computes with it ({source.derived_by})"
        elif parameter is None:
            why = "its loader copies it to somewhere else than a parameter"
        elif destination.dtype not in DTYPE_NAMES or casts:
            why = f"its loader converts it to {', '.join(casts) or destination.dtype}"
        view = source.meta.expand(destination.shape)  # refuses what the copy itself would refuse
        if not why and source.numel() != destination.numel():
            why = "its loader repeats it"
        if why:
            self._fall_back(destination, source.origins, why)
            return
        (weight,) = source.origins
        self.loader_writes.filled.add(region(destination))
        self.recording.copies.append(
            RecordedCopy(
                weight=weight,
                sizes=tuple(destination.shape),
                src_offset=int(view.storage_offset()),
                src_strides=tuple(view.stride()),
                dst_address=destination.data_ptr(),
                dst_strides=tuple(destination.stride()),
                dst_dtype=DTYPE_NAMES[destination.dtype],
                parameter=parameter or "",
            )
        )


def _stand_ins(args: Any, kwargs: Any) -> list[RecordingTensor]:
    return [x for x in tensors_of(args, kwargs) if isinstance(x, RecordingTensor)]


def _to_meta(x: Any) -> Any:
    if isinstance(x, RecordingTensor):
        return x.meta
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    return [_to_meta(y) for y in x] if isinstance(x, (list, tuple)) else x


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return storage_id(a) == storage_id(b)


def _fails_with_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that failed on tensors without values fails with values, too: by its shapes, that is.

    The memory of these tensors is not touched before an operation uses it.
    """

    def zeros(x: torch.Tensor) -> torch.Tensor:
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
        return torch.zeros(x.storage_offset() + last + 1, dtype=x.dtype).as_strided(
            x.shape, x.stride(), x.storage_offset()
        )

    real_args, real_kwargs = tree_map_only(torch.Tensor, zeros, (args, kwargs))
    if "device" in real_kwargs:
        real_kwargs["device"] = torch.device("cpu")
    try:
        func(*real_args, **real_kwargs)
    except NotImplementedError:
        return False
    except Exception:
        return True
    return False


def _culprits(trace: TracebackType | None) -> list[RecordingTensor]:
    """The stand-in that the innermost frame of a failed loader was working on."""
    found: list[RecordingTensor] = []
    while trace is not None:
        local = [v for v in trace.tb_frame.f_locals.values() if isinstance(v, RecordingTensor)]
        if local and trace.tb_frame.f_globals.get("__name__", "").startswith("sglang"):
            found = local[:1]
        trace = trace.tb_next
    return found
