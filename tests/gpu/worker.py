"""One trainer rank of a GPU test: `worker.py SCENARIO ARGUMENTS`, with torchrun's environment variables."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
from integration.scenarios.common import GREEDY, greedy

from spmd_engine import SpmdEngine, errors

SERVER_ARGS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_prefill_cuda_graph": True,
    "enforce_disable_flashinfer_allreduce_fusion": True,  # its kernels take minutes to compile at the first start
    "max_total_tokens": 8192,
    "mem_fraction_static": 0.5,
    "random_seed": 7,
    "timeout_s": 180.0,
    "log_dir": ".",  # the directory of the test
}
# Large enough for SGLang's GPU kernels.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512, "head_dim": 64}


def make_engine(path: str, tp: int, **server_args: Any) -> SpmdEngine:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]
    return SpmdEngine(path, device_mesh_cpu=mesh, **{**SERVER_ARGS, **server_args})


def make_trainer(name: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """FSDP2 over the whole world, on this rank's GPU."""
    model = models.make_model(name, seed=seed, dtype=dtype, **SHAPE).cuda()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def update(name: str, path: str, other: str, tp: int, compare_tokens: bool = True) -> None:
    """Weights moved in are bit for bit what SGLang loads from a checkpoint."""
    replicas = dist.get_world_size() // tp
    with make_engine(path, tp, enable_memory_saver=replicas > 1) as engine:
        before = engine.weight_checksums()
        model = make_trainer(name, seed=2)
        first = engine.update_weights(model, verify=True)
        assert first.planned and first.wrong_elements == 0 and first.device_s > 0
        again = engine.update_weights(model, verify=True)
        assert not again.planned and again.wrong_elements == 0 and again.bind_s < 1e-3
        checksums, tokens = engine.weight_checksums(), greedy(engine)
        assert checksums != before
        if replicas > 1:  # the engine of one has closed what the trainers of all others think it has open
            if dist.get_rank() == 0:
                engine.release_memory_occupation(["kv_cache"])
                engine.resume_memory_occupation(["kv_cache"])
            dist.barrier()
            stats = engine.update_weights(model, verify=True)
            assert not stats.planned and stats.wrong_elements == 0 and engine.weight_checksums() == checksums
    with make_engine(other, tp) as engine:
        expected, expected_tokens = engine.weight_checksums(), greedy(engine)
    different = [name for name in expected if checksums[name] != expected[name]]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:5]}"
    assert tokens == expected_tokens or not compare_tokens


def in_expandable_segments(weights: dict[str, torch.Tensor], factor: int) -> dict[str, torch.Tensor]:
    """The weights times `factor`; every second one is in an expandable segment, the others in cudaMalloc's memory."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    block = torch.empty(256 << 20, dtype=torch.bfloat16, device="cuda")  # larger than what the allocator has cached
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    sizes = [tensor.numel() for tensor in weights.values()]
    made = {name: tensor * factor for name, tensor in weights.items()}
    for name, part in list(zip(weights, block[: sum(sizes)].split(sizes), strict=True))[::2]:
        made[name] = part.view_as(made[name]).copy_(made[name])
    return made


def sources(path: str) -> None:
    """Values, addresses and whole allocations change; casts happen on the way; what cannot be moved is refused."""
    environment = dict(os.environ)
    with make_engine(path, 1) as engine:
        model = models.make_model("qwen2", seed=2, **SHAPE).cuda()
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        first = engine.update_weights(weights, verify=True)
        expected = engine.weight_checksums()
        before = engine.weight_version

        masters = {name: tensor.float() for name, tensor in weights.items()}
        assert engine.update_weights(masters, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == expected

        # Values change in place: the plan and the opened handles serve again.
        torch._foreach_mul_(list(masters.values()), 2.0)
        stats = engine.update_weights(masters, verify=True)
        assert not stats.planned and stats.wrong_elements == 0
        doubled = engine.weight_checksums()
        assert doubled != expected

        # All memory is given back and taken again, as off-loading trainers do, some of it at the same addresses.
        kept = [{name: tensor / divisor for name, tensor in weights.items()} for divisor in (1, 2, 4)]
        wanted = []
        for source in kept:
            engine.update_weights(source)
            wanted.append(engine.weight_checksums())
        for checksums in wanted:
            saved = {name: tensor.cpu() for name, tensor in masters.items()}
            masters.clear()
            torch.cuda.empty_cache()
            masters = {name: tensor.cuda().div_(2) for name, tensor in saved.items()}
            stats = engine.update_weights(masters, verify=True)
            assert not stats.planned and stats.wrong_elements == 0
            assert engine.weight_checksums() == checksums

        # Expandable segments beside memory of cudaMalloc, mapped again at the same addresses with other values.
        for factor, same in ((1, expected), (2, doubled)):
            mixed = in_expandable_segments(weights, factor)
            stats = engine.update_weights(mixed, verify=True)
            assert not stats.planned and stats.wrong_elements == 0
            assert engine.weight_checksums() == same
            print(f"expandable segments: bind {stats.bind_s * 1e3:.1f} ms, total {stats.total_s * 1e3:.1f} ms")
            torch._foreach_zero_(list(mixed.values()))
            stats = engine.update_weights(mixed, verify=True)
            assert stats.wrong_elements == 0 and stats.bind_s < 1e-3
            assert engine.weight_checksums() not in (expected, doubled)
            mixed.clear()
            torch.cuda.empty_cache()

        # Off-loaded to the CPU, pinned or not, and cast on the way: through buckets, so small that they take turns.
        assert engine.weight_version == before + 12
        cpu = {name: tensor.cpu() for name, tensor in weights.items()}
        pinned = {name: tensor.pin_memory() for name, tensor in cpu.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPMD_ENGINE_BUCKET_BYTES", str(256 << 10))
            for source in (cpu, pinned, {name: tensor.float() for name, tensor in cpu.items()}):
                for verify in (True, False):
                    engine.update_weights(kept[1])
                    stats = engine.update_weights(source, verify=verify)
                    assert stats.wrong_elements == (0 if verify else None) and stats.network_bytes == 0
                    assert stats.staged_bytes == first.local_bytes and stats.local_bytes == stats.remote_bytes == 0
                    assert engine.weight_checksums() == expected
                rate = stats.staged_bytes / stats.copy_s / 1e9
                print(f"off-loaded: copy {stats.copy_s * 1e3:.1f} ms, {rate:.1f} GB/s")
        # What this thread has queued to fill them comes first.
        torch.cuda._sleep(1 << 30)  # cycles: about half a second
        for name, tensor in pinned.items():
            tensor.copy_(kept[1][name], non_blocking=True)
        engine.update_weights(pinned)
        assert engine.weight_checksums() == wanted[1]

        version = engine.weight_version
        mixed = {name: tensor.cpu() if i == 3 else tensor for i, (name, tensor) in enumerate(weights.items())}
        with pytest.raises(errors.PlanError, match="must be on one device"):
            engine.update_weights(mixed)
        assert engine.weight_version == version
        assert engine.update_weights(weights, verify=True).wrong_elements == 0
        assert engine.weight_checksums() == expected
        greedy(engine)
    assert not [name for name in sys.modules if name.split(".")[0] == "sglang"]
    assert dict(os.environ) == environment


def other_node(path: str) -> None:
    """Two replicas, one on each node, and one trainer over both: NCCL between them, in buckets that take turns."""
    os.environ["SPMD_ENGINE_BUCKET_BYTES"] = str(256 << 10)
    with make_engine(path, 1) as engine:
        model = make_trainer("qwen2", seed=2)
        shards = {name: tensor.detach() for name, tensor in model.named_parameters()}
        whole = {name: tensor.full_tensor() for name, tensor in shards.items()}
        stats = engine.update_weights(whole, verify=True)
        assert stats.wrong_elements == 0 and stats.network_bytes == 0
        expected = engine.weight_checksums()
        off_loaded = init_device_mesh("cpu", (dist.get_world_size(),))
        on_cpu = {
            name: DTensor.from_local(
                tensor.to_local().cpu(), off_loaded, tensor.placements, shape=tensor.shape, stride=tensor.stride()
            )
            for name, tensor in shards.items()
        }
        for source in (shards, on_cpu):
            for verify in (True, False, False):
                engine.update_weights({name: tensor * 2 for name, tensor in whole.items()})
                assert engine.weight_checksums() != expected
                stats = engine.update_weights(source, verify=verify)
                assert stats.wrong_elements == (0 if verify else None)
                assert engine.weight_checksums() == expected
                needed = sum(tensor.nbytes for tensor in whole.values()) // 2
                assert needed <= stats.network_bytes < 1.05 * needed
            print(f"from another node: {stats.network_bytes / 1e6:.1f} MB in {stats.copy_s * 1e3:.1f} ms")
        greedy(engine)


def free_bytes() -> int:
    """Free memory of this rank's GPU, whoever has the rest."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def sleep(path: str, tp: int) -> None:
    """Memory really comes back, also the trainer's; CUDA graphs and plans survive; cycles leave nothing behind."""
    pausable_graphs = "SGLANG_MEMORY_SAVER_CUDA_GRAPH" in os.environ
    kv_tokens, cycles, slack = 1_000_000, 20, 64 << 20
    kv_bytes = kv_tokens * SHAPE["num_hidden_layers"] * 2 * (2 // tp) * SHAPE["head_dim"] * 2  # two KV heads, bfloat16
    arguments = {
        "enable_memory_saver": True,
        "max_total_tokens": kv_tokens,
        "disable_cuda_graph": False,
        "cuda_graph_max_bs_decode": 8,
    }
    with make_engine(path, tp, **arguments) as engine:
        model = make_trainer("qwen2", seed=2)
        first = engine.update_weights(model, verify=True)
        assert first.planned and first.wrong_elements == 0
        tokens, checksums = greedy(engine), engine.weight_checksums()

        held = {}
        for tag in ("weights", "kv_cache", "cuda_graph"):
            before = free_bytes()
            engine.release_memory_occupation([tag])
            held[tag] = free_bytes() - before
            print(f"release of {tag}: {held[tag] / 2**20:.1f} MiB")
        assert held["kv_cache"] >= 0.95 * kv_bytes, (held, kv_bytes)
        assert held["weights"] >= first.local_bytes + first.remote_bytes, (held, first)
        assert held["cuda_graph"] > 0 or not pausable_graphs, held
        with pytest.raises(errors.MemoryOccupationError, match="everything is released already"):
            engine.sleep()
        with pytest.raises(errors.AsleepError, match="before generate"):
            greedy(engine)
        with pytest.raises(errors.AsleepError, match="before update_weights"):
            engine.update_weights(model)

        # No memory to wake up with.
        hog = torch.empty(free_bytes() - (256 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(errors.MemoryOccupationError, match="GiB free"):
            engine.wake_up()
        assert engine.sleeping == ("weights", "kv_cache", "cuda_graph")
        del hog
        asleep = free_bytes()

        # The staged wake: no KV cache while the weights move.
        engine.resume_memory_occupation(["weights"])
        with pytest.raises(errors.AsleepError, match="before generate"):
            greedy(engine)
        stats = engine.update_weights(model, verify=True)
        assert not stats.planned and stats.wrong_elements == 0
        assert asleep - free_bytes() < held["weights"] + slack
        engine.wake_up()
        assert greedy(engine) == tokens and engine.weight_checksums() == checksums

        free = {}
        for cycle in range(cycles):
            engine.sleep()
            asleep = free_bytes()
            engine.resume_memory_occupation(["weights"])
            if cycle == 0:
                engine.resume_memory_occupation(["kv_cache", "cuda_graph"])
                with pytest.raises(errors.WeightsInconsistentError, match="call update_weights"):
                    greedy(engine)
            stats = engine.update_weights(model)
            assert not stats.planned
            if cycle > 0:
                engine.wake_up()
            assert greedy(engine) == tokens
            free[cycle] = (asleep, free_bytes())
            if cycle == 1:
                print(f"update after a wake: bind {stats.bind_s * 1e3:.1f} ms, total {stats.total_s * 1e3:.1f} ms")
        assert engine.weight_checksums() == checksums
        print(f"free MiB asleep and awake: {[(a >> 20, b >> 20) for a, b in free.values()]}")
        for early, late in zip(free[1], free[cycles - 1], strict=True):
            assert early - late < slack, free

        # What the trainer has freed is free once the engine is asked for memory, though the engine had it mapped.
        weights = {name: tensor.full_tensor().detach() for name, tensor in model.state_dict().items()}
        before = free_bytes()
        mixed = in_expandable_segments(weights, 1)
        assert engine.update_weights(mixed, verify=True).wrong_elements == 0
        mixed.clear()
        pinned = before - free_bytes()
        engine.release_memory_occupation(["kv_cache"])
        gained = free_bytes() - before
        print(f"freed by the trainer but mapped by the engine: {pinned / 2**20:.1f} MiB")
        assert gained >= held["kv_cache"] - slack, (gained, held)
        mixed = in_expandable_segments(weights, 1)
        stats = engine.update_weights(mixed, verify=True)
        assert not stats.planned and stats.wrong_elements == 0
        mixed.clear()
        engine.wake_up()
        assert free_bytes() >= before - slack
        assert greedy(engine) == tokens and engine.weight_checksums() == checksums


def keep_mapped(path: str) -> None:
    """What the engine keeps mapped need not be opened again, and is closed when the engine lacks memory to wake."""
    with make_engine(path, 1, enable_memory_saver=True, keep_mapped=True) as engine:
        weights = {n: t.detach() for n, t in models.make_model("qwen2", seed=2, **SHAPE).cuda().state_dict().items()}
        block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
        sizes = [tensor.numel() for tensor in weights.values()]
        parts = block[: sum(sizes)].split(sizes)
        source = {n: p.view_as(t).copy_(t) for (n, t), p in zip(weights.items(), parts, strict=True)}
        engine.update_weights(source)
        tokens, checksums = greedy(engine), engine.weight_checksums()
        for _ in range(3):
            engine.sleep()
            engine.resume_memory_occupation(["weights"])
            stats = engine.update_weights(source, verify=True)
            assert not stats.planned and stats.wrong_elements == 0 and stats.bind_s < 1e-4, stats
            engine.wake_up()
            assert greedy(engine) == tokens and engine.weight_checksums() == checksums

        engine.release_memory_occupation(["kv_cache"])
        before = torch.cuda.mem_get_info()[0]
        source.clear()
        del block, parts
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info()[0] - before < 1 << 29, "what is mapped is not free"
        hogs = []
        for size in (1 << 30, 64 << 20, 2 << 20):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        engine.resume_memory_occupation(["kv_cache"])
        hogs.clear()
        torch.cuda.empty_cache()
        assert greedy(engine) == tokens
        stats = engine.update_weights(weights, verify=True)
        assert not stats.planned and stats.wrong_elements == 0 and engine.weight_checksums() == checksums


def lost_gpu(path: str) -> None:
    """A kernel of a loader fails, for good: the process ends and says so, and another one takes its place."""
    tests = str(Path(__file__).parents[1])
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "integration.checked_models"
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    with make_engine(path, dist.get_world_size()) as engine:
        model = models.make_model("qwen2", seed=2, **SHAPE).cuda()
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        assert engine.update_weights(weights, verify=True).wrong_elements == 0
        tokens, checksums = greedy(engine), engine.weight_checksums()
        norm = weights["model.norm.weight"]
        for _ in range(2):
            began = time.monotonic()
            broken = torch.full_like(norm, 777.0) if dist.get_rank() == dist.get_world_size() - 1 else norm
            with pytest.raises(errors.SpmdEngineError, match="CUDA error") as failed:
                engine.update_weights({**weights, "model.norm.weight": broken})
            assert time.monotonic() - began < 20.0
            print(f"rank {dist.get_rank()}: {type(failed.value).__name__}: {str(failed.value)[:300]}")
            with pytest.raises(type(failed.value), match="CUDA error"):
                greedy(engine)
            engine.restart()
            assert engine.update_weights(weights, verify=True).wrong_elements == 0
            assert greedy(engine) == tokens and engine.weight_checksums() == checksums


def out_of_memory(path: str) -> None:
    """The trainer has left SGLang no memory to compute in: the call fails, and serves again after a restart."""
    with make_engine(path, 1, mem_fraction_static=0.3) as engine:
        model = models.make_model("qwen2", seed=2, **SHAPE).cuda()
        engine.update_weights(model)
        tokens = greedy(engine)
        hogs = []
        for size in (1 << 30, 64 << 20, 20 << 20, 1 << 20):  # what torch takes from the device as it is
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        wide = {"input_ids": [[7] * 200] * 32, "sampling_params": GREEDY}
        with pytest.raises(errors.SchedulerError, match=r"[Oo]ut of memory|CUBLAS_STATUS"):
            engine.generate(**wide, return_logprob=True, logprob_start_len=0, top_logprobs_num=5)
        hogs.clear()
        torch.cuda.empty_cache()
        engine.restart()
        engine.update_weights(model)
        assert greedy(engine) == tokens and len(engine.generate(**wide)) == 32


SCENARIOS: dict[str, Any] = {
    "update": update,
    "sources": sources,
    "other_node": other_node,
    "sleep": sleep,
    "keep_mapped": keep_mapped,
    "lost_gpu": lost_gpu,
    "out_of_memory": out_of_memory,
}


def main() -> None:
    scenario, arguments = sys.argv[1], json.loads(sys.argv[2])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl")
    SCENARIOS[scenario](**arguments)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
