"""From the arguments of `generate` to what a scheduler process runs, and from its answer to SGLang's output dicts."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any, TypedDict

from spmd_engine.control import codec
from spmd_engine.control.generation import GenerateOutput, GenerateRequest
from spmd_engine.errors import ConfigError, InvalidRequestError

# SGLang shows the detokenizer this many prompt tokens, so that the first output token joins on to the prompt.
_SURROGATE_TOKENS = 5
_NO_TOKENS = array("q")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tiktoken.model")


def has_tokenizer(path: str) -> bool:
    """Whether `path` can be tokenized with; a name that is not a local directory is taken to be a hub repository."""
    return not os.path.isdir(path) or any(os.path.exists(os.path.join(path, name)) for name in _TOKENIZER_FILES)


def load_tokenizer(path: str, server_args: Mapping[str, Any]) -> Any:
    """The Hugging Face tokenizer that SGLang would use.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    kwargs: dict[str, Any] = {"trust_remote_code": bool(server_args.get("trust_remote_code", False))}
    if server_args.get("revision"):
        kwargs["revision"] = server_args["revision"]
    if server_args.get("tokenizer_mode") == "slow":
        kwargs["use_fast"] = False
    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except Exception as error:
        raise ConfigError(
            f"the tokenizer of {path!r} cannot be loaded: {error}. Pass tokenizer_path=, or skip_tokenizer_init=True "
            "to work with input_ids only"
        ) from error


class GenerateOptions(TypedDict, total=False):
    """More arguments of `generate` and `async_generate`: each for all prompts, or a list with one for each.

    Attributes:
        input_ids: token ids instead of `prompt`, one list or a list of lists.
        return_logprob: also return the log-probabilities of the output tokens; False by default.
        logprob_start_len: first prompt position whose log-probability is returned; -1, the default, for none.
        top_logprobs_num: log-probabilities of this many most likely tokens at each position; 0 by default.
        token_ids_logprob: log-probabilities of these tokens at each position.
    """

    input_ids: Sequence[int] | Sequence[Sequence[int]] | None
    return_logprob: bool | Sequence[bool]
    logprob_start_len: int | Sequence[int] | None
    top_logprobs_num: int | Sequence[int] | None
    token_ids_logprob: Sequence[int] | Sequence[Sequence[int]] | None


def build_requests(
    prompt: str | Sequence[str] | None,
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    return_logprob: bool | Sequence[bool] = False,
    logprob_start_len: int | Sequence[int] | None = None,
    top_logprobs_num: int | Sequence[int] | None = None,
    token_ids_logprob: Sequence[int] | Sequence[Sequence[int]] | None = None,
    priority: int | None = None,
    tokenizer: Any,
    **unknown: Any,
) -> tuple[list[GenerateRequest], bool]:
    """Check and expand the arguments of `SpmdEngine.generate`.

    Returns:
        the requests, those of one prompt together; and whether the caller gets one dict rather than a list.

    Raises:
        InvalidRequestError: with what to do.
    """
    if unknown:
        known = ("sampling_params", *GenerateOptions.__annotations__, "return_text_in_logprobs")
        why = f"of sglang.Engine.generate's arguments there are prompt, {', '.join(known)}"
        if any(name.endswith("_data") for name in unknown):
            why = "images, video and audio are not supported"
        elif "stream" in unknown:
            why = "generate returns whole outputs; async_generate(..., stream=True) streams"
        raise InvalidRequestError(f"unknown arguments {', '.join(sorted(unknown))}: {why}")
    ids, texts, single = _tokens(prompt, input_ids, tokenizer)
    count = len(ids)
    params = _per_prompt(
        sampling_params if sampling_params is not None else {}, count, "sampling_params", Mapping, "a dict"
    )
    plain = [{str(name): _plain(value, str(name)) for name, value in p.items()} for p in params]
    counts = [_sample_count(p) for p in plain]
    if len(set(counts)) > 1:
        raise InvalidRequestError(f"all prompts of one call need the same n, got {sorted(set(counts))}")
    wanted = _per_prompt(return_logprob, count, "return_logprob", bool, "a bool")
    starts = _per_prompt(
        -1 if logprob_start_len is None else logprob_start_len, count, "logprob_start_len", int, "an int"
    )
    tops = _per_prompt(0 if top_logprobs_num is None else top_logprobs_num, count, "top_logprobs_num", int, "an int")
    same: Any = token_ids_logprob
    if isinstance(same, (list, tuple)) and same and isinstance(same[0], int):
        same = [same] * count
    tokens = _per_prompt(same, count, "token_ids_logprob", (list, tuple, type(None)), "a list of ints or None")
    if not all(isinstance(token, int) for wanted_tokens in tokens for token in wanted_tokens or ()):
        raise InvalidRequestError(f"token_ids_logprob must hold integers, got {token_ids_logprob!r}")
    requests = [
        GenerateRequest(
            input_ids=ids[i],
            text=texts[i],
            sampling_params={**plain[i], "n": 1},
            return_logprob=wanted[i],
            logprob_start_len=int(starts[i]),
            top_logprobs_num=int(tops[i]),
            token_ids_logprob=None if tokens[i] is None else list(map(int, tokens[i])),
            priority=None if priority is None else int(priority),
        )
        for i in range(count)
        for _ in range(counts[i])
    ]
    try:
        for request in requests:
            codec.check(replace(request, input_ids=_NO_TOKENS))  # an array holds nothing but numbers of 64 bits
    except codec.EncodeError as error:
        raise InvalidRequestError(
            f"prompts and sampling parameters must be of plain values and numbers of 64 bits: {error}"
        ) from error
    return requests, single and len(requests) == 1


def _tokens(prompt: Any, input_ids: Any, tokenizer: Any) -> tuple[list[array[int]], list[str | None], bool]:
    if (prompt is None) == (input_ids is None):
        raise InvalidRequestError("pass either prompt= or input_ids=, one of them")
    if prompt is not None:
        if tokenizer is None:
            raise InvalidRequestError(
                "prompt= needs a tokenizer, and this engine has none: pass input_ids=, or start it with a model "
                "directory that holds a tokenizer (or tokenizer_path=)"
            )
        single = isinstance(prompt, str)
        texts = [prompt] if single else list(prompt) if isinstance(prompt, (list, tuple)) else [None]
        if not texts:
            raise InvalidRequestError("prompt is an empty list")
        if not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError(
                "prompt must be a string or a list of strings; images and video are not supported"
            )
        texts = [str(text) for text in texts]  # of no class of the user's own
        try:
            arrays = [array("q", ids) for ids in tokenizer(texts)["input_ids"]]
        except Exception as error:  # of whatever kind: half of a surrogate pair, for one, is a TypeError
            raise InvalidRequestError(f"the tokenizer fails on a prompt: {type(error).__name__}: {error}") from error
        for text, ids in zip(texts, arrays, strict=True):
            if not ids:
                raise InvalidRequestError(f"prompt {text!r} has no tokens: a prompt needs at least one")
        return arrays, texts, single
    if hasattr(input_ids, "tolist"):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, (list, tuple)) or not input_ids:
        raise InvalidRequestError("input_ids must be a non-empty list of token ids, or a list of such lists")
    single = not isinstance(input_ids[0], (list, tuple, array)) and not hasattr(input_ids[0], "tolist")
    batch = [input_ids] if single else list(input_ids)
    try:
        arrays = [array("q", ids.tolist() if hasattr(ids, "tolist") else ids) for ids in batch]
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"input_ids must hold integers: {error}") from None
    for i, ids in enumerate(arrays):
        if not ids:
            raise InvalidRequestError(f"input_ids[{i}] is empty: a prompt needs at least one token")
    return arrays, [None] * len(arrays), single


def _per_prompt(value: Any, count: int, name: str, kind: Any, kind_name: str) -> list[Any]:
    """`value` for every prompt: as it is if it has one entry a prompt, else repeated."""
    many = isinstance(value, (list, tuple))
    values = list(value) if many else [value] * count
    if many and len(values) != count:
        raise InvalidRequestError(f"{name} has {len(values)} entries for {count} prompts")
    for item in values:
        if not isinstance(item, kind):
            raise InvalidRequestError(f"{name} must be {kind_name} for each prompt, got {item!r}")
    return values


def _plain(value: Any, name: str) -> Any:
    """A sampling parameter as values that any process can read: no class of the trainer's own, no code."""
    if hasattr(value, "tolist"):  # NumPy's and torch's
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, name) for item in value]
    raise InvalidRequestError(f"sampling parameter {name} must be of plain values, got {type(value).__name__}")


def _sample_count(params: Mapping[str, Any]) -> int:
    n = params.get("n", 1)
    n = 1 if n is None else n
    if not isinstance(n, int) or n < 1:
        raise InvalidRequestError(f"sampling parameter n must be an integer of at least 1, got {n!r}")
    return n


def format_outputs(
    requests: list[GenerateRequest],
    outputs: list[GenerateOutput],
    *,
    ids: Sequence[str],
    tokenizer: Any,
    return_text_in_logprobs: bool,
) -> list[dict[str, Any]]:
    """SGLang's output dicts: `output_ids`, `meta_info` with the given `ids`, and `text` with a tokenizer.

    Raises:
        InvalidRequestError: SGLang has found out while it ran that a request is wrong: its regular expression, say.
    """
    for output in outputs:
        if output.finish_reason.get("status_code") == HTTPStatus.BAD_REQUEST:
            raise InvalidRequestError(f"SGLang refuses a request: {output.finish_reason.get('message')}")
    texts = _decode(requests, outputs, tokenizer) if tokenizer is not None else None
    results = []
    for i, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        meta: dict[str, Any] = {
            "id": ids[i],
            "finish_reason": output.finish_reason,
            "prompt_tokens": output.prompt_tokens,
            "completion_tokens": output.completion_tokens,
            "cached_tokens": output.cached_tokens,
            "weight_version": output.weight_version,
        }
        if output.token_versions is not None:
            meta["token_weight_versions"] = output.token_versions
        if output.logprobs is not None:
            meta.update(_logprobs(request, output.logprobs, tokenizer if return_text_in_logprobs else None))
        result: dict[str, Any] = {"output_ids": list(output.output_ids), "meta_info": meta}
        if texts is not None:
            result = {"text": texts[i], **result}
        results.append(result)
    return results


class TextStream:
    """Text of a sequence, bit by bit, as its tokens come.

    Args:
        request: whose prompt comes before.
    """

    def __init__(self, request: GenerateRequest, tokenizer: Any) -> None:
        self._tokenizer, self._options = tokenizer, _decoding_options(request)
        self._ids = list(request.input_ids[-_SURROGATE_TOKENS:])
        self._begin, self._decoded = 0, len(self._ids)  # tokens before `_begin` cannot change the text any more
        self._text = ""
        self._shown = 0
        stop = request.sampling_params.get("stop") or ()
        self._stops = [stop] if isinstance(stop, str) else [str(one) for one in stop]  # type: ignore[attr-defined]

    def add(self, ids: list[int]) -> str:
        """The text that further tokens add. What may be half of a character, or of a stop string, waits."""
        self._ids += ids
        before = self._tokenizer.decode(self._ids[self._begin : self._decoded], **self._options)
        text = self._tokenizer.decode(self._ids[self._begin :], **self._options)
        if len(text) > len(before) and not text.endswith("\ufffd"):
            self._begin, self._decoded = self._decoded, len(self._ids)
            self._text += text[len(before) :]
        end = len(self._text) - max((_overlap(self._text, stop) for stop in self._stops), default=0)
        shown, self._shown = self._shown, max(self._shown, end)
        return self._text[shown : self._shown]

    def finish(self, whole: str) -> str:
        """The rest of the `whole` text."""
        return whole[self._shown :]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def _decoding_options(request: GenerateRequest) -> dict[str, Any]:
    names = ("skip_special_tokens", "spaces_between_special_tokens")
    return {name: request.sampling_params.get(name, True) for name in names}


def _decode(requests: list[GenerateRequest], outputs: list[GenerateOutput], tokenizer: Any) -> list[str]:
    texts = []
    for request, output in zip(requests, outputs, strict=True):
        params = request.sampling_params
        matched = output.finish_reason.get("matched")
        keep_stop = bool(params.get("no_stop_trim", False))
        ids = list(output.output_ids)
        if isinstance(matched, int) and ids and not keep_stop:
            ids = ids[:-1]
        options = _decoding_options(request)
        before = list(request.input_ids[-_SURROGATE_TOKENS:])
        text = tokenizer.decode(before + ids, **options)[len(tokenizer.decode(before, **options)) :]
        if isinstance(matched, str) and (at := text.find(matched)) >= 0:
            text = text[: at + len(matched)] if keep_stop else text[:at]
        texts.append(text)
    return texts


def _logprobs(request: GenerateRequest, raw: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    def flat(values: list[float], ids: list[int]) -> list[tuple[float, int, str | None]]:
        texts = tokenizer.batch_decode([[i] for i in ids]) if tokenizer is not None else [None] * len(ids)
        return list(zip(values, ids, texts, strict=True))

    def nested(name: str) -> list[Any]:
        pairs = zip(raw[f"{name}_val"], raw[f"{name}_idx"], strict=True)
        return [flat(values, ids) if values else None for values, ids in pairs]

    meta: dict[str, Any] = {
        f"{side}_token_logprobs": flat(raw[f"{side}_token_logprobs_val"], raw[f"{side}_token_logprobs_idx"])
        for side in ("input", "output")
    }
    if request.top_logprobs_num > 0:
        meta.update({f"{side}_top_logprobs": nested(f"{side}_top_logprobs") for side in ("input", "output")})
    if request.token_ids_logprob is not None:
        meta.update(
            {f"{side}_token_ids_logprobs": nested(f"{side}_token_ids_logprobs") for side in ("input", "output")}
        )
    return meta
