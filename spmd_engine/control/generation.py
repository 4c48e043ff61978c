"""Names what a trainer rank asks its scheduler process to generate, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from spmd_engine.control.codec import Plain, Tokens

#: SGLang's flat lists of log-probabilities and token ids, by SGLang's names; those of top tokens are nested.
Logprobs = dict[str, list[Plain]]


@dataclass(frozen=True)
class GenerateRequest:
    """One sequence to generate; `n > 1` has been expanded."""

    input_ids: Tokens
    text: str | None
    sampling_params: dict[str, Plain]
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    token_ids_logprob: list[int] | None
    priority: int | None = None


@dataclass(frozen=True)
class GenerateOutput:
    """What a scheduler process returns for one `GenerateRequest`; log-probabilities as SGLang's flat lists.

    Attributes:
        output_ids: the tokens; as an array they cross the channel, and are digested, in no time.
        weight_version: of the last token.
        token_versions: the weight version of each token, where they may differ.
    """

    output_ids: Tokens
    finish_reason: dict[str, Plain]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: Logprobs | None
    weight_version: int
    token_versions: list[int] | None = None


@dataclass(frozen=True)
class Increment:
    """What came of a request since its last increment.

    Attributes:
        rid: of the request.
        output_ids: new tokens.
        versions: the weight version of each.
        logprobs: their log-probabilities, as SGLang's flat lists; None if not wanted.
        finish_reason: None if more will come.
        prompt_tokens, cached_tokens: of the request.
    """

    rid: str
    output_ids: Tokens
    versions: list[int]
    logprobs: Logprobs | None
    finish_reason: dict[str, Plain] | None
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class FunctionCall:
    """What a model wants to be called.

    Attributes:
        name: of the function.
        arguments: as JSON.
    """

    name: str
    arguments: str


def no_logprobs() -> Logprobs:
    """SGLang's flat lists of log-probabilities, empty."""
    kinds = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
    return {f"{side}_{kind}_{part}": [] for side in ("input", "output") for kind in kinds for part in ("val", "idx")}
