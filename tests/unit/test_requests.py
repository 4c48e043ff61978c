from __future__ import annotations

import enum
import math
from array import array
from dataclasses import replace

import models
import numpy as np
import pytest
import torch

from spmd_engine.control import codec
from spmd_engine.control.digest import digest
from spmd_engine.control.generation import GenerateOutput, GenerateRequest
from spmd_engine.control.messages import Submit
from spmd_engine.errors import InvalidRequestError
from spmd_engine.scheduler.step_commands import StepCommands
from spmd_engine.trainer.requests import TextStream, build_requests, format_outputs, load_tokenizer


def build(**kwargs):
    defaults = {
        "prompt": None,
        "sampling_params": None,
        "input_ids": None,
        "return_logprob": False,
        "logprob_start_len": None,
        "top_logprobs_num": None,
        "token_ids_logprob": None,
        "tokenizer": None,
    }
    return build_requests(**{**defaults, **kwargs})


@pytest.mark.parametrize(
    "ids", [[1, 2, 3], (1, 2, 3), torch.tensor([1, 2, 3]), np.array([1, 2, 3]), array("q", [1, 2, 3])]
)
def test_one_prompt_of_any_kind(ids):
    if isinstance(ids, array):
        ids = [ids]
    requests, single = build(input_ids=ids)
    assert [list(r.input_ids) for r in requests] == [[1, 2, 3]]
    assert single == (not isinstance(ids, list) or ids == [1, 2, 3])


def test_samples_of_a_prompt_stay_together_and_n_is_expanded():
    requests, single = build(input_ids=[[1], [2]], sampling_params={"n": 2, "temperature": 0.5})
    assert [list(r.input_ids) for r in requests] == [[1], [1], [2], [2]] and not single
    assert all(r.sampling_params == {"n": 1, "temperature": 0.5} for r in requests)


def test_settings_for_each_prompt():
    requests, _ = build(
        input_ids=[[1], [2]],
        sampling_params=[{"top_p": 0.1}, {"top_p": 0.2}],
        return_logprob=[True, False],
        logprob_start_len=[0, -1],
        top_logprobs_num=[1, 0],
        token_ids_logprob=[[7], None],
    )
    assert [r.sampling_params["top_p"] for r in requests] == [0.1, 0.2]
    assert [r.return_logprob for r in requests] == [True, False]
    assert [r.token_ids_logprob for r in requests] == [[7], None]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "either prompt= or input_ids="),
        ({"prompt": "a", "input_ids": [1]}, "either prompt= or input_ids="),
        ({"prompt": "a"}, "needs a tokenizer"),
        ({"input_ids": []}, "non-empty list"),
        ({"input_ids": "12"}, "non-empty list"),
        ({"input_ids": [1.5, 2]}, "must hold integers"),
        ({"input_ids": [[1], []]}, r"input_ids\[1\] is empty"),
        ({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}, "need the same n"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        (
            {"input_ids": [1], "sampling_params": "greedy"},
            "sampling_params must be a dict for each prompt, got 'greedy'",
        ),
        ({"input_ids": [1], "sampling_params": {"n": 0}}, "at least 1, got 0"),
        ({"input_ids": [1], "return_logprob": "yes"}, "return_logprob must be a bool for each prompt, got 'yes'"),
    ],
)
def test_wrong_arguments(kwargs, match):
    with pytest.raises(InvalidRequestError, match=match):
        build(**kwargs)


def test_no_prompts_and_wrong_types_of_text():
    tokenizer = object()
    with pytest.raises(InvalidRequestError, match="empty list"):
        build(prompt=[], tokenizer=tokenizer)
    with pytest.raises(InvalidRequestError, match="images and video are not supported"):
        build(prompt=["a", 3], tokenizer=tokenizer)


class Letters:
    """Token i is the letter with code i."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


def output(text, matched=None, kind="stop"):
    reason = {"type": kind} if matched is None else {"type": kind, "matched": matched}
    return GenerateOutput([ord(c) for c in text], reason, 2, len(text), 0, None, 3)


@pytest.mark.parametrize(
    ("out", "keep", "text"),
    [
        (output("hello", kind="length"), False, "hello"),
        (output("hello", matched=ord("o")), False, "hell"),
        (output("hello", matched=ord("o")), True, "hello"),
        (output("a stop b", matched="stop"), False, "a "),
        (output("a stop b", matched="stop"), True, "a stop"),
    ],
)
def test_text_is_trimmed_as_sglang_does(out, keep, text):
    requests, _ = build(input_ids=[120, 121], sampling_params={"no_stop_trim": keep})
    (result,) = format_outputs(requests, [out], ids=["9-0"], tokenizer=Letters(), return_text_in_logprobs=False)
    assert result["text"] == text
    assert result["output_ids"] == out.output_ids
    assert result["meta_info"]["id"] == "9-0" and result["meta_info"]["weight_version"] == 3


def test_digest_tells_values_not_identities():
    a, b = "x" * 3, "".join(["x", "x", "x"])
    assert digest([a, a]) == digest([a, b])
    assert digest({"p": 1, "q": 2}) == digest({"q": 2, "p": 1})
    different = [[1], [1.0], ["1"], [True], [[1]], [1, 1], (1, 2), {"a": 1}, array("q", [1]), np.array([1]), None, {1}]
    assert len({digest(value) for value in different}) == len(different)
    assert digest(array("q", [1, 2])) == digest(array("q", [1, 2]))


def test_step_commands_reach_other_ranks():
    request = build(input_ids=[7, 8], sampling_params={"stop": ["a"], "logit_bias": {"3": -math.inf}})[0][0]
    submits = [Submit({"a;": request, "b;": request}, True), Submit({"c;": request}, False)]
    commands = StepCommands(submits, ["x;"], pause=True)
    assert codec.decode(codec.encode(commands), StepCommands) == commands
    assert codec.decode(codec.encode(StepCommands()), StepCommands) == StepCommands()
    with pytest.raises(codec.EncodeError, match="object cannot be told"):
        codec.encode(replace(request, sampling_params={"custom": object()}))
    with pytest.raises(codec.DecodeError, match="no StepCommands"):
        codec.decode(codec.encode({"submits": [{"requests": {}}]}), StepCommands)


@pytest.mark.parametrize("value", [1 << 70, -(1 << 64), "\ud800"])
def test_what_no_other_process_can_read_is_refused(value):
    with pytest.raises(InvalidRequestError, match="must be of plain values and numbers of 64 bits"):
        build(input_ids=[1], sampling_params={"custom_params": {"a": [value]}})


class Bytes:
    """Decodes tokens as the bytes of UTF-8; half a character becomes the replacement character, as tokenizers do it."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_text_comes_bit_by_bit_and_only_whole_characters(size):
    request = build(input_ids=list("ä prompt".encode()))[0][0]
    ids = list("für 5 € 😀 und naïve Ω!".encode())
    stream, text = TextStream(request, Bytes()), ""
    for at in range(0, len(ids), size):
        more = stream.add(ids[at : at + size])
        assert "\ufffd" not in more
        text += more
    assert text + stream.finish(bytes(ids).decode()) == bytes(ids).decode()


def test_streamed_text_keeps_back_what_may_become_a_stop_string():
    request = replace(build(input_ids=[65])[0][0], sampling_params={"stop": ["END", "xyz"]})
    stream = TextStream(request, Bytes())
    parts = [stream.add(list(part.encode())) for part in ("one E", "N", "G two E", "N")]
    assert parts == ["one ", "", "ENG two ", ""]
    assert stream.finish("one ENG two ") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None, "input_ids": [1 << 70]}, "must hold integers"),
        ({"prompt": 5, "tokenizer": str}, "must be a string or a list"),
        (
            {"prompt": None, "input_ids": [1], "token_ids_logprob": 5},
            "must be a list of ints or None for each prompt, got 5",
        ),
        ({"prompt": None, "input_ids": [1], "token_ids_logprob": [["a"]]}, "token_ids_logprob must hold integers"),
        ({"prompt": None, "input_ids": [1], "token_ids_logprob": [3, None]}, "token_ids_logprob"),
        ({"input_ids": [1], "sampling_params": {"custom_params": {"f": len}}}, "custom_params must be of plain values"),
        ({"image_data": "a.png"}, "images, video and audio are not supported"),
        ({"sampling_parameters": {}}, "unknown arguments sampling_parameters: .* there are prompt, sampling_params"),
        ({"lora_path": "a"}, "unknown arguments lora_path: "),
        ({"stream": True}, "unknown arguments stream: .* async_generate"),
    ],
)
def test_arguments_of_wrong_types_are_refused(arguments, message):
    with pytest.raises(InvalidRequestError, match=message):
        build(**arguments)


def test_numbers_and_texts_of_other_classes_reach_another_process():
    class Marked(str):
        pass

    (request,), _ = build(
        input_ids=[1], logprob_start_len=False, top_logprobs_num=True, token_ids_logprob=[True], priority=True
    )
    assert codec.decode(codec.encode(request), GenerateRequest) == request
    numbers = (
        request.logprob_start_len,
        request.top_logprobs_num,
        *(request.token_ids_logprob or ()),
        request.priority,
    )
    assert [type(number) for number in numbers] == [int] * 4
    (request,), _ = build(prompt=Marked("ab"), tokenizer=lambda texts: {"input_ids": [[1] for _ in texts]})
    assert type(request.text) is str
    for name in ("logprob_start_len", "top_logprobs_num", "priority"):
        with pytest.raises(InvalidRequestError, match="numbers of 64 bits"):
            build(input_ids=[1], **{name: 1 << 64})


def test_what_the_tokenizer_cannot_take_is_refused(tmp_path):
    models.save_tokenizer(tmp_path)
    with pytest.raises(InvalidRequestError, match="the tokenizer fails on a prompt: TypeError"):
        build(prompt="\ud800", tokenizer=load_tokenizer(str(tmp_path), {}))


def test_sampling_parameters_become_plain_values():
    class Level(enum.IntEnum):
        LOW = 3

    params = {"top_k": Level.LOW, "temperature": np.float32(0.5), "stop_token_ids": {7}, "custom_params": {1: (True,)}}
    (request,), _ = build(input_ids=[1], sampling_params=params)
    expected = {"top_k": 3, "temperature": 0.5, "stop_token_ids": [7], "custom_params": {"1": [True]}, "n": 1}
    assert request.sampling_params == expected
    assert [type(value) for value in request.sampling_params.values()] == [int, float, list, dict, int]
