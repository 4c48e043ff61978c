"""What `SpmdEngine.update_weights` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateStats:
    """One weight update, as this rank's scheduler process saw it.

    Attributes:
        weight_version: the version that the update committed.
        planned: True if this update made a plan, False if it reused one.
        local_bytes: bytes read from this rank's own shard.
        remote_bytes: bytes read from the shards of other ranks.
        block_copies: rows of the copy table.
        fallback_weights: names that went through the model's own loader because its loading is not a plain copy.
        wrong_elements: elements that differ from the source after the copy; None unless `verify=True`.
        record_s, plan_s: seconds to record SGLang's `load_weights` and to build the plan; 0 when reused.
        describe_s: seconds on the trainer rank to describe the source and to wait for the work queued on its stream.
        wait_s: seconds until all ranks had announced the same update, with their shards final.
        bind_s: seconds to open memory that has moved and to put its addresses into the table; about 0 otherwise.
        copy_s: seconds of the copy, fallback included.
        device_s: seconds of that which the copy itself ran, by the device's clock on a GPU.
        commit_s: seconds until all ranks had copied, and the version was committed.
        total_s: seconds of the whole call on the trainer rank.
    """

    weight_version: int
    planned: bool
    local_bytes: int
    remote_bytes: int
    block_copies: int
    fallback_weights: tuple[str, ...]
    wrong_elements: int | None
    record_s: float
    plan_s: float
    wait_s: float
    copy_s: float
    describe_s: float = 0.0
    bind_s: float = 0.0
    device_s: float = 0.0
    commit_s: float = 0.0
    total_s: float = 0.0
