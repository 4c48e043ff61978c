from __future__ import annotations

from array import array
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_engine.control import codec
from spmd_engine.control.calls import AnyCall, Generate, UpdateWeights
from spmd_engine.control.codec import Plain, Tokens
from spmd_engine.control.generation import GenerateRequest
from spmd_engine.control.messages import ParseCalls
from spmd_engine.errors import ErrorReport
from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.layout import FlatShard, Mesh, Replicate, Shard, SourceLayout, StridedShard, Weight
from spmd_engine.planning.shard_memory import ShardMemory

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@dataclass(frozen=True)
class Mixed:
    tokens: Tokens
    plain: dict[str, Plain]
    table: np.ndarray


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)), st.dictionaries(st.text(), PLAIN, max_size=4))
def test_values_come_back_as_they_were(tokens, plain):
    table = np.zeros(3, BLOCK_COPY_DTYPE)
    table["src"] = [1, 2, 1 << 63]
    found = codec.decode(codec.encode(Mixed(array("q", tokens), plain, table)), Mixed)
    assert found.tokens == array("q", tokens) and found.plain == plain
    assert found.table.dtype == BLOCK_COPY_DTYPE and np.array_equal(found.table, table)


def test_numpys_numbers_are_numbers():
    assert codec.decode(codec.encode({"a": np.int64(3), "b": np.float32(0.5)}), dict) == {"a": 3, "b": 0.5}


def test_a_layout_comes_back_with_the_kinds_of_its_placements():
    meshes = (Mesh((2, 2), (0, 1, 2, 3)),)
    weights = (
        Weight("a", (4, 6), "bfloat16", 0, (Replicate(), Shard(1))),
        Weight("b", (4,), "float32", 0, (StridedShard(0), Shard(0))),
        Weight("c", (9,), "float32", 0, (FlatShard(3, 8), Replicate())),
        Weight("d", (), "float16"),
    )
    layout = SourceLayout(weights, meshes)
    memory = ShardMemory("cpu", 7, (), (), np.zeros(4, np.uint32), np.arange(4, dtype=np.uint64))
    call = UpdateWeights((0, 1, 2, 3), "key", layout, frozenset({"d"}), memory, True, "wait", 4096, 4)
    found = codec.decode(codec.encode(call), AnyCall)
    assert isinstance(found, UpdateWeights) and found.layout == layout and found.optional == {"d"}
    assert found.memory is not None and found.memory.same_as(memory)
    assert found.digest() == call.digest() == call.digest()
    assert found.digest() != msgspec.structs.replace(call, verify=False).digest()


def test_calls_with_equal_requests_have_equal_digests():
    def request(text):
        return GenerateRequest(array("q", [1, 2]), text, {"top_k": 3}, False, -1, 0, None)

    assert Generate([request("a")]).digest() == Generate([request("".join(["a"]))]).digest()
    assert Generate([request("a")]).digest() != Generate([request("b")]).digest()


def test_errors_with_any_text_reach_another_process():
    report = ErrorReport("PlanError", "weight '\ud800' is odd", 3)
    assert codec.decode(codec.encode(report), ErrorReport) == report and r"\ud800" in report.message


def test_a_message_with_a_users_values_is_tried_before_it_is_sent():
    codec.check(ParseCalls("1", "text", [{"a": {"b": [1]}}], "qwen25"))
    for tools, parser in (([{1: 2}], "qwen25"), ([{"a": len}], "qwen25"), ([], None)):
        with pytest.raises(codec.EncodeError):
            codec.check(ParseCalls("1", "text", tools, parser))


@pytest.mark.parametrize("data", [b"", b"\xc1", codec.encode([1]), codec.encode({"type": "NoSuchCall"})])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(codec.DecodeError):
        codec.decode(data, AnyCall)


@pytest.mark.parametrize("value", [object(), 1 << 64, {1, object()}, len, "\ud800"])
def test_what_cannot_be_told_is_refused(value):
    with pytest.raises(codec.EncodeError):
        codec.encode([value])
