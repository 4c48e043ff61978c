"""What the trainer knows of a sequence that is being generated beside others."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from typing import Any

from spmd_engine.control.generation import GenerateOutput, GenerateRequest, Increment, no_logprobs


@dataclass(eq=False)
class RunningSequence:
    """One sequence under way."""

    rid: str
    index: int
    request: GenerateRequest
    news: asyncio.Queue[RunningSequence]
    output_ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: dict[str, Any] | None = None
    abort_message: str | None = None
    error: Exception | None = None
    streams: bool = False
    fresh: list[Increment] = field(default_factory=list)  # of a stream: not taken by the caller yet

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, more: Increment) -> None:
        if self.streams:
            self.fresh.append(more)
        self.output_ids += more.output_ids
        self.versions += more.versions
        for name, values in (more.logprobs or {}).items():
            self.logprobs.setdefault(name, []).extend(values)
        self.prompt_tokens = more.prompt_tokens or self.prompt_tokens
        self.cached_tokens = more.cached_tokens or self.cached_tokens
        if more.finish_reason is not None:
            self.finish_reason = more.finish_reason
            if more.finish_reason.get("type") == "abort" and self.abort_message:
                self.finish_reason = {**more.finish_reason, "message": self.abort_message}

    def output(self, increments: list[Increment] | None = None) -> GenerateOutput:
        """All that came, or what some increments brought."""
        ids, versions, logprobs = self.output_ids, self.versions, self.logprobs
        if increments is not None:
            ids = [token for one in increments for token in one.output_ids]
            versions = [version for one in increments for version in one.versions]
            logprobs = {}
            for one in increments:
                for name, values in (one.logprobs or {}).items():
                    logprobs.setdefault(name, []).extend(values)
        return GenerateOutput(
            output_ids=array("q", ids),
            finish_reason=self.finish_reason or {},
            prompt_tokens=self.prompt_tokens or len(self.request.input_ids),
            completion_tokens=len(self.output_ids),
            cached_tokens=self.cached_tokens,
            logprobs={**no_logprobs(), **logprobs} if self.request.return_logprob else None,
            weight_version=self.versions[-1] if self.versions else -1,
            token_versions=versions,
        )
