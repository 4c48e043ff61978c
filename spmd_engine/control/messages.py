"""Names everything that a trainer rank and its scheduler process tell each other over their channel."""

from __future__ import annotations

import signal

import msgspec

from spmd_engine.control.calls import Answer, AnyCall
from spmd_engine.control.codec import Plain
from spmd_engine.control.generation import FunctionCall, GenerateRequest, Increment
from spmd_engine.errors import ErrorReport

PROTOCOL = 2
# How many layouts of weights a scheduler process remembers, and how many its trainer takes for remembered.
KNOWN_LAYOUTS = 4
# Launchers and Ctrl-C send these to whole process groups: what they mean for the engine is the trainer rank's choice.
FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class GroupAddress(msgspec.Struct, frozen=True, tag=True):
    """Where the scheduler process of the first rank of `ranks`, the root, accepts the others.

    Attributes:
        ranks: global ranks that the group connects; the first one is the root.
        host, port: where the root listens.
        token: secret that a joining process must show.
        listener_fd: on the root, the listening socket, already bound; -1 elsewhere.
        trainers: process ids of the other ranks' trainers, by rank, as far as they are on the root's node.
    """

    ranks: tuple[int, ...]
    host: str
    port: int
    token: str
    listener_fd: int = -1
    trainers: dict[int, int] = {}


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to a scheduler process.

    SGLang's processes find one another through a store at `group.host` and `store_port`. The first of them serves it on
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
    group: GroupAddress
    model_path: str
    server_args: dict[str, Plain]
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


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The scheduler process serves.

    Attributes:
        memory: bytes that the engine holds on its device, by tag.
    """

    memory: dict[str, int]


class Descriptors(msgspec.Struct, frozen=True, tag=True):
    """The chunks that hold this rank's shards. With it comes a socket, over which their file descriptors follow.

    Attributes:
        counts: how many chunks each handle of `ShardMemory` stands for, in the order in which they follow.
    """

    counts: dict[bytes, int]


class Packing(msgspec.Struct, frozen=True, tag=True):
    """The trainer shall pack its shards in CPU memory, as it is asked to over the socket that comes with this."""


class Phase(msgspec.Struct, frozen=True, tag=True):
    """A traced call has come so far."""

    name: str


class Coming(msgspec.Struct, frozen=True, tag=True):
    """A weight update is being described: what can be done before the `Call` comes had better be done now."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Requests that begin as soon as they can, beside others. From the trainer of a replica's first rank only.

    Attributes:
        requests: by id. No id is the beginning of another one.
        stream: whether to report tokens as they come.
    """

    requests: dict[str, GenerateRequest]
    stream: bool


class Submits(msgspec.Struct, frozen=True, tag=True):
    """Several `Submit`s in one message: each is taken, or refused, by itself."""

    submits: tuple[Submit, ...]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End requests that were submitted; each reports what it has."""

    rids: tuple[str, ...]


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Stop all requests that were submitted where they are; they keep their tokens and give back their KV cache."""


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Go on with requests that were paused."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What has become of requests that were submitted, as it comes."""

    increments: list[Increment]


class PauseState(msgspec.Struct, frozen=True, tag=True):
    """Whether requests that were submitted stand still: nothing will come of them meanwhile."""

    is_paused: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Requests that did not begin, or a text that was not parsed, and why."""

    rids: tuple[str, ...]
    error: ErrorReport


class ParseCalls(msgspec.Struct, frozen=True, tag=True):
    """Find the function calls in `text`, with one of SGLang's parsers; answered by `Parsed` or `Refused`."""

    rid: str
    text: str
    tools: list[dict[str, Plain]]
    parser: str


class Parsed(msgspec.Struct, frozen=True, tag=True):
    """Answer to `ParseCalls`: the text around the calls, and the calls."""

    rid: str
    text: str
    calls: list[FunctionCall]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The scheduler process ends; nothing else will come."""

    error: ErrorReport


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the scheduler process. Needs no agreement of the other ranks."""


class Call(msgspec.Struct, frozen=True, tag=True):
    """A collective call.

    Attributes:
        seq: number of the call on this rank.
        body: what to do, with its arguments.
        digest: equal on two ranks if and only if they make the same call with the same arguments.
        summary: one line for error messages.
        is_overlapped: another call of this rank was running when this one was made.
        timeout_s: how long to wait for the other ranks, and for the result.
        is_traced: the trainer rank wants to hear of every `Phase`.
    """

    seq: int
    body: AnyCall
    digest: str
    summary: str
    is_overlapped: bool
    timeout_s: float
    is_traced: bool = False


class Reply(msgspec.Struct, frozen=True, tag=True):
    """Answer to the `Call` with the same `seq`: what it came to, or why it did not."""

    seq: int
    answer: Answer | None = None
    error: ErrorReport | None = None


ToScheduler = (
    Start | GroupAddress | Call | Coming | Descriptors | Submits | Abort | Pause | Resume | ParseCalls | Shutdown
)
ToTrainer = Ready | Reply | Phase | Packing | Progress | PauseState | Refused | Parsed | Failed
