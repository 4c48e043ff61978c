"""The ways of sharding that `update_weights` understands, on real ranks."""

from __future__ import annotations

import pytest

from integration.jobs import run_job


@pytest.mark.one_version
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_shards_are_where_their_layout_says(tmp_path, kind):
    run_job(f"trainers.{kind}", 4, tmp_path)


def test_every_kind_of_trainer_fills_an_engine_bit_for_bit(tmp_path, checkpoint, reference):
    job = run_job("trainers.update", 4, tmp_path, name="llama", path=checkpoint("llama", 1), tp=2)
    expected = reference("llama", 2, True)
    for rank, value in enumerate(job.values):
        assert value == expected[rank % 2]
