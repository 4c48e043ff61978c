"""Runs the model's own `load_weights` on tensors that hold nothing, and writes down the copies that it makes.

A `RecordingTensor` stands for a weight of the trainer. View operations go through to a `meta` tensor, whose offset and
strides always say which elements of the weight are meant; `copy_` into a real parameter becomes a `RecordedCopy`.
Arithmetic makes a *derived* tensor: what is loaded from one cannot be a plain copy, and its sources go through the
model's own loader with real values instead (the fallback). So do the weights of parameters that a loader changes once
more, or computes others from, after it has filled them.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from spmd_engine import coverage
from spmd_engine.coverage import Region
from spmd_engine.errors import PlanError
from spmd_engine.layout import Weight
from spmd_engine.plan import RecordedCopy

aten = torch.ops.aten
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Operations whose result has the same elements as their input, laid out anew: nothing changes for a recorder.
_RELAYOUTS = {aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.lift_fresh.default}
_WEIGHT = ""
_NAMES_SHOWN = 5
_FILLS = {aten.fill_.Scalar, aten.zero_.default}


class NeedsValuesError(BaseException):
    """A loader asked for the values of weights, which a recording does not have. Some catch `Exception`, and go on."""

    def __init__(self, names: Iterable[str], what: str) -> None:
        super().__init__(what)
        self.names, self.what = frozenset(names), what


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
        return self._recorder.dispatch_real(func, args, kwargs or {})


class _RehearsalMode(TorchDispatchMode):
    """Notes which regions of parameters a loader writes, and lets it write none."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = _written(func, args, kwargs or {})
        targets = self._recorder.parameters.among(written)
        if not targets:
            return func(*args, **(kwargs or {}))
        self._recorder.will_be_written(targets)
        return written[0] if func._schema.returns else None


class Parameters:
    """Where the parameters and buffers of a model are."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.device = next(model.parameters()).device
        self._tensors: dict[str, torch.Tensor] = {}
        self._spans: dict[int, tuple[int, str]] = {}  # start -> end, the first of its names
        for name, tensor in all_tensors(model):
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
        self._filled: set[Region] = set()  # by copies of weights
        self._writes: list[_Write] = []
        # Tensors of the loader's own that come from parameters, which have their old values: by storage, with names of
        # the parameters, or with _WEIGHT for what a weight should have filled. The reference keeps the id from another.
        self._derived: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}

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
                with torch.no_grad(), _everywhere(lambda: _RecordingMode(self)):
                    self._model.load_weights(iter(left))  # type: ignore[operator]
                if unseen:
                    self.rehearse({name: zeros(x.shape, x.dtype, self.device) for name, x in unseen})
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

    def rehearse(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load weights as the fallback will, without writing any parameter, and note which regions it will write.

        Args:
            weights: `zeros` in their place, by their names for the loader.

        Raises:
            PlanError: the loader fails on them.
        """
        try:
            with torch.no_grad(), _everywhere(lambda: _RehearsalMode(self)):
                self._model.load_weights((name, zero.contiguous()) for name, zero in weights.items())  # type: ignore[operator]
        except Exception as error:
            names = ", ".join(sorted(weights)[:_NAMES_SHOWN]) + (", ..." if len(weights) > _NAMES_SHOWN else "")
            raise PlanError(
                f"the engine's loader would have to load {names} by itself, and fails on zeros in their place: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _settle_writes(self) -> None:
        """Do the writes that depend on no weight, and leave the weights on which others depend to the fallback."""
        recording = self.recording
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
                if not any(self.parameters.overlap(name, where, recording.copies) for name, where in one.targets):
                    one.run()

    def _settled(self) -> Recording:
        """The recording, without copies of weights that turned out to need the fallback after they were made."""
        self._settle_writes()
        recording = self.recording
        dropped = [copy for copy in recording.copies if copy.weight in recording.fallback]
        recording.constants += [(copy.dst_address, copy.sizes, copy.dst_strides) for copy in dropped]
        recording.fallback_parameters |= {copy.parameter for copy in dropped}
        recording.copies = [copy for copy in recording.copies if copy.weight not in recording.fallback]
        return recording

    # ---- operations without stand-ins ----

    def dispatch_real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation on the loader's own tensors and on parameters does."""
        written = _written(func, args, kwargs)
        targets = self.parameters.among(written)
        if not targets:
            result = func(*args, **kwargs)
            sources = self._sources(tensors_of(args, kwargs))
            if sources is not None:
                for tensor in (*written, *tensors_of((result,))):
                    if self.parameters.at(tensor) is None:  # else it is a view of one
                        self._derive(tensor, sources)
            return result
        # What is changed in place comes from itself; what is filled or copied to does not.
        inputs = [] if func in _FILLS else tensors_of(args[1:] if func is aten.copy_.default else args, kwargs)
        sources = self._sources(inputs)
        if sources is not None and _WEIGHT in sources:
            self.will_be_written(targets)
        else:
            if sources is None and not self._filled.isdisjoint(where for _, where in targets):
                sources = frozenset()  # it replaces a weight
            self.recording.constants += [where for _, where in targets]
            self._writes.append(_Write(partial(func, *args, **kwargs), targets, sources))
        return written[0] if func._schema.returns else None

    def will_be_written(self, targets: Iterable[tuple[str, Region]]) -> None:
        """Note regions of parameters that the fallback writes."""
        self.recording.fallback_parameters |= {name for name, _ in targets}
        self.recording.constants += [where for _, where in targets]

    def _derive(self, tensor: torch.Tensor, sources: frozenset[str]) -> None:
        self._derived[storage_id(tensor)] = StorageWeakRef(tensor.untyped_storage()), sources

    def _sources(self, tensors: Iterable[torch.Tensor]) -> frozenset[str] | None:
        """Names of the parameters that the tensors come from, and _WEIGHT; None if they come from neither."""
        found: set[str] | None = None
        for tensor in tensors:
            name = self.parameters.at(tensor)
            known = frozenset([name]) if name is not None else self._derived.get(storage_id(tensor), (None, None))[1]
            if known is not None:
                found = (found or set()) | known
        return None if found is None else frozenset(found)

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
            if _is_shape_error(error) and not any(x.is_relaid for x in inputs):
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
        self.will_be_written(targets)
        if not targets:
            self._derive(destination, frozenset([_WEIGHT]))

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
        self._filled.add(region(destination))
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


def tensors_of(args: Any, kwargs: Any = None) -> list[torch.Tensor]:
    """The tensors among arguments or results, which may be in lists. (torch's pytree takes ten times as long.)"""
    found = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


@contextlib.contextmanager
def _everywhere(mode: Callable[[], TorchDispatchMode]) -> Iterator[None]:
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


def zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in place of a weight, which take no memory before they are made contiguous."""
    return torch.zeros((), dtype=dtype, device=device).expand(*shape)


def _stand_ins(args: Any, kwargs: Any) -> list[RecordingTensor]:
    return [x for x in tensors_of(args, kwargs) if isinstance(x, RecordingTensor)]


def _to_meta(x: Any) -> Any:
    if isinstance(x, RecordingTensor):
        return x.meta
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    return [_to_meta(y) for y in x] if isinstance(x, (list, tuple)) else x


def all_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; one storage may appear under several names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def region(tensor: torch.Tensor) -> Region:
    """Address, sizes and strides."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operation's arguments that it changes."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return tensors_of([given.get(x.name) for x in func._schema.arguments if x.alias_info and x.alias_info.is_write])


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return storage_id(a) == storage_id(b)


def _is_shape_error(error: Exception) -> bool:
    text = str(error)
    return any(sign in text for sign in ("size", "shape", "dimension", "length", "out of range", "split")) and not any(
        sign in text for sign in ("meta", "item()", "data-dependent")
    )


def _culprits(trace: TracebackType | None) -> list[RecordingTensor]:
    """The stand-in that the innermost frame of a failed loader was working on."""
    found: list[RecordingTensor] = []
    while trace is not None:
        local = [v for v in trace.tb_frame.f_locals.values() if isinstance(v, RecordingTensor)]
        if local and trace.tb_frame.f_globals.get("__name__", "").startswith("sglang"):
            found = local[:1]
        trace = trace.tb_next
    return found
