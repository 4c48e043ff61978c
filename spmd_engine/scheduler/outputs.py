"""Collects what SGLang's Scheduler sends out into one answer a rollout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spmd_engine.requests import GenerateOutput

_LOGPROB_FIELDS = tuple(
    f"{side}_{what}_{part}"
    for side in ("input", "output")
    for what in ("token_logprobs", "top_logprobs", "token_ids_logprobs")
    for part in ("val", "idx")
)


@dataclass
class _Sequence:
    wants_logprobs: bool
    output_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _LOGPROB_FIELDS})
    done: GenerateOutput | None = None


class Outputs:
    """The `sink` of the scheduler. SGLang sends increments, also for requests that do not stream."""

    def __init__(self) -> None:
        self._sequences: dict[str, _Sequence] = {}
        self._left = 0
        self._version = 0

    def expect(self, rids: list[str], wants_logprobs: list[bool], weight_version: int) -> None:
        """Begin a rollout of these requests."""
        self._sequences = {rid: _Sequence(wants) for rid, wants in zip(rids, wants_logprobs, strict=True)}
        self._left = len(rids)
        self._version = weight_version

    @property
    def complete(self) -> bool:
        return bool(self._sequences) and self._left == 0

    def take(self) -> list[GenerateOutput]:
        """The finished rollout, in the order of `expect`."""
        results = [sequence.done for sequence in self._sequences.values()]
        self._sequences = {}
        assert all(result is not None for result in results)
        return results  # type: ignore[return-value]

    def send_output(self, output: Any, request: Any = None) -> None:
        """Called by SGLang with a `BatchTokenIDOutput`, an `AbortReq`, or an answer that nobody waits for."""
        if hasattr(output, "finished_reasons") and hasattr(output, "output_ids"):
            for index, rid in enumerate(output.rids):
                if rid in self._sequences:
                    self._add(self._sequences[rid], output, index)
        elif type(output).__name__ == "AbortReq" and output.rid in self._sequences:
            reason = output.finished_reason or {"type": "abort", "message": output.abort_message or "aborted by SGLang"}
            self._finish(self._sequences[output.rid], reason, prompt_tokens=0, cached_tokens=0)

    def _add(self, sequence: _Sequence, output: Any, index: int) -> None:
        sequence.output_ids.extend(output.output_ids[index])
        if sequence.wants_logprobs:
            for name in _LOGPROB_FIELDS:
                values = getattr(output, name, None)
                if values and values[index] is not None:
                    sequence.logprobs[name].extend(values[index])
        if output.finished_reasons[index] is not None:
            self._finish(
                sequence,
                output.finished_reasons[index],
                prompt_tokens=output.prompt_tokens[index],
                cached_tokens=output.cached_tokens[index],
            )

    def _finish(self, sequence: _Sequence, reason: Any, *, prompt_tokens: int, cached_tokens: int) -> None:
        if sequence.done is None:
            self._left -= 1
        sequence.done = GenerateOutput(
            output_ids=list(map(int, sequence.output_ids)),
            finish_reason=dict(reason),
            prompt_tokens=int(prompt_tokens),
            completion_tokens=len(sequence.output_ids),
            cached_tokens=int(cached_tokens),
            logprobs=_plain(sequence.logprobs) if sequence.wants_logprobs else None,
            weight_version=self._version,
        )


def _plain(value: Any) -> Any:
    """Lists of Python numbers: what reaches the trainer rank must not need SGLang, nor tensors."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
