"""The command `spmd-engine`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from spmd_engine import doctor
from spmd_engine.doctor.findings import as_text, exit_status
from spmd_engine.errors import SpmdEngineError
from spmd_engine.on_paper.model_shapes import SHAPES
from spmd_engine.on_paper.plan import PLACEMENTS, Cluster, plan_on_paper
from spmd_engine.planning.dtypes import ITEM_SIZE
from spmd_engine.planning.report import LinkSpeeds

_PLAN = """What a weight update moves in a cluster of any shape, and how long it must take at least: without GPUs and
without weights. SGLang's own load_weights is recorded for every tensor-parallel rank."""

_DOCTOR = """Is this machine fit for SpmdEngine, and if not, what must change? What can be tried is tried for real,
between processes of its own. Run it where a trainer rank would run, with the same environment. The exit status is 1 if
anything failed, else 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Args:
        arguments: those after the command's name; by default this process's.
    """
    options = make_parser().parse_args(arguments)
    try:
        return _doctor(options) if options.command == "doctor" else _plan(options)
    except SpmdEngineError as error:
        print(f"spmd-engine: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="spmd-engine", description="SGLang inside every rank of an RL trainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands.add_parser("plan", help="what a weight update would move, on paper", description=_PLAN))
    _add_doctor(commands.add_parser("doctor", help="check this machine, and say how to mend it", description=_DOCTOR))
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    speeds, add = LinkSpeeds(), parser.add_argument
    add("--model", required=True, help=f"a directory with a config.json, or one of {', '.join(SHAPES)}")
    add("--fsdp", type=int, required=True, help="ranks over which FSDP2 shards the model")
    add("--tp", type=int, required=True, help="tensor-parallel ranks of a replica of the engine")
    add("--ep", type=int, default=1, help="expert-parallel groups among these")
    add("--replicate", type=int, default=1, help="times that the trainer has the whole model (HSDP)")
    add(
        "--placement", choices=PLACEMENTS, default="shard0", help="the dimension that FSDP2 cuts; matched: the engine's"
    )
    add("--dtype", choices=tuple(ITEM_SIZE), default="bfloat16", help="of the trainer's parameters")
    add("--experts", choices=("as-transformers", "per-expert"), default="as-transformers", help="how they are stored")
    add("--off-loaded", action="store_true", help="the trainer's shards are in CPU memory")
    add("--gpus-per-node", type=int, default=8)
    add("--server-args", type=json.loads, default={}, help="further arguments of the engine, as JSON")
    add("--hbm-gbps", type=float, default=speeds.hbm / 1e9, help="GB/s of a copy inside a GPU (%(default)s)")
    add("--nvlink-gbps", type=float, default=speeds.nvlink / 1e9, help="GB/s of a GPU, each way (%(default)s)")
    add("--host-gbps", type=float, default=speeds.host / 1e9, help="GB/s from CPU memory to a GPU (%(default)s)")
    add("--network-gbps", type=float, default=speeds.network / 1e9, help="GB/s of a node, each way (%(default)s)")
    add("--json", type=Path, help="write all numbers here")
    add("--heat-map", type=Path, help="write a picture of who reads how much from whom here; needs matplotlib")


def _plan(options: argparse.Namespace) -> int:
    began = time.monotonic()
    cluster = Cluster(
        fsdp=options.fsdp,
        tp=options.tp,
        ep=options.ep,
        replicate=options.replicate,
        placement=options.placement,
        dtype=options.dtype,
        per_expert=options.experts == "per-expert",
        gpus_per_node=options.gpus_per_node,
        off_loaded=options.off_loaded,
    )
    rates = (options.hbm_gbps, options.nvlink_gbps, options.host_gbps, options.network_gbps)
    speeds = LinkSpeeds(*(rate * 1e9 for rate in rates))
    report = plan_on_paper(options.model, cluster, speeds=speeds, server_args=options.server_args)
    if options.json:
        asked = {"model": options.model, "server_args": options.server_args, **vars(cluster)}
        options.json.write_text(json.dumps({**asked, **report.to_dict()}, indent=1))
    if options.heat_map:
        report.save_heat_map(options.heat_map)
    trainer = f"FSDP {cluster.fsdp}" + (f" × {cluster.replicate} (HSDP)" if cluster.replicate > 1 else "")
    expert = f", EP {cluster.ep}" if cluster.ep > 1 else ""
    print(
        f"{options.model}: {cluster.world} GPUs, {cluster.gpus_per_node} a node; trainer {trainer}, {cluster.placement}"
        f", {cluster.dtype}; engine {cluster.world // cluster.tp} × TP {cluster.tp}{expert}"
    )
    print(report)
    print(f"(planned in {time.monotonic() - began:.1f} s)")
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print the findings as JSON")
    add("--only", action="append", choices=tuple(doctor.CHECKS), default=[], help="make this check; may be repeated")
    add("--rendezvous", default="", metavar="HOST[:PORT]", help="where the ranks meet; default: MASTER_ADDR")
    add("--timeout", type=float, default=120.0, help="seconds for every process that a check starts (%(default)s)")


def _doctor(options: argparse.Namespace) -> int:
    findings = doctor.examine(os.environ, only=options.only, rendezvous=options.rendezvous, timeout_s=options.timeout)
    status = exit_status(findings)
    if options.json:
        print(json.dumps({"ok": not status, "findings": [finding.to_dict() for finding in findings]}, indent=1))
    else:
        print(as_text(findings))
    return status


if __name__ == "__main__":
    sys.exit(main())
