"""What SGLang's own loader makes of a trainer's layout, and whether that is every element of every parameter."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spmd_engine.errors import PlanError
from spmd_engine.planning import coverage
from spmd_engine.planning.layout import SourceLayout, Weight
from spmd_engine.planning.plan import RecordedCopy
from spmd_engine.planning.read_sets import ReadSet, elements, subtract
from spmd_engine.scheduler.adapter import model as sglang_model
from spmd_engine.scheduler.recording.checkpoint_format import CheckpointFormat
from spmd_engine.scheduler.recording.dry_run import dry_run, zeros
from spmd_engine.scheduler.recording.plain_recorder import NotPlainError, PlainRecorder
from spmd_engine.scheduler.recording.recorder import Recorder
from spmd_engine.scheduler.recording.recording import DTYPE_NAMES, DTYPES, Recording
from spmd_engine.transfer.fingerprint import Fingerprint

logger = logging.getLogger(__name__)
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Loads:
    """What fills a model's parameters from a layout.

    Attributes:
        copies: blocks of weights to blocks of parameters.
        fallback: weights that take the model's own loader instead, and why.
        converted: weights that the loader knows under other names.
        has_constants: the loader fills some elements by itself.
    """

    copies: list[RecordedCopy]
    fallback: dict[str, str]
    converted: frozenset[str]
    has_constants: bool


def record(
    model: torch.nn.Module,
    layout: SourceLayout,
    checkpoint_format: CheckpointFormat,
    covers: Callable[[str], bool] = lambda parameter: True,
) -> Loads:
    """How the model's own loader fills its parameters from a layout.

    Args:
        covers: which parameters must be filled; all, except where the layout is a part of a trainer's.

    Raises:
        PlanError: a parameter that no weight of the source reaches, or only in part, or that SGLang lays out anew once
            it is loaded.
    """
    sglang_model.check_kept_as_loaded(model)
    with sglang_model.restore_attributes(model):
        return _record_all(model, layout, checkpoint_format, covers)


def _record_all(
    model: torch.nn.Module, layout: SourceLayout, checkpoint_format: CheckpointFormat, covers: Callable[[str], bool]
) -> Loads:
    try:
        recording, converted = _run(PlainRecorder(model), layout, checkpoint_format)
        fallback = _cover(model, recording, covers)
        if fallback:
            raise NotPlainError(f"{len(fallback)} weights need the fallback")
    except (NotPlainError, PlanError) as error:
        logger.info("the weights are recorded by every operation of their loader: %s", error)
        recorder = Recorder(model)
        recording, converted = _run(recorder, layout, checkpoint_format)
        fallback = _cover(model, recording, covers) | recording.fallback
        if fallback:
            without_values = {
                weight.name: zeros(weight.shape, DTYPES[weight.dtype], recorder.device)
                for weight in layout.weights
                if weight.name in fallback
            }
            dry_run(
                model, adapt_to_loader(without_values, converted, checkpoint_format), recording, recorder.parameters
            )
    copies = [copy for copy in coverage.last_of_duplicates(recording.copies) if copy.weight not in fallback]
    return Loads(copies, fallback, converted, bool(recording.constants))


def adapt_to_loader(
    weights: Mapping[str, torch.Tensor], converted: frozenset[str], checkpoint_format: CheckpointFormat
) -> dict[str, torch.Tensor]:
    """Weights of the fallback under the names, and in the form, that the model's loader knows.

    Args:
        converted: names of those that have others in a trainer.
    """
    direct = {name: tensor for name, tensor in weights.items() if name not in converted}
    turned = {name: tensor for name, tensor in weights.items() if name in converted}
    return {**direct, **checkpoint_format.to_checkpoint(turned)}


class Prerecording:
    """The recording of a trainer's first weights, made before they come: transformers' model tells which they will be.

    To record the 18432 expert weights of a Qwen3-30B-A3B takes seconds, in which the process would else be idle.

    Args:
        model: SGLang's.
        checkpoint_format: of the same model.

    Raises:
        ConfigError: transformers has no such model.
        PlanError: see `record`.
    """

    def __init__(self, model: torch.nn.Module, checkpoint_format: CheckpointFormat) -> None:
        described, _ = checkpoint_format.trainer_weights(dtype=DTYPE_NAMES[next(model.parameters()).dtype])
        layout = SourceLayout(tuple(Weight(name, shape, dtype) for name, shape, dtype, _ in described), ())
        self._kinds, self._target = _kinds(layout), Fingerprint(model, model.parameters())
        self._loads = record(model, layout, checkpoint_format)

    def loads(self, model: torch.nn.Module, layout: SourceLayout) -> Loads | None:
        """How the weights of `layout` load, if they were recorded ahead and the parameters are where they were."""
        return self._loads if self._kinds == _kinds(layout) and self._target.holds(model) else None


def _kinds(layout: SourceLayout) -> list[tuple[str, tuple[int, ...], str]]:
    return [(weight.name, weight.shape, weight.dtype) for weight in layout.weights]


def write_constants(model: torch.nn.Module, layout: SourceLayout, checkpoint_format: CheckpointFormat) -> None:
    """Let the model's loader write the elements that it fills by itself, and no weights."""
    try:
        _run(PlainRecorder(model), layout, checkpoint_format)
    except NotPlainError:
        _run(Recorder(model), layout, checkpoint_format)


def _run(
    recorder: PlainRecorder | Recorder, layout: SourceLayout, checkpoint_format: CheckpointFormat
) -> tuple[Recording, frozenset[str]]:
    """Record how the model loads the weights of a layout.

    Weights that the loader passes over under the trainer's names are offered once more in the checkpoint's form:
    transformers keeps some of them fused or renamed in memory (experts, since version 5).
    """
    stand_ins: dict[str, Any] = {weight.name: recorder.stand_in(weight) for weight in layout.weights}
    recording = recorder.run(list(stand_ins.items()))
    used = recording.used()
    unused = {name: tensor for name, tensor in stand_ins.items() if name not in used}
    views = checkpoint_format.to_checkpoint(unused)
    renamed = {name: tensor for name, tensor in views.items() if name not in unused}
    if not renamed:
        return recording, frozenset()
    more = recorder.run(list(renamed.items()))
    return (
        Recording(
            copies=recording.copies + more.copies,
            fallback=recording.fallback | more.fallback,
            fallback_parameters=recording.fallback_parameters | more.fallback_parameters,
            constants=recording.constants + more.constants,
        ),
        frozenset(unused),
    )


def _cover(model: torch.nn.Module, recording: Recording, covers: Callable[[str], bool]) -> dict[str, str]:
    """Weights to send through the fallback, and why, so that every element of every parameter is written exactly once.

    Raises:
        PlanError: a parameter that no weight of the source reaches, or only in part.
    """
    regions: dict[str, list[coverage.Region]] = {}
    touching: dict[str, set[str]] = {}
    for copy in recording.copies:
        regions.setdefault(copy.parameter, []).append(coverage.region_of(copy))
        touching.setdefault(copy.parameter, set()).add(copy.weight)
    fallback: dict[str, str] = {}
    missing: list[str] = []
    seen: set[int] = set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    written_buffers = {name: buffer for name, buffer in model.named_buffers() if name in touching}
    for name, parameter in {**parameters, **written_buffers}.items():
        if parameter.dtype not in DTYPE_NAMES and (name in touching or name in recording.fallback_parameters):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise PlanError(
                f"{name} of the engine is {dtype}: weights would have to be quantised on the way, which they are not; "
                "start the engine without quantization"
            )
        if parameter.dtype not in DTYPE_NAMES or not parameter.numel() or parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        base, size = parameter.data_ptr(), parameter.numel() * parameter.element_size()
        constant = [region for region in recording.constants if base <= region[0] < base + size]
        written = [*regions.get(name, []), *constant]
        left = (
            coverage.uncovered(written, base, parameter.element_size(), tuple(parameter.shape))
            if parameter.is_contiguous()
            else None
        )
        if left is None and name in touching:
            why = f"what is copied to {name} overlaps, or has no boxes for parts"
            fallback |= dict.fromkeys(sorted(touching[name]), why)
        elif left is None and name in recording.fallback_parameters:
            continue  # written by the model's own loader, in a way that no boxes describe
        elif left != 0 and covers(name):
            part = "" if name not in touching else f"{left} of the {parameter.numel()} elements of "
            missing.append(f"{part}{name} {list(parameter.shape)}")
    if missing:
        shown = ", ".join(missing[:_NAMES_SHOWN])
        if len(missing) > _NAMES_SHOWN:
            shown += f" and {len(missing) - _NAMES_SHOWN} more"
        raise PlanError(
            f"the source has no weight for {shown}; pass the whole model: every parameter of the engine must be covered"
        )
    return fallback


def check_all_used(layout: SourceLayout, optional: frozenset[str], used: Iterable[Mapping[str, ReadSet]]) -> None:
    """Refuse weights that no rank reads, or of which all ranks together leave elements out.

    Args:
        used: what each rank reads; ranks that read the same need to be there once.
    """
    ranks = list(used)
    checked: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()  # shapes, and the identities of what ranks read
    for weight in layout.weights:
        sets = [found[weight.name] for found in ranks if weight.name in found]
        if not sets:
            if weight.name in optional:
                continue
            raise PlanError(
                f"the engine does not know weight {weight.name!r} {list(weight.shape)}: "
                "leave it out of the source, or start the engine with the model that has it"
            )
        key = (weight.shape, tuple(map(id, sets)))
        if key in checked:
            continue
        checked.add(key)
        left = subtract(dict.fromkeys(part for one in sets for part in one.parts), weight.shape)
        if left:
            count = sum(map(elements, left))
            first = "[" + ", ".join(f"{runs[0][0]}:{runs[0][1]}" for runs in left[0]) + "]"
            raise PlanError(
                f"weight {weight.name!r} has another shape than the engine expects: of {list(weight.shape)} it reads "
                f"only {math.prod(weight.shape) - count} elements of {math.prod(weight.shape)}, and none of {first}"
            )
