"""SGLang's own ways to take a trainer's weights, as RL frameworks use them: the baselines of the benchmark.

Both gather every weight on every rank, 512 MiB at a time, serialise a handle of what they gathered, collect the handles
of a replica on its first rank, and let that rank call `sglang.Engine.update_weights_from_tensor`. SGLang's schedulers
open the handles and run `model.load_weights`.

- `sglang-tensor`: a handle a weight, `load_format=None`. The loop of `sglang.srt.weight_sync.utils.update_weights`,
  which verl 0.5 calls; a bucket of 0 bytes is verl 0.4, a request for every weight.
- `sglang-flattened`: the weights of a bucket are concatenated, one handle a bucket,
  `load_format="flattened_bucket"`. The loop of slime's FSDP backend.

SGLang answers when it has queued its copies, not when they are done: what is timed here is a little less than a whole
update. On the CPU it collects garbage when it flushes its cache, about half a second whatever the model: the ratios
that count are those on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stock import CPU_ARGS, stock_environment
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

PROBE = "probe.write_digests"
SETTLE_S = 30.0

Named = list[tuple[str, torch.Tensor]]


class BaselineError(Exception):
    """SGLang's own engine refused an update, or did not take it."""


class StockReplica:
    """This rank's share in a replica that `sglang.Engine` serves: its first rank runs the engine, all send to it.

    Collective over the ranks of `mesh`; so are all methods but `shutdown`.

    Args:
        path: the model's directory.
        mesh: the replica's TP ranks, a mesh on the CPU (gloo).
        device: this rank's device.
        server_args: more arguments of `sglang.ServerArgs`.
        scratch: a directory for temporary files of the engine's processes.
    """

    def __init__(
        self, path: Path, mesh: DeviceMesh, *, device: torch.device, server_args: Mapping[str, Any], scratch: Path
    ) -> None:
        self._device = device
        self._group = mesh.get_group()
        self._ranks = [int(rank) for rank in mesh.mesh.flatten().tolist()]
        self._scratch = scratch / f"replica-of-rank-{self._ranks[0]}"
        self._engine: Any = None
        if device.type == "cpu":
            # Handles of CPU tensors: files in shared memory. Descriptors would need a key that only a child shares.
            torch.multiprocessing.set_sharing_strategy("file_system")
        if dist.get_rank() == self._ranks[0]:
            self._scratch.mkdir()
            arguments = {
                "model_path": str(path),
                "tp_size": len(self._ranks),
                "base_gpu_id": 0 if device.type == "cpu" else self._ranks[0],
                "skip_tokenizer_init": True,
                "log_level": "error",
                "custom_weight_loader": [PROBE],
                **(CPU_ARGS if device.type == "cpu" else {}),
                **server_args,
            }
            on_cpu = device.type == "cpu"
            with _environment(stock_environment(on_cpu=on_cpu, tp_size=len(self._ranks), scratch=self._scratch)):
                import sglang

                self._engine = sglang.Engine(**arguments)
        dist.barrier(group=self._group)
        if device.type == "cuda":
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()  # devices by UUID; on CPU tensors it fails, and nothing needs it

    @property
    def pids(self) -> list[int]:
        """Processes of the engine; empty on all ranks but the first."""
        import psutil

        return [] if self._engine is None else [p.pid for p in psutil.Process().children(recursive=True)]

    def update(self, baseline: str, model: torch.nn.Module, *, bucket_bytes: int) -> int:
        """Bring the model's weights into the engine; returns the number of requests that this took."""
        send = {"sglang-tensor": self._send_tensors, "sglang-flattened": self._send_flattened}[baseline]
        requests = 0
        with self._session():
            for bucket in _buckets(model, bucket_bytes):
                requests += send(bucket)
        if self._engine is not None:
            self._engine.flush_cache()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return requests

    def digests(self, *, exact: bool) -> list[dict[str, str]]:
        """Digests of the parameters in the engine's schedulers, by TP rank, with their names. See `probe`.

        Args:
            exact: as `SpmdEngine.weight_checksums` makes them, at about a second a GB; else fast ones of which
                nothing but a change can be told.
        """
        from sglang.srt.utils import MultiprocessingSerializer

        target = self._scratch / ("exact" if exact else "fast")
        if self._engine is not None:
            target.mkdir(exist_ok=True)
        dist.barrier(group=self._group)
        with self._session():
            token = torch.zeros(1, device=self._device)  # SGLang insists on a tensor; the name tells where to write
            self._load([(str(target), MultiprocessingSerializer.serialize(token))], PROBE)
        dist.barrier(group=self._group)
        return [json.loads((target / f"{rank}.json").read_text()) for rank in range(len(self._ranks))]

    # ---- memory and rollouts, as verl has them: the first rank asks the engine, the others wait ----

    def settle(self) -> None:
        """Wait until the schedulers have nothing left to do: one that is to release memory a turn too early ends."""
        deadline = time.monotonic() + SETTLE_S
        while self._engine is not None and not self._engine.flush_cache().success:
            if time.monotonic() > deadline:
                raise BaselineError(f"sglang.Engine was still at work after {SETTLE_S:.0f} s")
        dist.barrier(group=self._group)

    def release(self) -> None:
        """Release weights, KV cache and CUDA graphs. Needs `enable_memory_saver=True` and a GPU."""
        if self._engine is not None:
            self._engine.release_memory_occupation()
        dist.barrier(group=self._group)

    def resume(self, tags: Sequence[str]) -> None:
        """Take released memory again."""
        if self._engine is not None:
            self._engine.resume_memory_occupation(list(tags))
        dist.barrier(group=self._group)

    def generate(self, prompts: list[list[int]], sampling_params: Mapping[str, Any]) -> list[list[int]]:
        """The tokens that the engine makes of each prompt, on all ranks."""
        made: list[Any] = [None]
        if self._engine is not None:
            outputs = self._engine.generate(input_ids=prompts, sampling_params=dict(sampling_params))
            made = [[list(output["output_ids"]) for output in outputs]]
        dist.broadcast_object_list(made, src=self._ranks[0], group=self._group)
        tokens: list[list[int]] = made[0]
        return tokens

    def shutdown(self) -> None:
        """End the engine's processes. SGLang ends all children of this process."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.shutdown()

    # ---- the two ways ----

    def _send_tensors(self, bucket: Named) -> int:
        from sglang.srt.utils import MultiprocessingSerializer

        gathered = [(name, _full(tensor)) for name, tensor in bucket]
        self._load([(n, MultiprocessingSerializer.serialize(t)) for n, t in _checkpoint_names(gathered)], None)
        return 1

    def _send_flattened(self, bucket: Named) -> int:
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        started = [(name, _start_gathering(tensor)) for name, tensor in bucket]
        gathered = [(name, t.wait() if hasattr(t, "wait") else t) for name, t in started]
        by_dtype: dict[torch.dtype, Named] = {}
        for name, tensor in _checkpoint_names(gathered):
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        for named in by_dtype.values():
            flat = FlattenedTensorBucket(named_tensors=named)
            content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
            handles = self._collect(MultiprocessingSerializer.serialize(content))
            self._call(handles, "flattened_bucket")
        return len(by_dtype)

    def _load(self, serialized: list[tuple[str, bytes]], load_format: str | None) -> None:
        """One request with a handle of each rank for each name."""
        handles = self._collect(serialized)
        if handles is None:
            return
        from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor

        named = [
            (of_ranks[0][0], LocalSerializedTensor(values=[handle for _, handle in of_ranks]))
            for of_ranks in zip(*handles, strict=True)
        ]
        self._call(named, load_format)

    def _collect(self, mine: Any) -> list[Any] | None:
        """What all ranks of the replica give, on its first rank; None on the others."""
        gathered: list[Any] | None = None if dist.get_rank() != self._ranks[0] else [None] * len(self._ranks)
        dist.gather_object(mine, gathered, dst=self._ranks[0], group=self._group)
        return gathered

    def _call(self, named_tensors: list[Any] | None, load_format: str | None) -> None:
        if self._engine is None:
            return
        success, message = self._engine.update_weights_from_tensor(
            named_tensors=named_tensors, load_format=load_format, flush_cache=False
        )
        if not success:
            raise BaselineError(f"sglang.Engine refused an update with load_format={load_format!r}: {message}")

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """SGLang 0.5.23 wants to be told where an update begins and ends."""
        begin: Callable[[], Any] | None = getattr(self._engine, "begin_weight_update", None)
        if begin is not None:
            begin()
        yield
        if begin is not None:
            self._engine.end_weight_update()


def _state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights, as DTensors if they are sharded: for FSDP1 its sharded state dict, as in verl."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    if not isinstance(model, FullyShardedDataParallel):
        return model.state_dict()
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        return model.state_dict()


def _buckets(model: torch.nn.Module, size: int) -> Iterator[Named]:
    """The model's weights in its own order, in groups of at most `size` bytes; a larger one is a group of its own."""
    bucket: Named = []
    held = 0
    for name, tensor in _state_dict(model).items():
        tensor = tensor.detach()
        bytes_ = tensor.numel() * tensor.element_size()
        if bucket and held + bytes_ > size:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += bytes_
    if bucket:
        yield bucket


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole weight. On the CPU a copy: a handle there moves the storage itself into shared memory."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.clone() if whole.device.type == "cpu" else whole


def _start_gathering(tensor: torch.Tensor) -> torch.Tensor:
    """`full_tensor` that does not wait: all gathers of a bucket are under way at once, as in slime."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim, async_op=True)
    return whole.to_local()


def _checkpoint_names(named: Named) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as a checkpoint names them, all of them views.

    transformers 5 keeps the experts of a layer in two tensors, `gate_up_proj` [experts, 2 x intermediate, hidden] and
    `down_proj` [experts, hidden, intermediate]; SGLang's loaders pass over names that they do not know, and
    report success.
    """
    for name, tensor in named:
        experts, _, last = name.rpartition(".")
        if not experts.endswith(".mlp.experts"):
            yield name, tensor
            continue
        for index, expert in enumerate(tensor.unbind(0)):
            if last == "gate_up_proj":
                gate, up = expert.chunk(2)
                yield f"{experts}.{index}.gate_proj.weight", gate
                yield f"{experts}.{index}.up_proj.weight", up
            else:
                yield f"{experts}.{index}.{last}.weight", expert


@contextlib.contextmanager
def _environment(made: Mapping[str, str]) -> Iterator[None]:
    """Another environment for a while: `sglang.Engine` and its children inherit it."""
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(made)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
