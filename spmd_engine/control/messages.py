"""Names everything that a trainer rank and its scheduler process tell each other."""

from __future__ import annotations

import json
import signal
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spmd_engine.errors import ErrorReport, InvalidRequestError

PROTOCOL = 1
# Launchers and Ctrl-C send these to whole process groups: what they mean for the engine is the trainer rank's choice.
FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class GenerateRequest:
    """One sequence to generate; `n > 1` has been expanded."""

    input_ids: array[int]
    text: str | None
    sampling_params: dict[str, Any]
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    token_ids_logprob: list[int] | None
    priority: int | None = None

    def to_frame(self) -> tuple[dict[str, Any], bytes]:
        """As values that JSON can tell, if the sampling parameters can be told so, and bytes; for a ticket."""
        return {**vars(self), "input_ids": len(self.input_ids)}, self.input_ids.tobytes()

    def as_told(self) -> GenerateRequest:
        """This request as it is after a frame has been sent and received.

        Raises:
            InvalidRequestError: the sampling parameters cannot be told.
        """
        header, blob = self.to_frame()
        try:
            told = json.loads(json.dumps(header))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"sampling parameters of requests that run beside others must be plain values: {error}"
            ) from error
        return GenerateRequest.from_frame(told, blob)

    @staticmethod
    def from_frame(header: dict[str, Any], blob: bytes) -> GenerateRequest:
        """What `to_frame` made."""
        return GenerateRequest(**{**header, "input_ids": array("q", blob)})


@dataclass(frozen=True)
class GenerateOutput:
    """What a scheduler process returns for one `GenerateRequest`; log-probabilities as SGLang's flat lists.

    Attributes:
        output_ids: the tokens; as an array they cross the channel, and are digested, in no time.
        weight_version: of the last token.
        token_versions: the weight version of each token, where they may differ.
    """

    output_ids: list[int] | array[int]
    finish_reason: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: dict[str, list[Any]] | None
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
    output_ids: array[int]
    versions: list[int]
    logprobs: dict[str, list[Any]] | None
    finish_reason: dict[str, Any] | None
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


def no_logprobs() -> dict[str, list[Any]]:
    """SGLang's flat lists of log-probabilities, empty."""
    kinds = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
    return {f"{side}_{kind}_{part}": [] for side in ("input", "output") for kind in kinds for part in ("val", "idx")}


@dataclass(frozen=True)
class LinkAddress:
    """Where the scheduler process of the first rank of `ranks` accepts the others.

    Attributes:
        ranks: global ranks that the link connects; the first one is the hub.
        host, port: where the hub listens.
        token: secret that a joining process must show.
        listener_fd: on the hub, the listening socket, already bound; -1 elsewhere.
        trainers: process ids of the other ranks' trainers, by rank, as far as they are on the hub's node.
    """

    ranks: tuple[int, ...]
    host: str
    port: int
    token: str
    listener_fd: int = -1
    trainers: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """First message to a scheduler process.

    SGLang's processes find one another through a store at `link.host` and `store_port`. The first of them serves it on
    `store_fd`, a listening socket that is bound already; -1 elsewhere.

    The weights of an engine that starts anew (`is_restart`) are not those that the trainer's `weight_version` names.

    Attributes:
        node: identity of this node; see `rendezvous.node_identity`.
        nnodes, node_rank: over how many nodes the replica's ranks are spread, and which of them this is.
        host: this node's address on the way to the others.
        gpu_id: CUDA ordinal of this rank among the GPUs that the process sees.
        keeps_mapped: the trainers' memory stays mapped while memory is released and resumed.
    """

    protocol: int
    rank: int
    tp_rank: int
    link: LinkAddress
    model_path: str
    server_args: dict[str, Any]
    random_seed: int
    store_port: int
    store_fd: int
    gpu_id: int
    on_cpu: bool
    node: str
    nnodes: int
    node_rank: int
    host: str
    trainer_pid: int
    scratch: str
    timeout_s: float
    weight_version: int
    is_restart: bool
    keeps_mapped: bool


@dataclass(frozen=True)
class Ready:
    """The scheduler process serves.

    Attributes:
        memory: bytes that the engine holds on its device, by tag.
    """

    memory: dict[str, int]


@dataclass(frozen=True)
class Descriptors:
    """The chunks that hold this rank's shards. With it comes a socket, over which their file descriptors follow.

    Attributes:
        counts: how many chunks each handle of `ShardMemory` stands for, in the order in which they follow.
    """

    counts: dict[bytes, int]


@dataclass(frozen=True)
class Packing:
    """The trainer shall pack its shards in CPU memory, as it is asked to over the socket that comes with this."""


@dataclass(frozen=True)
class Call:
    """A collective call.

    Attributes:
        seq: number of the call on this rank.
        kind: "generate", "update_weights", "flush_cache", ..., or "refused" for a call that the trainer rank
            already knows to be wrong; it is sent so that the other ranks do not wait for it.
        payload: arguments, built of plain Python and NumPy.
        digest: equal on two ranks if and only if the arguments are.
        summary: one line for error messages.
        overlapped: another call of this rank was running when this one was made.
        timeout_s: how long to wait for the other ranks, and for the result.
        is_traced: the trainer rank wants to hear of every `Phase`.
    """

    seq: int
    kind: str
    payload: Any
    digest: str
    summary: str
    overlapped: bool
    timeout_s: float
    is_traced: bool = False


@dataclass(frozen=True)
class Phase:
    """A traced call has come so far."""

    name: str


@dataclass(frozen=True)
class Coming:
    """A weight update is being described: what can be done before the `Call` comes had better be done now."""


@dataclass(frozen=True)
class Submit:
    """Requests that begin as soon as they can, beside others. From the trainer of a replica's first rank only.

    Attributes:
        requests: of `requests.GenerateRequest`, by id. No id is the beginning of another one.
        stream: whether to report tokens as they come.
    """

    requests: dict[str, Any]
    stream: bool


@dataclass(frozen=True)
class Submits:
    """Several `Submit`s in one message: each is taken, or refused, by itself."""

    submits: tuple[Submit, ...]


@dataclass(frozen=True)
class Abort:
    """End requests that were submitted; each reports what it has."""

    rids: tuple[str, ...]


@dataclass(frozen=True)
class Pause:
    """Stop all requests that were submitted where they are; they keep their tokens and give back their KV cache."""


@dataclass(frozen=True)
class Resume:
    """Go on with requests that were paused."""


@dataclass(frozen=True)
class Progress:
    """What has become of requests that were submitted, as lists of `requests.Increment`."""

    increments: list[Any]


@dataclass(frozen=True)
class Held:
    """Whether requests that were submitted stand still: nothing will come of them meanwhile."""

    is_held: bool


@dataclass(frozen=True)
class Refused:
    """Requests that did not begin, or a text that was not parsed, and why."""

    rids: tuple[str, ...]
    error: ErrorReport


@dataclass(frozen=True)
class ParseCalls:
    """Find the function calls in `text`, with one of SGLang's parsers; answered by `Parsed` or `Refused`."""

    rid: str
    text: str
    tools: list[Any]
    parser: str


@dataclass(frozen=True)
class Parsed:
    """Answer to `ParseCalls`: the text around the calls, and a list of `requests.FunctionCall`."""

    rid: str
    text: str
    calls: list[Any]


@dataclass(frozen=True)
class Reply:
    """Answer to the `Call` with the same `seq`; exactly one of `error` and `value` counts."""

    seq: int
    value: Any = None
    error: ErrorReport | None = None


@dataclass(frozen=True)
class Failed:
    """The scheduler process ends; nothing else will come."""

    error: ErrorReport


@dataclass(frozen=True)
class Shutdown:
    """End the scheduler process. Needs no agreement of the other ranks."""
