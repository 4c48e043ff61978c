"""What the ranks of the test jobs do. Assertions here fail the rank, and with it the job."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import spmd_engine
from spmd_engine import errors

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 100, 200], list(range(20, 60))]
GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}


def greedy(engine: Any) -> list[list[int]]:
    return [output["output_ids"] for output in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def shard(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """FSDP2 over the whole world, a group a layer, as trainers do it."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def unmapped_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory is no longer there, as after a free."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, ctypes.c_size_t(tensor.nbytes), 3, 0x22, -1, 0)
    memory = (ctypes.c_char * tensor.nbytes).from_address(address)
    gone = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    assert libc.munmap(address, tensor.nbytes) == 0
    return gone


# ---- weights ----


def reference(context: Any, path: str, tp: int, generates: bool) -> dict[str, Any]:
    """An engine that loaded its weights from disk: checksums and greedy tokens."""
    with context.engine(path, tp) as engine:
        return {"checksums": engine.weight_checksums(), "tokens": greedy(engine) if generates else None}


def update(context: Any, name: str, path: str, tp: int, generates: bool, replicate: bool = False) -> dict[str, Any]:
    """Start from other weights, move the sharded model in, and report like `reference`."""
    with context.engine(path, tp) as engine:
        before = engine.weight_checksums()
        model = models.make_model(name, seed=2)
        if not replicate:
            shard(model, context.world)
        first = engine.update_weights(model, verify=True)
        assert first.planned and first.wrong_elements == 0
        assert engine.weight_version == first.weight_version == 1
        second = engine.update_weights(model, verify=True)
        assert not second.planned and second.record_s == 0 and second.wrong_elements == 0
        assert second.weight_version == 2
        after = engine.weight_checksums()
        assert after.keys() == before.keys() and after != before
        tokens = greedy(engine) if generates else None
        return {
            "checksums": after,
            "tokens": tokens,
            "local": first.local_bytes,
            "remote": first.remote_bytes,
            "fallback": first.fallback_weights,
        }


def update_sources(context: Any, path: str, other: str) -> dict[str, Any]:
    """What a source may be, and what it may not: refusals leave the engine alive with its old weights."""
    with context.engine(path, context.world) as engine:
        start = engine.weight_checksums()
        model = models.make_model("qwen2", seed=2)
        expected = {}

        # A mapping of plain tensors; float32 masters are cast on the way, to what torch's cast gives.
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        engine.update_weights(weights, verify=True)
        expected = engine.weight_checksums()
        assert expected != start
        masters = {name: tensor.float() for name, tensor in weights.items()}
        assert engine.update_weights(masters, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == expected
        halves = {name: (tensor * 3).half() for name, tensor in weights.items()}
        assert engine.update_weights(halves, verify=True).wrong_elements == 0
        assert engine.weight_checksums() != expected

        # FSDP2 float32 masters, stepped by an optimizer: addresses stay, contents change, the plan is reused.
        trainer = shard(models.make_model("qwen2", seed=2, dtype=torch.float32), context.world)
        assert engine.update_weights(trainer, verify=True).planned
        from_shards = engine.weight_checksums()
        # After a forward without backward FSDP2 leaves its root unsharded: some weights are whole on every rank.
        with torch.no_grad():
            trainer(torch.tensor([[1, 2, 3, 4]]))
        assert engine.update_weights(trainer, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == from_shards
        optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.01)
        loss = trainer(torch.tensor([[1, 2, 3, 4]])).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        stepped = engine.update_weights(trainer, verify=True)
        assert not stepped.planned and stepped.wrong_elements == 0
        assert engine.weight_checksums() != expected

        # Memory that moved between updates is noticed.
        moved = {name: tensor.clone() for name, tensor in weights.items()}
        result = engine.update_weights(moved, verify=True)
        assert not result.planned and result.wrong_elements == 0
        assert engine.weight_checksums() == expected
        version = engine.weight_version

        # Refusals.
        def refused(source: Any, match: str, kind: type[Exception] = errors.PlanError) -> None:
            with pytest.raises(kind, match=match):
                engine.update_weights(source)
            assert engine.weight_version == version
            assert greedy(engine) == tokens

        tokens = greedy(engine)
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        refused({k: v for k, v in weights.items() if k != q_proj}, r"qkv_proj\.weight")
        refused({k: v for k, v in weights.items() if k != "model.norm.weight"}, r"model\.norm\.weight")
        refused({**weights, "model.extra.weight": torch.zeros(4)}, "does not know weight 'model.extra.weight'")
        wide = torch.zeros(weights[q_proj].shape[0] * 2, weights[q_proj].shape[1], dtype=torch.bfloat16)
        refused({**weights, q_proj: wide}, "q_proj")
        refused({**weights, "model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)}, r"model\.norm\.weight")
        refused({**weights, q_proj: weights[q_proj].to(torch.int8)}, "q_proj.weight' is torch.int8")
        refused({**weights, q_proj: weights[q_proj].t()}, "not contiguous")
        refused({**weights, q_proj: weights[q_proj].to("meta")}, "meta device")
        refused({}, "holds no weights")
        refused([weights], "an nn.Module or a mapping")
        # Another layout than the peer's: refused on both, by name.
        mine = weights if context.rank == 0 else {k: v.float() for k, v in weights.items()}
        refused(mine, "different calls", errors.CollectiveMismatchError)
        # A refusal on one rank only.
        mine = weights if context.rank == 0 else {**weights, q_proj: weights[q_proj].to(torch.int8)}
        refused(mine, "different calls", errors.CollectiveMismatchError)
        assert engine.weight_checksums() == expected

        # Shards of one rank that are gone: an error on both, no tokens from a mixture, and the next update heals it.
        broken = {**weights, q_proj: unmapped_like(weights[q_proj]) if context.rank == 1 else weights[q_proj]}
        with pytest.raises(errors.TransferError, match="rank 1 could not read a shard"):
            engine.update_weights(broken)
        with pytest.raises(errors.WeightsInconsistentError, match=f"weight version {version + 1} failed half-way"):
            greedy(engine)
        # `moved` is where the last committed update read from, so nothing seems to have moved since.
        engine.update_weights(moved)
        assert engine.weight_checksums() == expected and greedy(engine) == tokens
        with pytest.raises(errors.PlanError, match="does not know"):
            engine.update_weights(
                {"model.aaa.weight": torch.zeros(4), **models.make_model("qwen2", seed=3).state_dict()}
            )
        assert engine.update_weights(moved, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == expected

        # Ctrl-C in the middle ends the engine rather than leaving half a message behind.
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises((KeyboardInterrupt, errors.SchedulerDiedError, errors.EngineClosedError)):
            engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 200})
        signal.setitimer(signal.ITIMER_REAL, 0)
        with pytest.raises((errors.EngineClosedError, errors.SchedulerDiedError)):
            engine.generate(input_ids=PROMPTS)
        return {}


# ---- generate ----


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
        time.sleep(0.3)
        assert thread.is_alive()
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
    with context.engine(path, context.world) as engine:
        return _text_outputs(engine)


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
]


def _text_outputs(engine: Any) -> list[dict[str, Any]]:
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


# ---- the trainer process ----


def purity(context: Any, path: str) -> dict[str, Any]:
    """The trainer process stays as it was: no sglang, no environment, no patches, no random numbers, no threads."""
    from torch.multiprocessing import reductions

    model = shard(models.make_model("qwen2", seed=2), context.world)
    mesh = context.mesh(context.world)

    def state() -> dict[str, Any]:
        return {
            "environ": dict(os.environ),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "rng": torch.random.get_rng_state().tolist(),
            "reductions": {k: id(v) for k, v in vars(reductions).items() if callable(v)},
            "dispatch": {k: id(v) for k, v in vars(torch.distributed).items() if callable(v)},
            "dtype": str(torch.get_default_dtype()),
            "torch_threads": torch.get_num_threads(),
            "signals": {
                s: repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGQUIT)
            },
            "cwd": os.getcwd(),
        }

    torch.manual_seed(3)
    before = state()
    tasks = len(os.listdir("/proc/self/task"))
    engine = spmd_engine.SpmdEngine(path, device_mesh_cpu=mesh, timeout_s=90.0)
    greedy(engine)
    engine.update_weights(model)
    assert len(os.listdir("/proc/self/task")) == tasks
    children = psutil.Process().children(recursive=True)
    assert [child.pid for child in children] == [engine.scheduler_pid], children
    listening = [c for p in (psutil.Process(), *children) for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert all(c.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "::", "0.0.0.0") for c in listening)
    engine.shutdown()
    after = state()
    assert {k for k in before if before[k] != after[k]} == set()
    assert [name for name in sys.modules if name.split(".")[0] == "sglang"] == []
    assert psutil.Process().children(recursive=True) == []
    return {}


def idle(context: Any, path: str) -> dict[str, Any]:
    """CPU seconds that an idle scheduler process uses while its trainer rank computes."""
    with context.engine(path, context.world) as engine:
        greedy(engine)
        child = psutil.Process(engine.scheduler_pid)
        time.sleep(1.0)
        before, began = child.cpu_times(), time.monotonic()
        while time.monotonic() - began < 5.0:
            torch.randn(200, 200) @ torch.randn(200, 200)
        used = child.cpu_times()
        seconds = used.user + used.system - before.user - before.system
        return {"share": seconds / (time.monotonic() - began)}


# ---- starts that fail ----


def bad_starts(context: Any, path: str) -> dict[str, Any]:
    """Every wrong start is a typed error on every rank, and leaves no process."""
    mesh = context.mesh(context.world)

    def refused(kind: type[Exception], match: str, model_path: str = path, **kwargs: Any) -> None:
        with pytest.raises(kind, match=match):
            spmd_engine.SpmdEngine(model_path, **{"device_mesh_cpu": mesh, "timeout_s": 60.0, **kwargs})
        assert psutil.Process().children(recursive=True) == []

    config = errors.ConfigError
    refused(config, "did you mean mem_fraction_static", mem_fraction_statik=0.5)
    refused(config, "does not exist", model_path="/no/such/model")
    refused(config, "is set by SpmdEngine", nnodes=2)
    refused(config, "one SpmdEngine a replica", dp_size=2)
    refused(config, "device_mesh_cpu has 2 ranks", tp_size=4)
    refused(config, "one dimension", device_mesh_cpu=init_device_mesh("cpu", (1, context.world)))
    refused(config, "attention_backend|choose|invalid|Invalid", attention_backend="no_such_backend")
    refused(errors.CollectiveMismatchError, "rank 0.*\n.*rank 1", context_length=128 + context.rank)
    refused(errors.CollectiveMismatchError, "'port': 1", **({"port": 1} if context.rank == 0 else {}))
    dist.barrier()  # rank 0 serves the store of the others
    return {}


def heads_not_divisible(context: Any, path: str) -> dict[str, Any]:
    with pytest.raises(errors.ConfigError, match="TP 2"):
        context.engine(path, context.world)
    assert psutil.Process().children(recursive=True) == []
    return {}


# ---- deaths ----


def kill_scheduler(context: Any, path: str, during: str) -> dict[str, Any]:
    """`kill -9` of rank 1's scheduler process in the middle of a call."""
    engine = context.engine(path, context.world)
    model = shard(models.make_model("qwen2", seed=2), context.world)
    engine.update_weights(model)
    dist.barrier()
    killed = time.monotonic()
    if context.rank == 1:
        threading.Timer(0.4, lambda: os.kill(engine.scheduler_pid, signal.SIGKILL)).start()
    with pytest.raises(errors.SchedulerDiedError) as caught:
        while True:
            if during == "generate":
                engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 200})
            else:
                engine.update_weights(model)
    seconds = time.monotonic() - killed - 0.4
    assert seconds < 10.0, seconds
    assert caught.value.rank == 1 and "rank 1" in str(caught.value)
    assert caught.value.exit_status == -signal.SIGKILL
    with pytest.raises(errors.SchedulerDiedError, match="rank 1"):
        engine.generate(input_ids=[1])
    assert psutil.Process().children(recursive=True) == []
    engine.shutdown()
    return {"seconds": seconds}


def kill_trainer(context: Any, path: str) -> dict[str, Any]:
    """Rank 1's trainer is killed while rank 0 generates."""
    engine = context.engine(path, context.world)
    greedy(engine)
    (context.directory / f"scheduler{context.rank}.pid").write_text(str(engine.scheduler_pid))
    dist.barrier()
    if context.rank == 1:
        threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(errors.SchedulerDiedError) as caught:
        while True:
            engine.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "max_new_tokens": 200})
    assert time.monotonic() - began < 10.4
    assert caught.value.rank == 1 and "trainer" in str(caught.value)
    return {}


def late_rank(context: Any, path: str) -> dict[str, Any]:
    """A rank that never comes is a typed error after `timeout_s`, not a hang."""
    engine = context.engine(path, context.world, timeout_s=30.0)
    greedy(engine)
    engine._caller.timeout_s = 2.0
    if context.rank == 0:
        began = time.monotonic()
        with pytest.raises(errors.CollectiveTimeoutError, match="rank 1"):
            greedy(engine)
        assert time.monotonic() - began < 10.0
    else:
        time.sleep(4.0)
        with pytest.raises(errors.CollectiveTimeoutError, match="rank 1"):
            greedy(engine)
    return {}


def peer_shuts_down(context: Any, path: str) -> dict[str, Any]:
    """A rank that leaves tells the others."""
    engine = context.engine(path, context.world)
    greedy(engine)
    if context.rank == 1:
        engine.shutdown()
    else:
        with pytest.raises(errors.EngineClosedError, match="rank 1"):
            greedy(engine)
        assert psutil.Process().children(recursive=True) == []
    return {}


def exit_without_shutdown(context: Any, path: str) -> dict[str, Any]:
    """Called in a process of its own by the test: Python ends without `shutdown`."""
    engine = context.engine(path, context.world)
    (context.directory / f"scheduler{context.rank}.pid").write_text(str(engine.scheduler_pid))
    Path(context.directory / f"rank{context.rank}.json").write_text(json.dumps({}))
    sys.exit(0)
