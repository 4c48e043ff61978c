"""What the first rank of a replica alone may call: requests that run beside one another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Unpack

from spmd_engine.control import codec
from spmd_engine.control.generation import FunctionCall
from spmd_engine.control.messages import ParseCalls, Pause, Resume
from spmd_engine.errors import InvalidRequestError
from spmd_engine.trainer import requests as req
from spmd_engine.trainer.async_requests import AsyncRequests
from spmd_engine.trainer.requests import GenerateOptions
from spmd_engine.trainer.scheduler_client import SchedulerClient


class LeaderCalls:
    """The part of `SpmdEngine` that is not collective. The other ranks of the replica call nothing meanwhile."""

    _client: SchedulerClient
    _ranks: tuple[int, ...]
    _requests: AsyncRequests
    _tokenizer: Any
    tp_rank: int

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its replica."""
        return self.tp_rank == 0

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        return_text_in_logprobs: bool = False,
        stream: bool = False,
        request_id: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> dict[str, Any] | list[dict[str, Any]] | AsyncIterator[dict[str, Any]]:
        """Generate for one request that runs beside others, as `sglang.Engine.async_generate` does.

        Not collective: only the leader of a replica calls it, as often and for as many requests at a time as it likes;
        the other ranks call nothing. A collective call that comes meanwhile takes its turn when the requests that
        came before it have finished. Arguments that are not listed are those of `generate`.

        Args:
            stream: return an asynchronous iterator over what comes, as it comes: dicts as below with the new
                `output_ids` and the new `text` alone; `finish_reason` is None in all but the last of a sequence. With
                several sequences, `index` tells which one it is. To leave the iterator ends the request.
            request_id: its name for `abort`, and `meta_info["id"]`; by default one is made.
            priority: for SGLang's scheduling, with `enable_priority_scheduling=True`; the highest first.
            timeout_s: seconds after which it is aborted: it ends with the tokens that it has.

        Returns:
            As `generate` does; `meta_info` has also `token_weight_versions`, the weight version of each token. A
            request that was aborted has the `finish_reason` {"type": "abort", ...}.

        Raises:
            InvalidRequestError: SGLang cannot serve this request, or this rank is not the leader.
            WeightsInconsistentError, AsleepError: see `generate`; other requests go on.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError, EngineClosedError: the engine is closed.
        """
        self._check_leader("async_generate")
        if not (request_id is None or isinstance(request_id, str)):
            raise InvalidRequestError(f"request_id must be a string, got {request_id!r}")
        if not (priority is None or isinstance(priority, int)):
            raise InvalidRequestError(f"priority must be an integer, got {priority!r}")
        if not (timeout_s is None or (isinstance(timeout_s, (int, float)) and timeout_s > 0)):
            raise InvalidRequestError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
        made, single = req.build_requests(
            prompt, sampling_params, priority=priority, tokenizer=self._tokenizer, **options
        )
        name, sequences = self._requests.start(
            made,
            stream=bool(stream),
            request_id=request_id,
            timeout_s=timeout_s,
        )
        if stream:
            return self._requests.stream(name, sequences, with_text=return_text_in_logprobs)
        results = await self._requests.wait(name, sequences, with_text=return_text_in_logprobs)
        return results[0] if single else results

    async def parse_function_calls(
        self, text: str, tools: Sequence[Mapping[str, Any]], *, parser: str
    ) -> tuple[str, list[FunctionCall]]:
        """Find the function calls in what a model said, as SGLang's server does. Decoding goes on meanwhile.

        Args:
            text: the `text` of a finished result. Parsers that look for special tokens need the sampling parameter
                `skip_special_tokens=False`.
            tools: the functions, as OpenAI's API describes them and as chat templates take them:
                {"type": "function", "function": {"name": ..., "parameters": <JSON schema>}}.
            parser: SGLang's name of the format ("qwen25", "hermes", "llama3", ...), as for its `--tool-call-parser`.

        Returns:
            The text around the calls, and the calls in their order. SGLang leaves out calls of functions that are not
            among `tools`, and takes a call that is not well-formed for text.

        Raises:
            InvalidRequestError: no such parser, wrong `tools`, or this rank is not the leader.
            SchedulerDiedError, SchedulerError, CollectiveTimeoutError, EngineClosedError: the engine is closed.
        """
        self._check_leader("parse_function_calls")
        question = ParseCalls("", text, [dict(tool) for tool in tools], parser)
        try:
            codec.check(question)
        except codec.EncodeError as error:
            raise InvalidRequestError(
                f"text and parser must be strings, and tools dicts of plain values with strings as keys: {error}"
            ) from error
        return await self._requests.parse(question.text, question.tools, question.parser)

    def abort(self, request_id: str | None = None) -> int:
        """End a request of `async_generate`, or all of them. They end with the tokens that they have.

        Returns:
            How many sequences were still under way; one that ends by itself meanwhile is not aborted.
        """
        self._check_leader("abort")
        return self._requests.abort(request_id, "aborted")

    def pause(self) -> None:
        """Stop all requests of `async_generate` where they are, and those that come, until `resume`.

        They keep their tokens and give back their KV cache, which is computed again later. Meanwhile the ranks of the
        replica may update weights, or release memory and resume it.
        """
        self._check_leader("pause")
        self._client.send(Pause())

    def resume(self) -> None:
        """Go on with requests that were paused, as soon as weights and memory allow it."""
        self._check_leader("resume")
        self._client.send(Resume())

    def _check_leader(self, what: str) -> None:
        if not self.is_leader:
            raise InvalidRequestError(
                f"{what} is for the leader of a replica (engine.is_leader), rank {self._ranks[0]}, not for rank "
                f"{self._ranks[self.tp_rank]}"
            )
        self._client.check_alive()
