"""The first cause among the errors of many ranks. With real processes: tests/integration/test_nodes.py."""

from __future__ import annotations

import itertools

import pytest

from spmd_engine import errors
from spmd_engine.integrations.causes import RankFailure, as_error, first_cause


def failed(rank, error, **kwargs):
    return RankFailure(rank, error, f"10.0.0.{rank}, pid {rank}", **kwargs)


OWN = failed(3, ValueError("bad reward"), text="Traceback: bad reward")
KILLED = failed(2, RuntimeError("the actor died"), is_process_gone=True)
SCHEDULER = failed(1, errors.SchedulerDiedError("killed", rank=1))
HEARSAY = failed(0, errors.SchedulerDiedError("rank 7 ended", rank=7))
LOST = failed(4, RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.3]:1234"))
LATE = failed(5, errors.CollectiveTimeoutError("waited for rank 3"))


@pytest.mark.parametrize("failures", list(itertools.permutations([OWN, KILLED, SCHEDULER, HEARSAY, LOST])))
def test_what_explains_the_others_comes_first_whenever_it_came(failures):
    order = [OWN, KILLED, SCHEDULER, HEARSAY, LOST]
    left = list(failures)
    for expected in order:
        assert first_cause(left) is expected
        left.remove(expected)


def test_among_equals_the_earliest_counts():
    assert first_cause([LATE, LOST]) is LATE and first_cause([LOST, LATE]) is LOST
    assert [failure.is_own for failure in (OWN, KILLED, SCHEDULER, HEARSAY, LOST)] == [True, True, True, False, False]


def test_the_error_names_the_culprit_and_the_others():
    error = as_error("step", [LOST, HEARSAY], 8)
    assert error.rank == 7 and error.cause is HEARSAY.error and error.errors == {4: LOST.error, 0: HEARSAY.error}
    first, *others = str(error).splitlines()
    assert first == "step: rank 7 failed first, says rank 0 (10.0.0.0, pid 0): SchedulerDiedError: rank 7 ended"
    assert others[0].startswith("then rank 4 (10.0.0.4, pid 4): RuntimeError: [gloo/")
    assert "6 of 8 ranks had returned, or said nothing" in others[1]
    assert "Traceback on rank 3:\nTraceback: bad reward" in str(as_error("step", [OWN], 4))
