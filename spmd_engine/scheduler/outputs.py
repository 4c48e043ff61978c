"""Takes what SGLang's Scheduler sends out: into one answer for a rollout, or bit by bit for requests beside others."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spmd_engine.control.generation import GenerateOutput, Increment, no_logprobs

_LOGPROB_FIELDS = tuple(no_logprobs())


@dataclass
class _Sequence:
    wants_logprobs: bool
    output_ids: array[int] = field(default_factory=lambda: array("q"))
    logprobs: dict[str, list[Any]] = field(default_factory=no_logprobs)
    done: GenerateOutput | None = None


@dataclass
class _Served:
    """A request beside others. `reported` tokens of it are known; SGLang has sent `sent` of them."""

    wants_logprobs: bool
    versions: list[tuple[int, int]]  # the first token that each weight version made
    sent: int = 0
    reported: int = 0


class Outputs:
    """The `sink` of the scheduler. SGLang sends increments, also for requests that do not stream.

    Args:
        report: takes increments of served requests; None where nobody waits for them.

    Attributes:
        served: requests beside others that have not finished, by id.
    """

    def __init__(self, report: Callable[[list[Increment]], None] | None = None) -> None:
        self.served: dict[str, _Served] = {}
        self._report = report
        self._digest = hashlib.blake2b(digest_size=8)
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

    def serve(self, rids: list[str], wants_logprobs: list[bool], weight_version: int) -> None:
        """Begin with these requests, beside others."""
        for rid, wants in zip(rids, wants_logprobs, strict=True):
            self.served[rid] = _Served(wants, [(0, weight_version)])

    def digest(self) -> str:
        """Equal on two ranks that have made the same tokens of served requests since the start."""
        return self._digest.hexdigest()

    def use_version(self, weight_version: int) -> None:
        """What comes next is of another weight version. Only while all requests are paused, and caught up."""
        for served in self.served.values():
            if served.versions[-1][1] != weight_version:
                served.versions.append((served.reported, weight_version))

    def catch_up(self, requests: list[Any]) -> None:
        """Report what paused requests, SGLang's own objects, have made and SGLang has not sent yet."""
        increments = []
        for request in requests:
            served = self.served.get(request.rid)
            if served is not None and len(request.output_ids) > served.reported:
                since = served.reported
                made = {
                    name: list(getattr(request.logprob, name, None) or ())[since:]
                    for name in _LOGPROB_FIELDS
                    if served.wants_logprobs and name.startswith("output")
                }
                increments.append(
                    self._advance(request.rid, served, list(request.output_ids)[since:], made, None, 0, 0)
                )
        if increments and self._report is not None:
            self._report(increments)

    def send_output(self, output: Any, request: Any = None) -> None:
        """Called by SGLang with a `BatchTokenIDOutput`, an `AbortReq`, or an answer that nobody waits for."""
        increments: list[Increment] = []
        if hasattr(output, "finished_reasons") and hasattr(output, "output_ids"):
            for index, rid in enumerate(output.rids):
                if rid in self._sequences:
                    self._add(self._sequences[rid], output, index)
                elif rid in self.served:
                    increments.append(self._take_more(rid, output, index))
        elif type(output).__name__ == "AbortReq":
            reason = output.finished_reason or {"type": "abort", "message": output.abort_message or "aborted by SGLang"}
            if output.rid in self._sequences:
                self._finish(self._sequences[output.rid], reason, prompt_tokens=0, cached_tokens=0)
            elif output.rid in self.served:
                if getattr(request, "output_ids", None):  # SGLang may not have sent all of them
                    self.catch_up([request])
                increments.append(self._advance(output.rid, self.served[output.rid], [], {}, dict(reason), 0, 0))
        if increments and self._report is not None:
            self._report(increments)

    def _take_more(self, rid: str, output: Any, index: int) -> Increment:
        """The next increment of a served request."""
        served = self.served[rid]
        ids = list(output.output_ids[index])
        known = served.reported - served.sent  # reported while it was paused
        served.sent += len(ids)
        logprobs = {}
        if served.wants_logprobs:
            for name in _LOGPROB_FIELDS:
                values = getattr(output, name, None)
                if values and values[index] is not None:
                    logprobs[name] = values[index][known if name.startswith("output") else 0 :]
        return self._advance(
            rid,
            served,
            ids[known:],
            logprobs,
            None if output.finished_reasons[index] is None else dict(output.finished_reasons[index]),
            int(output.prompt_tokens[index]),
            int(output.cached_tokens[index]),
        )

    def _advance(
        self,
        rid: str,
        served: _Served,
        ids: list[int],
        logprobs: dict[str, Any],
        reason: dict[str, Any] | None,
        prompt_tokens: int,
        cached_tokens: int,
    ) -> Increment:
        packed = array("q", ids)
        versions = [served.versions[-1][1]] * len(ids)
        if served.versions[-1][0] > served.reported:  # some are of weights before the last ones
            for i, position in enumerate(range(served.reported, served.reported + len(ids))):
                versions[i] = next(version for first, version in reversed(served.versions) if first <= position)
        served.reported += len(ids)
        self._digest.update(rid.encode() + packed.tobytes())
        if reason is not None:
            del self.served[rid]
        made = _plain(logprobs) if served.wants_logprobs else None
        return Increment(rid, packed, versions, made, reason, prompt_tokens, cached_tokens)

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
            output_ids=sequence.output_ids,
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
