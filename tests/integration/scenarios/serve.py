"""Requests that run beside one another, from the leader alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import models
import psutil
import pytest
import torch.distributed as dist
import uvloop

from integration.scenarios.common import GREEDY, PROMPTS, assert_close, greedy, shard
from spmd_engine import FunctionCall, errors
from spmd_engine.trainer.rendezvous import Rendezvous

TEXTS = ["ab ba", "a b", "abba ab", "b"]
# Tokens of a request that something shall happen to.
LONG = 200
SILENCE_S = 1.3


def leader(context: Any, engine: Any, program: Any, new_loop: Any = asyncio.new_event_loop) -> None:
    """Run a program on the leader; the other ranks do something of their own meanwhile, and call nothing."""
    if engine.is_leader:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(program(engine))
    dist.barrier()


async def collect(stream: Any) -> list[dict[str, Any]]:
    return [part async for part in stream]


def whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the parts of a stream are together; the last one ends it."""
    assert [bool(part["meta_info"]["finish_reason"]) for part in parts] == [False] * (len(parts) - 1) + [True], parts
    meta = parts[-1]["meta_info"]
    versions = joined(part["meta_info"]["token_weight_versions"] for part in parts)
    ids = joined(part["output_ids"] for part in parts)
    return {"output_ids": ids, "meta_info": {**meta, "token_weight_versions": versions}}


async def begun(engine: Any, **call: Any) -> asyncio.Task[dict[str, Any]]:
    """A request that has made its first token, on its way to its last."""
    stream = await engine.async_generate(**call, stream=True)
    first = await anext(stream)

    async def rest() -> dict[str, Any]:
        return whole([first, *await collect(stream)])

    return asyncio.create_task(rest())


def joined(lists: Any) -> list[Any]:
    return list(chain.from_iterable(lists))


def forms(context: Any, path: str) -> dict[str, Any]:
    """The same tokens, log-probabilities and texts as `generate` has, however they are asked for."""
    wanted = {"sampling_params": GREEDY, "return_logprob": True, "top_logprobs_num": 2}
    with context.engine(path, context.world, grammar_backend="llguidance") as engine:
        expected = [engine.generate(prompt=text, **wanted) for text in TEXTS]
        tokens = greedy(engine)
        stop = {**GREEDY, "stop": [expected[0]["text"][3:5]]}
        stopped = engine.generate(prompt=TEXTS[0], sampling_params=stop)
        schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
        constraints = [{"regex": "(ab|ba)+c"}, {"json_schema": schema}, {"ebnf": 'root ::= "x" | "yz"'}]
        constrained = {}
        for rule in constraints:
            rules = {**GREEDY, **rule}
            constrained[str(rule)] = engine.generate(prompt=TEXTS[0], sampling_params=rules)["text"]
        assert constrained[str(constraints[0])].strip("abc") == ""
        assert constrained[str(constraints[1])].startswith("{")
        assert constrained[str(constraints[2])] in ("x", "yz")
        with pytest.raises(errors.InvalidRequestError, match="Failed to compile regex grammar"):
            engine.generate(prompt=TEXTS[0], sampling_params={"regex": "("})

        async def program(engine: Any) -> None:
            same = await asyncio.gather(*(engine.async_generate(prompt=text, **wanted) for text in TEXTS * 5))
            for found, other in zip(same, expected * 5, strict=True):
                assert found["output_ids"] == other["output_ids"] and found["text"] == other["text"]
                assert found["meta_info"]["token_weight_versions"] == [0] * 12
                for name in ("output_token_logprobs", "output_top_logprobs", "finish_reason", "prompt_tokens"):
                    assert_close(found["meta_info"][name], other["meta_info"][name])
            parts = await collect(await engine.async_generate(prompt=TEXTS[0], stream=True, **wanted))
            assert len(parts) > 1
            assert joined(part["output_ids"] for part in parts) == expected[0]["output_ids"]
            assert "".join(part["text"] for part in parts) == expected[0]["text"]
            logprobs = joined(part["meta_info"]["output_token_logprobs"] for part in parts)
            assert_close(logprobs, expected[0]["meta_info"]["output_token_logprobs"])
            assert [part["meta_info"]["finish_reason"] for part in parts][:-1] == [None] * (len(parts) - 1)
            assert parts[-1]["meta_info"]["finish_reason"] == expected[0]["meta_info"]["finish_reason"]

            found = await engine.async_generate(prompt=TEXTS[0], sampling_params=stop)
            assert (found["text"], found["output_ids"]) == (stopped["text"], stopped["output_ids"])
            parts = await collect(await engine.async_generate(prompt=TEXTS[0], sampling_params=stop, stream=True))
            assert "".join(part["text"] for part in parts) == stopped["text"]

            # Constrained output.
            for rule in constraints:
                found = await engine.async_generate(prompt=TEXTS[0], sampling_params={**GREEDY, **rule})
                assert found["text"] == constrained[str(rule)]

            several = {"input_ids": PROMPTS[0], "sampling_params": {**GREEDY, "n": 3}, "request_id": "mine"}
            assert [one["output_ids"] for one in await engine.async_generate(**several)] == [tokens[0]] * 3
            parts = await collect(await engine.async_generate(**several, stream=True))
            assert {part["meta_info"]["id"] for part in parts} == {"mine-0", "mine-1", "mine-2"}
            for index in range(3):
                ours = [part["output_ids"] for part in parts if part["index"] == index]
                assert joined(ours) == tokens[0]

            # What is refused does not disturb what runs.
            running = asyncio.ensure_future(engine.async_generate(input_ids=PROMPTS[1], sampling_params=GREEDY))
            for arguments in (
                {"input_ids": [10**6]},
                {"input_ids": [1], "sampling_params": {"top_p": 7}},
                {"input_ids": [1], "priority": 3},
                {"input_ids": [1], "sampling_params": {"logit_bias": {"1": object()}}},
                {"input_ids": [1], "prompt": "a"},
                {"input_ids": [1], "priority": "high"},
                {"input_ids": [1], "timeout_s": "long"},
                {"input_ids": [1], "timeout_s": 0},
                {"input_ids": [1], "request_id": 5},
                {"input_ids": [1], "sampling_params": {"regex": "("}},
                {"input_ids": [1], "logprob_start_len": 1 << 64},
                {"input_ids": [1], "priority": 1 << 64},
            ):
                with pytest.raises(errors.InvalidRequestError):
                    await engine.async_generate(**arguments)
            assert (await running)["output_ids"] == tokens[1]
            await check_function_calls(engine)

            # Time is up, somebody ends it, or nobody waits for it any more: it ends with the tokens that it has.
            long = {"input_ids": PROMPTS[0], "sampling_params": {**GREEDY, "max_new_tokens": LONG}}
            found = await engine.async_generate(**long, timeout_s=0.2)
            assert found["meta_info"]["finish_reason"]["message"] == "timed out after 0.2 s"
            assert len(found["output_ids"]) < LONG
            assert found["output_ids"][:12] == tokens[0][: len(found["output_ids"])]
            one, other = [await begun(engine, **long, request_id=name) for name in ("1", "10")]
            with pytest.raises(errors.InvalidRequestError, match="'1' runs already"):
                await engine.async_generate(**long, request_id="1")
            assert engine.abort("1") == 1 and engine.abort("nobody") == 0
            assert (await one)["meta_info"]["finish_reason"]["type"] == "abort"
            assert not other.done()
            other.cancel()
            brief = asyncio.ensure_future(engine.async_generate(**long, request_id="brief"))
            await asyncio.sleep(0)  # it has begun, and goes out in the next turn of the event loop, or before an abort
            assert engine.abort("brief") == 1
            assert (await brief)["meta_info"]["finish_reason"]["type"] == "abort"
            stream = await engine.async_generate(**long, stream=True)
            async for _ in stream:
                break
            await stream.aclose()
            third = [await begun(engine, **long) for _ in range(3)]
            assert engine.abort() == 3
            assert {one["meta_info"]["finish_reason"]["type"] for one in await asyncio.gather(*third)} == {"abort"}
            # Everything has ended; were it not so, this would wait for all their tokens.
            assert (await engine.async_generate(input_ids=PROMPTS[2], sampling_params=GREEDY))["output_ids"] == tokens[
                2
            ]

        leader(context, engine, program)

        async def slower_than_any_silence(engine: Any) -> None:
            """Requests that take longer than `timeout_s` are no hang, though none of them has anything to tell."""
            requests = engine._requests
            requests._timeout_s, usual = SILENCE_S, requests._timeout_s
            samples, took_s = 32, 0.0
            while took_s < 2 * SILENCE_S:
                samples *= 2
                began = time.monotonic()
                params = {**GREEDY, "max_new_tokens": LONG, "n": samples}
                found = await engine.async_generate(input_ids=PROMPTS[0], sampling_params=params)
                took_s = time.monotonic() - began
                assert [len(one["output_ids"]) for one in found] == [LONG] * samples
            requests._timeout_s = usual

        leader(context, engine, slower_than_any_silence)

        async def while_paused() -> None:
            """A grammar that would be compiled during a pause waits for its end, and so does the cache's flush not."""
            engine.pause()
            rules = {**GREEDY, **constraints[0]}
            waiting = asyncio.ensure_future(engine.async_generate(prompt=TEXTS[0], sampling_params=rules))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(engine.flush_cache)
            assert not waiting.done()
            engine.pause()
            engine.resume()
            assert (await waiting)["text"] == constrained[str(constraints[0])]

        asyncio.run(while_paused()) if engine.is_leader else engine.flush_cache()
        if not engine.is_leader:
            for call in (engine.abort, engine.pause, engine.resume):
                with pytest.raises(errors.InvalidRequestError, match="is for the leader"):
                    call()
        assert greedy(engine) == tokens  # it also compares what all ranks have made since
    return {}


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]


async def check_function_calls(engine: Any) -> None:
    """SGLang's own parsers, on what models of these families write."""
    call = FunctionCall("weather", '{"city": "Zürich"}')
    hermes = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>'
    qwen = f"Let me see.\n{hermes.replace('>{', '>' + chr(10) + '{').replace('}<', '}' + chr(10) + '<')}"
    llama = '<|python_tag|>{"name": "weather", "parameters": {"city": "Zürich"}}'
    several = await asyncio.gather(
        engine.async_generate(input_ids=PROMPTS[0], sampling_params=GREEDY),
        engine.async_generate(input_ids=[10**6]),  # refused, though it is sent together with the others
        engine.parse_function_calls(qwen, TOOLS, parser="qwen25"),
        engine.parse_function_calls(hermes * 2, TOOLS, parser="hermes"),
        engine.parse_function_calls(llama, TOOLS, parser="llama3"),
        engine.parse_function_calls(hermes.replace("weather", "unknown"), TOOLS, parser="hermes"),
        engine.parse_function_calls("no call", TOOLS, parser="qwen25"),
        return_exceptions=True,
    )
    assert len(several[0]["output_ids"]) == GREEDY["max_new_tokens"]
    assert isinstance(several[1], errors.InvalidRequestError)
    assert several[2:] == [("Let me see.", [call]), ("", [call, call]), ("", [call]), ("", []), ("no call", [])]
    with pytest.raises(errors.InvalidRequestError, match=r"no function-call parser 'qwen99'; it has .*qwen25"):
        await engine.parse_function_calls(qwen, TOOLS, parser="qwen99")
    with pytest.raises(errors.InvalidRequestError, match="tools must look like"):
        await engine.parse_function_calls(qwen, [WEATHER], parser="qwen25")
    for arguments in (
        (None, TOOLS, "qwen25"),
        (qwen, TOOLS, None),
        (qwen, [{1: 2}], "qwen25"),
        (qwen, [{"a": len}], "x"),
    ):
        with pytest.raises(errors.InvalidRequestError, match="must be strings"):
            await engine.parse_function_calls(*arguments[:2], parser=arguments[2])
    stream = await engine.async_generate(input_ids=PROMPTS[0], sampling_params=GREEDY, stream=1, top_logprobs_num=True)
    assert len(whole(await collect(stream))["output_ids"]) == GREEDY["max_new_tokens"]


def replicas(context: Any, path: str) -> dict[str, Any]:
    """Two replicas over one trainer: followers go straight to the update, while their leaders still have requests."""
    engine = context.engine(path, 2)
    model = shard(models.make_model("qwen2", seed=2), context.world)

    def others_wait() -> None:
        meeting = Rendezvous((0, 1, 2, 3), 1, "update")
        while None in (meeting.poll("note/2"), meeting.poll("note/3")):
            time.sleep(0.01)

    # Before the replicas have met: the one where the ranks differ, or one dies, tells the other.
    if context.rank == 1:
        others_wait()
    with pytest.raises(errors.CollectiveMismatchError, match=r"rank 0: update_weights.*rank 1: generate"):
        engine.generate(input_ids=[1]) if context.rank == 1 else engine.update_weights(model)
    if context.rank == 1:
        others_wait()
        os.kill(engine.scheduler_pid, signal.SIGKILL)
    with pytest.raises(errors.SchedulerDiedError, match="the scheduler process of rank 1 ended"):
        engine.update_weights(model)
    if context.rank < 2:
        engine.restart()
    engine.update_weights(model, verify=1)
    # A call that is refused before anything is described is refused on all replicas, and nobody waits.
    began = time.monotonic()
    with pytest.raises(errors.CollectiveMismatchError, match="running must be one of"):
        engine.update_weights(model, running="maybe" if context.rank < 2 else "wait")
    assert time.monotonic() - began < 30.0

    async def rollout() -> None:
        for _ in range(3):  # with gaps in between
            params = {**GREEDY, "max_new_tokens": 10 + 10 * context.rank}
            await asyncio.gather(*(engine.async_generate(input_ids=ids, sampling_params=params) for ids in PROMPTS))
            await asyncio.sleep(0.05)

    for _ in range(3):
        if engine.is_leader:
            asyncio.run(rollout())
        engine.update_weights(model, running="pause")
    dist.barrier()
    if context.rank >= 2:  # the leader of the other replica goes first; nobody else minds
        if context.rank == 3:
            time.sleep(1.0)
        engine.shutdown()
    else:
        deadline, store = time.monotonic() + 4.0, dist.distributed_c10d._get_default_store()
        for number in count():  # one of them says when it is over: the call is collective
            if context.rank == 0:
                store.set(f"over/{number}", str(time.monotonic() > deadline))
            if store.get(f"over/{number}") == b"True":
                break
            greedy(engine)
    dist.barrier()
    # Whoever asks for tokens without all ranks of the replica hears why there are none.
    if context.rank == 1:
        engine.shutdown()
    dist.barrier()
    if context.rank == 0:
        with pytest.raises(errors.EngineClosedError, match="rank 1"):
            asyncio.run(engine.async_generate(input_ids=[5, 6], sampling_params=GREEDY))
    engine.shutdown()
    return {}


def many(context: Any, path: str, requests: int, seed: int) -> dict[str, Any]:
    """Many requests at once, with random aborts, pauses and delays: all are accounted for."""
    scheduling = {"enable_priority_scheduling": True, "disable_priority_preemption": True, "max_running_requests": 4}
    with context.engine(path, context.world, **scheduling) as engine:
        draw = random.Random(seed)

        async def one() -> dict[str, Any]:
            await asyncio.sleep(draw.random() * 2)
            prompt = [draw.randrange(5, 300) for _ in range(draw.randint(1, 30))]
            params = {"max_new_tokens": draw.randint(1, 24), "temperature": 1.0, "ignore_eos": True}
            name = f"{draw.getrandbits(64):x}"
            call = {"input_ids": prompt, "sampling_params": params, "request_id": name}
            call["priority"] = draw.randint(0, 3)
            if draw.random() < 0.3:
                asyncio.get_running_loop().call_later(draw.random(), engine.abort, name)
            if draw.random() < 0.2:
                return whole(await collect(await engine.async_generate(**call, stream=True)))
            return await engine.async_generate(**call)

        async def hold() -> None:
            for _ in range(6):
                await asyncio.sleep(draw.random() * 0.5)
                engine.pause()
                await asyncio.sleep(draw.random() * 0.2)
                engine.resume()

        async def program(engine: Any) -> None:
            held = []
            for _ in range(2):
                *results, _ = await asyncio.gather(*(one() for _ in range(requests // 2)), hold())
                assert len(results) == requests // 2
                kinds = {result["meta_info"]["finish_reason"]["type"] for result in results}
                assert kinds == {"length", "abort"}
                held.append(held_by(os.getpid()) + held_by(engine.scheduler_pid))
            state = engine._requests
            assert not (state._sequences or state._names or state._timers or state._inbox or state._outbox)
            for before, after, room in zip(*held, (0, 64 << 20) * 2, strict=True):
                assert after <= before + room, held
            await in_order(engine)

        async def in_order(engine: Any) -> None:
            """Four run at a time: the others wait, and begin by priority, not in the order in which they came."""
            ended: list[int] = []

            async def one(priority: int, tokens: int) -> None:
                params = {**GREEDY, "max_new_tokens": tokens}
                await engine.async_generate(input_ids=PROMPTS[0], sampling_params=params, priority=priority)
                ended.append(priority)

            await asyncio.gather(*(one(9, 30) for _ in range(4)), *(one(each, 8) for each in (1, 5, 3, 7, 2, 6, 4, 8)))
            assert [sorted(ended[at : at + 4]) for at in (0, 4, 8)] == [[9] * 4, [5, 6, 7, 8], [1, 2, 3, 4]]

        with stumbling(engine.scheduler_pid, seed + context.rank):
            leader(context, engine, program, uvloop.new_event_loop)  # Ray sets it, for one
        greedy(engine)  # compares what all ranks have made
    return {}


def held_by(pid: int) -> list[int]:
    """File descriptors and resident bytes of a process."""
    process = psutil.Process(pid)
    return [process.num_fds(), process.memory_info().rss]


@contextlib.contextmanager
def stumbling(pid: int, seed: int) -> Iterator[None]:
    """Meanwhile a process stands still now and then, for up to 50 ms."""
    over, draw = threading.Event(), random.Random(seed)

    def stumble() -> None:
        while not over.wait(draw.random() * 0.3):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(draw.random() * 0.05)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stumble)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
