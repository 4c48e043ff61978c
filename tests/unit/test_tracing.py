from __future__ import annotations

import threading

import pytest
from torch.profiler import ProfilerActivity, profile

from spmd_engine.trainer.tracing import Spans, is_recording, span


def test_without_a_profiler_nothing_is_made():
    assert not is_recording() and span("one") is span("two")
    with span("one"), Spans() as spans:
        spans.begin("three")


def test_spans_end_where_the_next_begins_also_after_an_error():
    other: list[bool] = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        assert is_recording()
        with pytest.raises(KeyError), span("outer"), Spans() as spans:
            spans.begin("one")
            spans.begin("two")
            raise KeyError
        thread = threading.Thread(target=lambda: other.append(is_recording()))
        thread.start()
        thread.join()
    assert other == [False] and not is_recording()
    events = [event for event in profiler.events() if event.name.startswith("spmd_engine.")]
    outer, one, two = sorted(events, key=lambda event: event.time_range.start)
    assert [outer.name, one.name, two.name] == ["spmd_engine.outer", "spmd_engine.one", "spmd_engine.two"]
    assert one.time_range.end <= two.time_range.start and two.time_range.end <= outer.time_range.end
