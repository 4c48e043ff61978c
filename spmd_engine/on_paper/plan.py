"""A plan for a cluster of any shape, without GPUs and without weights.

The trainer's weights are those of the transformers model, and what the engine reads of them is recorded from SGLang's
own `load_weights`, in a child process (`scheduler/on_paper.py`). Exact but for this: SGLang's code for GPUs is taken
where it is the same as for the CPU, as it is for bfloat16 models; kernels that lay weights out in their own way
afterwards do not change what is read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from spmd_engine.errors import ConfigError, ErrorReport, SchedulerError
from spmd_engine.on_paper.model_shapes import SHAPES, model_directory
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.layout import Mesh, Placement, Replicate, Shard, SourceLayout, Weight
from spmd_engine.planning.read_sets import PackedReadSets, ReadSet, unpack
from spmd_engine.planning.report import LinkSpeeds, PlanReport, make_report
from spmd_engine.trainer.environment import child_environment

PLACEMENTS = ("shard0", "shard1", "matched")
_LOG_TAIL = 4000
T = TypeVar("T")


@dataclass(frozen=True)
class Cluster:
    """A trainer and an engine on the same GPUs.

    Attributes:
        fsdp: ranks over which FSDP2 shards the model.
        tp: tensor-parallel ranks of a replica of the engine, neighbours; there are as many replicas as fit.
        ep: expert-parallel groups among these.
        replicate: times that the trainer has the whole model (HSDP); the ranks of one are neighbours.
        placement: the dimension that FSDP2 cuts: "shard0", "shard1" (of weights that have one), or "matched": the first
            one that the engine cuts, too. FSDP2 cuts all but dimension 0 into equal parts only.
        dtype: of the trainer's parameters.
        per_expert: the trainer has a weight for each expert, rather than stacks of them as in transformers 5.
        gpus_per_node: neighbours that share a node.
        off_loaded: the trainer's shards are in CPU memory.
    """

    fsdp: int
    tp: int
    ep: int = 1
    replicate: int = 1
    placement: str = "shard0"
    dtype: str = "bfloat16"
    per_expert: bool = False
    gpus_per_node: int = 8
    off_loaded: bool = False

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.fsdp * self.replicate

    def check(self) -> None:
        """Raise ConfigError if there is no such cluster."""
        for name in ("fsdp", "tp", "ep", "replicate", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.world % self.tp:
            raise ConfigError(f"{self.world} GPUs (fsdp × replicate) make no whole number of replicas of TP {self.tp}")
        if self.tp % self.ep:
            raise ConfigError(f"ep must divide tp, got ep {self.ep} and tp {self.tp}")
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        if self.dtype not in ITEM_SIZE:
            raise ConfigError(f"dtype must be one of {', '.join(ITEM_SIZE)}, got {self.dtype!r}")


def plan_on_paper(
    model: str | os.PathLike[str],
    cluster: Cluster,
    *,
    speeds: LinkSpeeds | None = None,
    server_args: Mapping[str, Any] | None = None,
) -> PlanReport:
    """What `update_weights` would move in a cluster.

    Args:
        model: a name in `shapes.SHAPES`, or a directory with a `config.json`. A quantisation in it is left out.
        cluster: its shape.
        speeds: what links carry, for the floors; by default an H200's.
        server_args: further arguments of the engine, as `SpmdEngine` takes them.

    Raises:
        ConfigError: there is no such cluster or model, or SGLang or FSDP2 refuses it.
        PlanError: the engine cannot be filled from the transformers model's weights.
        SchedulerError: SGLang failed.
    """
    cluster.check()
    with tempfile.TemporaryDirectory(prefix="spmd-engine-") as scratch:
        path = _plain_model(os.fspath(model), Path(scratch))
        answer = _ask(path, cluster, server_args or {}, Path(scratch))
    names = [name for name, *_ in answer["weights"]]
    readers: list[dict[str, ReadSet]] = []
    fallback: dict[str, str] = {}
    firsts: dict[str, str] = {}
    for number, rank in enumerate(answer["ranks"]):
        if not number or rank["like"] != answer["ranks"][number - 1]["like"]:
            firsts = _firsts(rank["like"], names)
        readers.append(_expanded(unpack(msgspec.convert(rank["wants"], PackedReadSets), names), firsts))
        fallback |= _expanded(rank["fallback"], firsts)
    mesh = Mesh((cluster.replicate, cluster.fsdp), tuple(range(cluster.world)))
    weights = []
    for name, shape, dtype, is_parameter in answer["weights"]:
        placements = (Replicate(), _placement(cluster, name, tuple(shape), readers[0].get(name)))
        held = (0, placements) if is_parameter else ()  # FSDP2 leaves buffers whole on every rank
        weights.append(Weight(name, tuple(shape), dtype, *held))
    ranks = range(cluster.world)
    return make_report(
        SourceLayout(tuple(weights), (mesh,)),
        {rank: readers[rank % cluster.tp] for rank in ranks},
        nodes={rank: rank // cluster.gpus_per_node for rank in ranks},
        speeds=speeds or LinkSpeeds(),
        off_loaded=frozenset(ranks) if cluster.off_loaded else frozenset(),
        fallback=fallback,
    )


def _plain_model(model: str, scratch: Path) -> Path:
    """A directory with the model's configuration, in `scratch`, without quantisation.

    Raises:
        ConfigError: there is no such model.
    """
    directory = model_directory(model, scratch)
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model!r} is neither a directory with a config.json ({error}) nor one of {', '.join(SHAPES)}"
        ) from error
    config.pop("quantization_config", None)
    plain = scratch / "plain"
    plain.mkdir()
    for file in directory.glob("*.py"):  # of models that bring their own code
        shutil.copy(file, plain)
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def _ask(path: Path, cluster: Cluster, server_args: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """What the child process finds out."""
    question = {
        "model_path": str(path),
        "tp_size": cluster.tp,
        "server_args": {**server_args, **({"ep_size": cluster.ep} if cluster.ep > 1 else {})},
        "dtype": cluster.dtype,
        "per_expert": cluster.per_expert,
        "scratch": str(scratch),
    }
    env = child_environment(os.environ, on_cpu=True, tp_size=cluster.tp, nnodes=1, interface="", scratch=str(scratch))
    command = [sys.executable, "-P", "-m", "spmd_engine.scheduler.on_paper"]
    done = subprocess.run(command, input=json.dumps(question), env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SchedulerError(
            f"SGLang could not be asked (exit status {done.returncode}). End of its log:\n{done.stderr[-_LOG_TAIL:]}"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise ErrorReport(*answer["error"]).to_exception()
    return answer


def _firsts(like: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """For each name that of the same weight in the first of the layers that are like its own."""
    firsts = {}
    for name in names:
        stem = firsts[name] = name
        while stem := stem.rpartition(".")[0]:
            if stem in like:
                firsts[name] = like[stem] + name[len(stem) :]
    return firsts


def _expanded(found: Mapping[str, T], firsts: Mapping[str, str]) -> dict[str, T]:
    """What was found for the first of several like layers, for all of them."""
    return {name: found[first] for name, first in firsts.items() if first in found}


def _placement(cluster: Cluster, name: str, shape: tuple[int, ...], want: ReadSet | None) -> Placement:
    dim = 0
    if cluster.placement == "shard1":
        dim = min(1, len(shape) - 1)
    elif cluster.placement == "matched" and want is not None:
        read = [
            {index for part in want.parts for index in part[axis]} != {(0, extent)} for axis, extent in enumerate(shape)
        ]
        dim = read.index(True) if any(read) else 0
    if dim and shape[dim] % cluster.fsdp:
        raise ConfigError(
            f"FSDP2 cuts dimension {dim} only into equal parts: that of {name} {list(shape)} makes no {cluster.fsdp}"
        )
    return Shard(dim)
