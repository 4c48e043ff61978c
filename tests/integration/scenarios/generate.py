"""Generating, and calls that are wrong."""

from __future__ import annotations

import math
import re
import threading
import time
from typing import Any

import models
import pytest

from integration.scenarios.common import GREEDY, PROMPTS, greedy, shard
from spmd_engine import errors


def generate(context: Any, path: str) -> dict[str, Any]:
    """The forms of `generate`, on every rank the same."""
    with context.engine(path, context.world) as engine:
        single = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
        assert isinstance(single, dict) and len(single["output_ids"]) == 12
        assert single["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
        assert single["meta_info"]["prompt_tokens"] == 4 and single["meta_info"]["completion_tokens"] == 12
        many = engine.generate(input_ids=PROMPTS, sampling_params=[GREEDY] * 3)
        assert many[0]["output_ids"] == single["output_ids"]
        assert [m["meta_info"]["prompt_tokens"] for m in many] == [4, 5, 40]

        # Samples are many for one prompt, together, and different from one another.
        sampled = {"max_new_tokens": 8, "temperature": 1.0, "n": 4, "ignore_eos": True}
        samples = engine.generate(input_ids=PROMPTS[:2], sampling_params=sampled)
        assert [s["meta_info"]["prompt_tokens"] for s in samples] == [4] * 4 + [5] * 4
        assert len({tuple(s["output_ids"]) for s in samples}) > 4
        assert len(engine.generate(input_ids=PROMPTS[0], sampling_params={**sampled, "n": 2})) == 2

        # Log-probabilities.
        out = engine.generate(
            input_ids=PROMPTS[0], sampling_params=GREEDY, return_logprob=True, top_logprobs_num=3, logprob_start_len=0
        )
        meta = out["meta_info"]
        assert [token for _, token, _ in meta["output_token_logprobs"]] == out["output_ids"]
        for (value, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
            assert len(top) == 3 and (value, token) == tuple(top[0][:2]) and value <= 0
        assert len(meta["input_token_logprobs"]) == 4
        chosen = engine.generate(
            input_ids=PROMPTS[0], sampling_params=GREEDY, return_logprob=True, token_ids_logprob=[3, 4]
        )
        assert [[token for _, token, _ in row] for row in chosen["meta_info"]["output_token_ids_logprobs"]] == [
            [3, 4]
        ] * 12

        # Stop token.
        stop = single["output_ids"][2]
        at = single["output_ids"].index(stop)
        stopped = engine.generate(
            input_ids=PROMPTS[0], sampling_params={**GREEDY, "stop_token_ids": [stop], "ignore_eos": False}
        )
        assert stopped["output_ids"] == single["output_ids"][: at + 1]
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}

        # The other sampling parameters reach SGLang.
        biased = engine.generate(input_ids=PROMPTS[0], sampling_params={**GREEDY, "logit_bias": {"17": 100.0}})
        assert biased["output_ids"] == [17] * 12

        # A prefix is cached, until flushed.
        assert engine.generate(input_ids=PROMPTS[2], sampling_params=GREEDY)["meta_info"]["cached_tokens"] > 30
        engine.flush_cache()
        assert engine.generate(input_ids=PROMPTS[2], sampling_params=GREEDY)["meta_info"]["cached_tokens"] == 0

        # A rank that comes half a second later gets the same.
        if context.rank == 1:
            time.sleep(0.5)
        late = engine.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": 8, "temperature": 1.0})
        return {
            "greedy": [m["output_ids"] for m in many],
            "samples": [s["output_ids"] for s in samples],
            "late": [o["output_ids"] for o in late],
            "logprobs": meta["output_token_logprobs"],
        }


# Without a check of ours, SGLang's scheduler would end on any of these.
WRONG_PARAMS: list[dict[str, Any]] = [
    {"min_new_tokens": 2, "stop_token_ids": [320]},
    {"min_new_tokens": 2, "stop_token_ids": [-1]},
    {"stop_token_ids": ["x"]},
    {"logit_bias": {"5": math.nan}},
    {"logit_bias": {"5": math.inf}},
    {"logit_bias": {"5": "much"}},
    {"logit_bias": {"5": 1e38}, "temperature": 0.01},
    {"logit_bias": {str(token): -math.inf for token in range(320)}},
    {"sampling_seed": 1 << 63},
    {"sampling_seed": "one"},
    {"top_k": 1 << 40},
    {"top_k": 1.5},
    {"temperature": "hot"},
    {"temperature": math.nan},
    {"min_new_tokens": 1.5},
    {"max_new_tokens": "4"},
    {"stop_regex": "("},
    {"json_schema": {"type": "object"}},
    {1: 2},
]


def bad_requests(context: Any, path: str) -> dict[str, Any]:
    """Wrong calls raise the same typed error on every rank and leave the engine alive."""
    with context.engine(path, context.world) as engine:
        tokens = greedy(engine)

        def refused(kind: type[Exception], match: str, **kwargs: Any) -> None:
            with pytest.raises(kind, match=match):
                engine.generate(**kwargs)
            assert greedy(engine) == tokens

        invalid = errors.InvalidRequestError
        refused(invalid, "did you mean temperature", input_ids=[1, 2], sampling_params={"temprature": 1.0})
        refused(invalid, "top_p must be in", input_ids=[1, 2], sampling_params={"top_p": 2.0})
        refused(invalid, "max_new_tokens must be at least 0", input_ids=[1, 2], sampling_params={"max_new_tokens": -1})
        refused(invalid, "context length 256", input_ids=list(range(3, 303)), sampling_params=GREEDY)
        refused(invalid, "exceed the context length", input_ids=[1, 2], sampling_params={"max_new_tokens": 1000})
        refused(invalid, "outside the vocabulary of 320", input_ids=[1, 320], sampling_params=GREEDY)
        refused(invalid, "needs a tokenizer", prompt="hello")
        refused(invalid, "either prompt= or input_ids=", prompt="hello", input_ids=[1])
        refused(invalid, "either prompt= or input_ids=")
        refused(invalid, "needs at least one token", input_ids=[[1], []])
        refused(invalid, "2 entries for 1 prompts", input_ids=[[1]], sampling_params=[{}, {}])
        refused(invalid, "n must be an integer", input_ids=[1], sampling_params={"n": 0})
        refused(invalid, "stop=.* is unavailable", input_ids=[1], sampling_params={"stop": "x"})
        refused(invalid, "grammar backend", input_ids=[1], sampling_params={"regex": "a+"})
        for params in WRONG_PARAMS:
            refused(invalid, "", input_ids=[1, 2], sampling_params={"max_new_tokens": 4, **params})
        for number in (-1, 321):
            refused(invalid, "top_logprobs_num", input_ids=[1], return_logprob=True, top_logprobs_num=number)
        for call in (engine.sleep, engine.wake_up, lambda: engine.release_memory_occupation(["kv_cache"])):
            with pytest.raises(errors.MemoryOccupationError, match="enable_memory_saver=True"):
                call()
            assert engine.sleeping == () and greedy(engine) == tokens

        mismatch = errors.CollectiveMismatchError
        refused(mismatch, "rank 0.*rank 1", input_ids=[1, 2, context.rank], sampling_params=GREEDY)
        # One rank refuses its own arguments, the other does not.
        refused(mismatch, "rank 0.*rank 1", input_ids=[1] if context.rank else [], sampling_params=GREEDY)
        with pytest.raises(mismatch, match=r"flush_cache\(\)"):
            engine.flush_cache() if context.rank else engine.generate(input_ids=[1], sampling_params=GREEDY)
        assert greedy(engine) == tokens
    for call in (lambda: engine.generate(input_ids=[1]), engine.flush_cache, lambda: engine.update_weights({})):
        with pytest.raises(errors.EngineClosedError, match="was shut down"):
            call()
    engine.shutdown()  # again is fine
    return {}


def overlapping(context: Any, path: str) -> dict[str, Any]:
    """`update_weights` from another thread while `generate` runs."""
    model = shard(models.make_model("qwen2", seed=2), context.world)
    with context.engine(path, context.world) as engine:
        tokens = greedy(engine)
        outcome: list[Any] = []
        long = {"max_new_tokens": 150, "temperature": 0.0, "ignore_eos": True}
        thread = threading.Thread(
            target=lambda: outcome.append(engine.generate(input_ids=PROMPTS, sampling_params=long))
        )
        thread.start()
        while not engine._client._lock.locked():
            time.sleep(0.01)
        with pytest.raises(errors.EngineBusyError, match="while another call of its engine was running"):
            engine.update_weights(model)
        thread.join()
        assert [len(o["output_ids"]) for o in outcome[0]] == [150] * 3
        assert greedy(engine) == tokens and engine.weight_version == 0
        engine.update_weights(model)
        assert engine.weight_version == 1
    return {}


def text(context: Any, path: str) -> list[dict[str, Any]]:
    """Text in and out, on one rank; compared with `sglang.Engine` by the test."""
    with context.engine(path, context.world, grammar_backend="llguidance") as engine:
        return text_outputs(engine)


TEXT_CALLS: list[dict[str, Any]] = [
    {"prompt": "the quick brown fox", "sampling_params": GREEDY},
    {"prompt": ["one two", "three four five"], "sampling_params": {**GREEDY, "max_new_tokens": 20}},
    {
        "prompt": "the quick brown fox",
        "sampling_params": {**GREEDY, "n": 2},
        "return_logprob": True,
        "top_logprobs_num": 2,
        "logprob_start_len": 0,
    },
    {"prompt": None, "sampling_params": {**GREEDY, "max_new_tokens": 40, "stop": None}},
    {"prompt": None, "sampling_params": {**GREEDY, "max_new_tokens": 40, "stop": None, "no_stop_trim": True}},
    {"prompt": "dog", "sampling_params": {**GREEDY, "regex": "(ab|ba)+c"}, "return_logprob": True},
    {"prompt": "dog", "sampling_params": {**GREEDY, "json_schema": '{"type": "array", "items": {"type": "integer"}}'}},
    {"prompt": ["fox", "dog"], "sampling_params": {**GREEDY, "ebnf": 'root ::= "x" root | "yz"', "n": 2}},
]


def text_outputs(engine: Any) -> list[dict[str, Any]]:
    results = []
    # A prompt whose continuation has something printable in it, and that as the stop string.
    texts = ["the", "dog", "fox jumps", "one two", "three", "lazy", "quick", "and stops"]
    found = engine.generate(prompt=texts, sampling_params={**GREEDY, "max_new_tokens": 40})
    prompt, said = next(
        (p, o["text"][3:]) for p, o in zip(texts, found, strict=True) if re.search("[!-~]", o["text"][3:])
    )
    stop = re.findall("[!-~]", said)[0]
    for call in TEXT_CALLS:
        params = dict(call["sampling_params"])
        if "stop" in params:
            call, params["stop"] = {**call, "prompt": prompt}, [stop]
        outputs = engine.generate(**{**call, "sampling_params": params})
        for output in outputs if isinstance(outputs, list) else [outputs]:
            meta = output["meta_info"]
            kept = {
                k: meta[k]
                for k in meta
                if k.endswith("logprobs") or k in ("finish_reason", "prompt_tokens", "completion_tokens")
            }
            results.append({"text": output["text"], "output_ids": list(output["output_ids"]), "meta": kept})
    return results
