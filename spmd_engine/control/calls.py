"""Names every collective call of scheduler processes, what its ranks must agree on, and what it answers.

A call is a frozen Struct. `common` is what all ranks must have in common, `summary` a line for messages, and
`ranks` the ranks of all replicas that make the call together; () where it is the caller's replica alone.
"""

from __future__ import annotations

import msgspec

from spmd_engine.control.digest import digest
from spmd_engine.control.generation import GenerateOutput, GenerateRequest
from spmd_engine.planning.layout import SourceLayout
from spmd_engine.planning.read_sets import PackedReadSets
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.stats import UpdateStats


class CallBody(msgspec.Struct, frozen=True):
    """Base of all calls."""

    @property
    def name(self) -> str:
        """What users know the call by."""
        return _NAMES[type(self)]

    @property
    def ranks(self) -> tuple[int, ...]:
        return ()

    def common(self) -> object:
        return None

    def summary(self) -> str:
        return f"{self.name}()"

    def digest(self) -> str:
        """Equal on two ranks if and only if they make the same call with the same arguments."""
        return digest([self.name, self.common()])


class Generate(CallBody, frozen=True, tag=True):
    """Generate for all requests, in one batch."""

    requests: list[GenerateRequest]

    def common(self) -> object:
        return [vars(request) for request in self.requests]

    def summary(self) -> str:
        return f"generate({len(self.requests)} sequences)"


class FlushCache(CallBody, frozen=True, tag=True):
    """Drop the prefix cache."""


class WeightChecksums(CallBody, frozen=True, tag=True):
    """Digest the bytes of all parameters."""


class _Occupy(CallBody, frozen=True):
    tags: list[str] | None

    def common(self) -> object:
        return self.tags

    def summary(self) -> str:
        return f"{self.name}({'' if self.tags is None else self.tags})"


class ReleaseMemory(_Occupy, frozen=True, tag=True):
    """Give memory back; `tags` None for all that is awake."""


class ResumeMemory(_Occupy, frozen=True, tag=True):
    """Take memory again; `tags` None for all that sleeps."""


class UpdateWeights(CallBody, frozen=True, tag=True):
    """Move new weights from the trainers' shards into SGLang's parameters.

    Attributes:
        holders: ranks of all replicas that share the weights, and of all that hold shards.
        key: of the layout.
        layout: None if the scheduler process has it already.
        optional: names of weights that the engine need not use.
        memory: where this rank's shards are; None if they are where they were.
        verify: compare every element afterwards.
        running: what becomes of requests that run: "wait", "abort" or "pause".
        bucket_bytes: size of a bucket, for what cannot be read in place.
    """

    holders: tuple[int, ...]
    key: str
    layout: SourceLayout | None
    optional: frozenset[str]
    memory: ShardMemory | None
    verify: bool
    running: str
    bucket_bytes: int
    weights: int

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.holders

    def common(self) -> object:
        return [self.holders, self.key, self.verify, self.running, self.bucket_bytes]

    def summary(self) -> str:
        what = f"{self.weights} weights over ranks {list(self.holders)}, layout {self.key[:8]}"
        return f"update_weights({what}, verify={self.verify})"


class Explain(CallBody, frozen=True, tag=True):
    """Find out what an update would move.

    Attributes:
        holders, key, layout, optional: as for `UpdateWeights`.
        is_in_cpu_memory: whether this rank's shards are.
    """

    holders: tuple[int, ...]
    key: str
    layout: SourceLayout
    optional: frozenset[str]
    is_in_cpu_memory: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.holders

    def common(self) -> object:
        return [self.holders, self.key]

    def summary(self) -> str:
        return f"explain({len(self.layout.weights)} weights over ranks {list(self.holders)}, layout {self.key[:8]})"


class Meet(CallBody, frozen=True, tag=True):
    """Wait until all ranks of the replica are there, before any of them waits for ranks of others.

    Attributes:
        what: the call that needs it, for messages.
        group: ranks that will be connected.
        number: of the meeting that this rank proposes; the highest one counts.
        running: see `UpdateWeights`.
    """

    what: str
    group: tuple[int, ...]
    number: int
    running: str

    def common(self) -> object:
        return [self.group, self.running]

    def summary(self) -> str:
        return self.what


class Refuse(CallBody, frozen=True, tag=True):
    """Tell the other ranks that this one cannot make a call, as its trainer rank knows already.

    Attributes:
        call: name of the call.
        reason: the error.
        holders: ranks of all replicas that wait in that call, as far as this rank knows them.
    """

    call: str
    reason: str
    holders: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.holders

    def common(self) -> object:
        return self.call

    def summary(self) -> str:
        return f"{self.call}(...) refused: {self.reason}"


AnyCall = (
    Generate | FlushCache | WeightChecksums | ReleaseMemory | ResumeMemory | UpdateWeights | Explain | Meet | Refuse
)
_NAMES: dict[type[CallBody], str] = {
    Generate: "generate",
    FlushCache: "flush_cache",
    WeightChecksums: "weight_checksums",
    ReleaseMemory: "release_memory_occupation",
    ResumeMemory: "resume_memory_occupation",
    UpdateWeights: "update_weights",
    Explain: "explain",
    Meet: "meet",
    Refuse: "refused",
}


class Done(msgspec.Struct, frozen=True, tag=True):
    """The call has been made, and there is nothing to tell."""


class Generated(msgspec.Struct, frozen=True, tag=True):
    """What came of `Generate`, in the order of its requests."""

    outputs: list[GenerateOutput]


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """Digests by SGLang's names."""

    by_name: dict[str, str]


class Occupation(msgspec.Struct, frozen=True, tag=True):
    """What sleeps after `ReleaseMemory` or `ResumeMemory`, and bytes on the device by tag."""

    sleeping: tuple[str, ...]
    memory: dict[str, int]


class Updated(msgspec.Struct, frozen=True, tag=True):
    """What `UpdateWeights` has moved."""

    stats: UpdateStats


class ReadsOfRank(msgspec.Struct, frozen=True, tag=True):
    """What one rank would read in an update.

    Attributes:
        read_sets: key of it in `Explained.read_sets`.
        node: identity of its node.
        is_off_loaded: its shards are in CPU memory, and its engine computes on a GPU.
    """

    read_sets: str
    node: str
    is_off_loaded: bool


class Explained(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Explain`.

    Attributes:
        ranks: in the order of `Explain.holders`.
        read_sets: what ranks read, by key.
        fallback: weights that the model's own loader would take, and why.
    """

    ranks: list[ReadsOfRank]
    read_sets: dict[str, PackedReadSets]
    fallback: dict[str, str]


class Met(msgspec.Struct, frozen=True, tag=True):
    """The number of the meeting on which the ranks agree."""

    number: int


Answer = Done | Generated | Checksums | Occupation | Updated | Explained | Met
