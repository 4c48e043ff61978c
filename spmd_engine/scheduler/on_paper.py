"""What SGLang's `load_weights` reads on every tensor-parallel rank of a model, with no weights, no device and no peers.

Entry: `python -m spmd_engine.scheduler.on_paper`. Standard input has a `Question` as JSON, standard output gets the
answer; `spmd_engine.on_paper.plan` is the other end. SGLang is imported once; each rank is a fork of that process,
since a process of SGLang can be one rank only.

Layers whose weights and parameters have the same names and shapes are loaded alike: one of them is recorded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from spmd_engine.control.messages import PROTOCOL, GroupAddress, Start
from spmd_engine.errors import ConfigError, ErrorReport, SpmdEngineError
from spmd_engine.planning.layout import SourceLayout, Weight
from spmd_engine.planning.read_sets import pack, unpack_distinct
from spmd_engine.scheduler.adapter import starting
from spmd_engine.scheduler.explain import wants_and_fallback
from spmd_engine.scheduler.recording.checkpoint_format import CheckpointFormat, Described
from spmd_engine.scheduler.recording.loading import check_all_used, record
from spmd_engine.scheduler.recording.recording import list_tensors

_LAYER = re.compile(r"(?P<stem>(?:.*?\.)?(?P<list>\w+)\.\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Question:
    """What to find out.

    Attributes:
        model_path: a directory with a `config.json`.
        tp_size: number of ranks.
        server_args: further fields of SGLang's `ServerArgs`.
        dtype: of the trainer's weights.
        per_expert: the trainer names each expert's weights, rather than stacking them where transformers does.
        scratch: a directory for temporary files.
    """

    model_path: str
    tp_size: int
    server_args: dict[str, Any]
    dtype: str
    per_expert: bool
    scratch: str


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints is not the answer
    try:
        answer = _answer(Question(**json.load(sys.stdin)))
    except SpmdEngineError as error:
        answer = {"error": [type(error).__name__, str(error)]}
    out.write(msgspec.json.encode(answer).decode())
    out.close()


def _answer(question: Question) -> dict[str, Any]:
    starting.import_models()  # before the fork, for all ranks
    from transformers import AutoConfig

    try:
        checkpoint_format = CheckpointFormat(AutoConfig.from_pretrained(question.model_path))
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"transformers cannot read the model's configuration: {error}") from error
    weights, optional = checkpoint_format.trainer_weights(dtype=question.dtype, per_expert=question.per_expert)
    torch.set_num_threads(1)
    processes = min(question.tp_size, len(os.sched_getaffinity(0)))
    global _shared
    _shared = (question, checkpoint_format, weights)
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        ranks = list(pool.imap(_record_rank, range(question.tp_size)))
    for rank, found in enumerate(ranks):
        if "error" in found:
            kind, message = found["error"]
            raise ErrorReport(kind, message, rank).to_exception()
    recorded = {name for found in ranks for name in found["given"]}
    part = SourceLayout(tuple(_weight(weight) for weight in weights if weight[0] in recorded), ())
    names = [weight[0] for weight in weights]
    check_all_used(part, frozenset(optional), unpack_distinct((found["wants"] for found in ranks), names))
    return {"weights": weights, "ranks": [{k: found[k] for k in ("wants", "fallback", "like")} for found in ranks]}


_shared: tuple[Question, CheckpointFormat, list[Described]]


def _record_rank(rank: int) -> dict[str, Any]:
    """What one rank reads: in a process of its own."""
    question, checkpoint_format, weights = _shared
    try:
        model = starting.build_without_weights(_start(question, rank))
        like = alike(weights, [(name, tuple(t.shape), str(t.dtype)) for name, t in list_tensors(model)])
        given = [weight for weight in weights if like.get(_stem(weight[0]), "") in ("", _stem(weight[0]))]
        left_out = {stem for stem, first in like.items() if stem != first}
        layout = SourceLayout(tuple(_weight(weight) for weight in given), ())
        loads = record(model, layout, checkpoint_format, covers=lambda parameter: _stem(parameter) not in left_out)
        wants, fallback = wants_and_fallback(loads, layout)
        return {
            "wants": pack(wants, [weight[0] for weight in weights]),
            "fallback": fallback,
            "like": like,
            "given": [weight[0] for weight in given],
        }
    except SpmdEngineError as error:
        return {"error": [type(error).__name__, str(error)]}


def alike(weights: list[Described], parameters: list[tuple[str, tuple[int, ...], str]]) -> dict[str, str]:
    """For each layer ("model.layers.7") the first one that has the same weights and parameters.

    A layer is an element of the outermost list of modules in a name; the trainer's and the engine's name it alike.
    """
    layers: dict[str, list[Any]] = {}
    for name, facts in ((str(described[0]), described[1:]) for described in (*weights, *parameters)):
        found = _LAYER.fullmatch(name)
        if found is not None:
            layers.setdefault(found["stem"], []).append((found["rest"], *facts))
    first: dict[tuple[Any, ...], str] = {}
    return {stem: first.setdefault(tuple(has), stem) for stem, has in layers.items()}


def _stem(name: str) -> str:
    found = _LAYER.fullmatch(name)
    return found["stem"] if found is not None else ""


def _weight(described: Described) -> Weight:
    name, shape, dtype, _ = described
    return Weight(name, tuple(shape), dtype)


def _start(question: Question, rank: int) -> Start:
    return Start(
        protocol=PROTOCOL,
        rank=rank,
        tp_rank=rank,
        group=GroupAddress(tuple(range(question.tp_size)), "127.0.0.1", 0, ""),
        model_path=question.model_path,
        server_args={**question.server_args, "load_format": "dummy", "skip_tokenizer_init": True},
        random_seed=0,
        store_port=0,
        store_fd=-1,
        gpu_id=rank,
        on_cpu=True,
        node="",
        nnodes=1,
        node_rank=0,
        host="127.0.0.1",
        trainer_pid=os.getppid(),
        scratch=question.scratch,
        timeout_s=60.0,
        weight_version=0,
        is_restart=False,
        keeps_mapped=False,
    )


if __name__ == "__main__":
    main()
