"""Makes SGLang's requests, and checks what SGLang's tokenizer manager would check."""

from __future__ import annotations

import difflib
import math
from typing import Any

from spmd_engine.control.generation import FunctionCall, GenerateRequest
from spmd_engine.errors import InvalidRequestError

_MOST_BIAS = 1e30  # float32 has it still when it is divided by the lowest temperature


def make_abort(rid: str) -> Any:
    """SGLang's demand to end all requests whose ids begin so."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(rid=rid)


def make_pause() -> Any:
    """SGLang's demand to stop its loop and to put all requests back into its queue, with their tokens."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    return PauseGenerationReqInput(mode="retract")


def make_resume() -> Any:
    """SGLang's demand to go on after a pause."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    return ContinueGenerationReqInput(torch_empty_cache=False)


def steps(scheduler: Any) -> int:
    """How many batches the scheduler has computed since its start."""
    return int(scheduler.forward_ct)


def can_pause(scheduler: Any) -> bool:
    """Whether nothing is on its way that a pause would not stop: a grammar that is being compiled, for example."""
    return not scheduler.grammar_manager.has_waiting_grammars()


def paused_requests(scheduler: Any) -> list[Any]:
    """SGLang's objects for the requests that wait, after a pause all that there are."""
    return list(scheduler.waiting_queue)


def make_request(request: GenerateRequest, rid: str, scheduler: Any, *, stream: bool = False) -> Any:
    """SGLang's request object.

    Raises:
        InvalidRequestError: SGLang would refuse it.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    known = set(SamplingParams.__struct_fields__)
    for name in map(str, request.sampling_params):
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            raise InvalidRequestError(
                f"unknown sampling parameter {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    try:
        params = SamplingParams(**request.sampling_params)
        params.normalize(scheduler.tokenizer)
        params.verify(scheduler.model_config.vocab_size)
        params = _with_types(params)
    except Exception as error:  # of whatever kind: a wrong regular expression has one of its own
        raise InvalidRequestError(f"invalid sampling parameters {request.sampling_params}: {error}") from error
    if scheduler.server_args.grammar_backend == "none" and any(
        getattr(params, name) is not None for name in ("json_schema", "regex", "ebnf", "structural_tag")
    ):
        raise InvalidRequestError(
            "constrained output needs a grammar backend: SpmdEngine(..., grammar_backend='xgrammar'), on the CPU "
            "'llguidance'"
        )
    if request.priority is not None and not scheduler.server_args.enable_priority_scheduling:
        raise InvalidRequestError("priority= needs SpmdEngine(..., enable_priority_scheduling=True)")
    _check_tokens(request, params, scheduler)
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text=request.text,
        input_ids=request.input_ids,
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=request.return_logprob,
        logprob_start_len=request.logprob_start_len,
        top_logprobs_num=request.top_logprobs_num,
        token_ids_logprob=request.token_ids_logprob,
        stream=stream,
        priority=request.priority,
    )


def _with_types(params: Any) -> Any:
    """Sampling parameters of the types that SGLang declares: what its sampler is given is not always looked at before.

    Raises:
        TypeError, ValueError, OverflowError: they are of others.
    """
    import msgspec

    custom, params.custom_params = params.custom_params, None  # for the user's own logit processors
    params = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=type(params))
    params.custom_params = custom
    return params


def _check_tokens(request: GenerateRequest, params: Any, scheduler: Any) -> None:
    """The checks that SGLang's tokenizer manager makes; without them the scheduler would index out of bounds."""
    vocab, context = int(scheduler.model_config.vocab_size), int(scheduler.model_config.context_len)
    length = len(request.input_ids)
    limit = min(context, int(scheduler.max_req_input_len))
    if length >= limit:
        raise InvalidRequestError(
            f"a prompt has {length} tokens; this engine takes fewer than {limit} "
            f"(context length {context}, KV cache {int(scheduler.max_total_num_tokens)} tokens)"
        )
    if params.max_new_tokens is not None and length + params.max_new_tokens > context:
        raise InvalidRequestError(
            f"{length} prompt tokens + max_new_tokens={params.max_new_tokens} exceed the context length of {context}"
        )
    _check_values(params, vocab)
    low, high = min(request.input_ids), max(request.input_ids)
    if low < 0 or high >= vocab:
        raise InvalidRequestError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab}")
    if any(not 0 <= token < vocab for token in request.token_ids_logprob or ()):
        raise InvalidRequestError(f"token_ids_logprob {request.token_ids_logprob} is outside the vocabulary of {vocab}")
    if not 0 <= request.top_logprobs_num <= vocab or not -1 <= request.logprob_start_len <= length:
        raise InvalidRequestError(
            f"top_logprobs_num={request.top_logprobs_num} must be between 0 and the vocabulary's {vocab}, and "
            f"logprob_start_len={request.logprob_start_len} between -1 and the prompt's length {length}"
        )


def _check_values(params: Any, vocab: int) -> None:
    """What SGLang's own checks let through, though its sampler fails on it: on a GPU for all requests, and for good."""
    if params.min_new_tokens and any(not 0 <= token < vocab for token in params.stop_token_ids or ()):
        raise InvalidRequestError(
            f"stop_token_ids {sorted(params.stop_token_ids)} with min_new_tokens must be in the vocabulary of {vocab}"
        )
    bias = list((params.logit_bias or {}).values())
    if not all(abs(value) <= _MOST_BIAS or value == -math.inf for value in bias) or bias.count(-math.inf) >= vocab:
        raise InvalidRequestError(
            f"logit_bias must be between {-_MOST_BIAS:g} and {_MOST_BIAS:g}, or -inf to forbid a token, and leave one"
        )
    if params.sampling_seed is not None and not -(1 << 63) <= params.sampling_seed < 1 << 63:
        raise InvalidRequestError(f"sampling_seed={params.sampling_seed} does not fit into 64 bits")
    if params.top_k >= 1 << 31:
        raise InvalidRequestError(f"top_k={params.top_k} does not fit into 32 bits; -1 is for all tokens")


def parse_function_calls(text: str, tools: list[Any], parser: str, tokenizer: Any) -> tuple[str, list[FunctionCall]]:
    """The text around the function calls in `text`, and the calls, as one of SGLang's parsers finds them.

    Raises:
        InvalidRequestError: there is no such parser, the tools are not described as OpenAI's API wants them, or the
            parser fails on the text.
    """
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    known = sorted(FunctionCallParser.ToolCallParserEnum)
    if parser not in known:
        raise InvalidRequestError(f"SGLang has no function-call parser {parser!r}; it has {', '.join(known)}")
    try:
        made = [Tool(**tool) for tool in tools]
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(
            f"tools must look like {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}: {error}"
        ) from error
    try:
        rest, found = FunctionCallParser(made, parser, tokenizer=tokenizer).parse_non_stream(text)
    except Exception as error:
        raise InvalidRequestError(f"SGLang's parser {parser!r} fails: {type(error).__name__}: {error}") from error
    return rest, [FunctionCall(call.name or "", call.parameters) for call in found]


def make_batch(requests: list[Any]) -> Any:
    """One message for a whole rollout."""
    from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput

    return BatchTokenizedGenerateReqInput(batch=requests)
