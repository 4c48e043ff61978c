"""Requests beside collective calls, in one program."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
import torch.distributed as dist

from integration.scenarios.common import GREEDY, PROMPTS, greedy, shard
from integration.scenarios.serve import LONG, begun
from spmd_engine import errors


def mixed(context: Any, path: str) -> dict[str, Any]:
    """Collective calls and requests beside others, in the order in which the leader makes them."""
    with context.engine(path, context.world, enable_memory_saver=True) as engine:
        sources = [shard(models.make_model("qwen2", seed=seed), context.world) for seed in (2, 3)]
        tokens = []
        for source in sources:
            engine.update_weights(source)
            tokens.append(greedy(engine))
        long = {"input_ids": PROMPTS[0], "sampling_params": {**GREEDY, "max_new_tokens": LONG}}

        async def beside(calls: Any, finish: Any, in_thread: bool) -> None:
            tasks = [await begun(engine, **long) for _ in range(4)]
            await asyncio.to_thread(calls) if in_thread else calls()
            await finish([await task for task in tasks])

        def run(calls: Any, finish: Any, in_thread: bool = False) -> None:
            if engine.is_leader:
                asyncio.run(beside(calls, finish, in_thread))
            else:
                calls()
            dist.barrier()

        # They wait for one another.
        async def all_are_whole(results: list[dict[str, Any]]) -> None:
            assert {len(one["output_ids"]) for one in results} == {LONG}
            assert {one["meta_info"]["weight_version"] for one in results} == {2}

        def rollout() -> None:
            assert greedy(engine) == tokens[1]

        run(rollout, all_are_whole)
        run(lambda: engine.update_weights(sources[1]), all_are_whole, in_thread=True)

        # Aborted for the update.
        async def all_are_aborted(results: list[dict[str, Any]]) -> None:
            assert {one["meta_info"]["finish_reason"]["type"] for one in results} == {"abort"}
            assert all(0 < len(one["output_ids"]) < LONG for one in results)

        run(lambda: engine.update_weights(sources[0], running="abort"), all_are_aborted)
        assert greedy(engine) == tokens[0]

        # Paused for the update: the tokens before it are the old weights', those after it the new ones'.
        finished: list[dict[str, Any]] = []

        async def keep(results: list[dict[str, Any]]) -> None:
            finished.extend(results)

        before = engine.weight_version
        run(lambda: engine.update_weights(sources[1], running="pause"), keep, in_thread=True)
        check_versions(context, engine, finished, before)

        # Paused by hand, with a nap and two updates meanwhile.
        def nap() -> None:
            if engine.is_leader:
                engine.pause()
            engine.update_weights(sources[1])
            engine.release_memory_occupation()
            engine.resume_memory_occupation()
            with pytest.raises(errors.EngineBusyError, match=r"call resume\(\) before generate"):
                engine.generate(input_ids=[1])
            if engine.is_leader:
                engine.resume()  # not before the weights are there again
            engine.update_weights(sources[0])

        finished.clear()
        before = engine.weight_version
        run(nap, keep)
        check_versions(context, engine, finished, before, last=before + 2)
        assert greedy(engine) == tokens[0]
        with pytest.raises(errors.InvalidRequestError, match="running must be one of"):
            engine.update_weights(sources[0], running="maybe")
        # Five rollouts, twice four continuations, and on the leader five times four requests.
        expected = 5 * len(PROMPTS) + 2 * 4 + (20 if engine.is_leader else 0)
        assert engine.stats().sequences == expected
        check_flood(context, engine)
        check_skew(engine, sources[0])
        check_poll(engine)
    return {}


def check_poll(engine: Any) -> None:
    """A call that comes while the event loop reads waits for it; no other call runs."""
    with ThreadPoolExecutor(1) as pool, engine._client._lock:
        call = pool.submit(engine.flush_cache)
        time.sleep(0.2)
        engine._client._lock.release()
        call.result()
        engine._client._lock.acquire()


def check_flood(context: Any, engine: Any) -> None:
    """More than fits into the channel is taken while a rollout runs: the event loop does not wait for that."""
    over = threading.Event()

    def rollout() -> None:
        engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 900})
        over.set()

    async def flood() -> None:
        running = asyncio.ensure_future(asyncio.to_thread(rollout))
        await asyncio.sleep(0.3)  # it has begun
        tasks = await submitted(engine, 2000)
        assert not over.is_set()
        assert engine.abort() == len(tasks)
        results = await asyncio.gather(*tasks)
        assert {one["meta_info"]["finish_reason"]["type"] for one in results} == {"abort"}
        assert not any(one["output_ids"] for one in results)
        await running

    asyncio.run(flood()) if engine.is_leader else rollout()
    dist.barrier()


async def submitted(engine: Any, count: int) -> list[asyncio.Task[Any]]:
    """Requests that have all left this process, without a wait of the event loop: more than fits into the channel."""
    prompt = [7] * (400_000 // count)
    tasks = [
        asyncio.ensure_future(engine.async_generate(input_ids=prompt, sampling_params=GREEDY)) for _ in range(count)
    ]
    while engine._requests._outbox or len(engine._requests._sequences) < count:
        await asyncio.sleep(0)
    return tasks


def check_skew(engine: Any, source: Any) -> None:
    """The same while an update waits for a rank that does not come before all requests have left."""
    store = dist.distributed_c10d._get_default_store()

    async def flood() -> None:
        running = asyncio.ensure_future(asyncio.to_thread(engine.update_weights, source))
        await asyncio.sleep(0.3)
        tasks = await submitted(engine, 400)
        store.set("all have left", "")
        await running
        assert engine.abort() == len(tasks)
        await asyncio.gather(*tasks)

    if engine.is_leader:
        asyncio.run(flood())
    else:
        store.wait(["all have left"], datetime.timedelta(seconds=60))
        engine.update_weights(source)
    dist.barrier()


def check_versions(context: Any, engine: Any, results: list[Any], before: int, last: int | None = None) -> None:
    """Each token is the greedy one of the weights that it is said to be of: the last ones now serve."""
    shared: list[Any] = [results]
    dist.broadcast_object_list(shared, src=0)
    for result in shared[0]:
        versions, ids = result["meta_info"]["token_weight_versions"], result["output_ids"]
        assert len(versions) == len(ids) == LONG and versions == sorted(versions)
        assert set(versions) == {before, last or before + 1}
        made = versions.index(last or before + 1)
        prompt = [*PROMPTS[0], *ids[:made]]
        rest = engine.generate(input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": LONG - made})
        assert rest["output_ids"] == ids[made:]
