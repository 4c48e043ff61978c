"""What the benchmark prints and plots, from the dictionary that `--json` writes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

ORDER = ("describe", "wait", "bind", "copy", "device", "commit", "other", "total")  # others come before "other"
INSIDE = {"device"}  # part of the phase before it
MIB = 1 << 20


def slowest(rows_by_rank: list[list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Min, median and max over the updates of what the slowest rank took, for each phase.

    Args:
        rows_by_rank: for each rank the phases of its updates, in seconds.
    """
    last = ORDER.index("other")
    found = {}
    for phase in sorted(rows_by_rank[0][0], key=lambda name: ORDER.index(name) if name in ORDER else last - 0.5):
        times = [max(rows) for rows in zip(*([row[phase] for row in rows] for rows in rows_by_rank), strict=True)]
        found[phase] = {"min": min(times), "median": statistics.median(times), "max": max(times)}
    return found


def print_engine(result: dict[str, Any]) -> None:
    """Everything but the baselines."""
    ours, ceilings, phases = result["spmd_engine"], result["ceilings_gb_s"], result["spmd_engine"]["phases_s"]
    print("\n" + "  ".join(f"{name} {value}" for name, value in result["header"].items()))
    peer = "none" if ceilings["peer"] is None else f"{ceilings['peer']:.0f} GB/s"
    line = f"copy ceilings (each byte counted once): inside a device {ceilings['local']:.0f} GB/s, from a peer {peer}"
    print(line + (f", from the CPU {ceilings['host']:.1f} GB/s" if ceilings["host"] else ""))
    moved = ours["local_bytes"] + ours["peer_bytes"] + ours["staged_bytes"]
    print(
        f"bytes of the rank with the highest floor: {moved / 1e9:.3f} GB = own shard {ours['local_bytes'] / 1e9:.3f} + "
        f"{_link(result)} {ours['peer_bytes'] / 1e9:.3f} + "
        f"through buckets {ours['staged_bytes'] / 1e9:.3f} + network {ours['network_bytes'] / 1e9:.3f}; "
        f"{ours['block_copies']} block copies, {ours['fallback_weights']} fallback weights"
    )
    print("first update, ms: " + ", ".join(f"{name} {value * 1e3:.1f}" for name, value in ours["first_s"].items()))

    print(f"\n{'slowest rank, ms':22}{'min':>10}{'median':>10}{'max':>10}")
    for phase, times in phases.items():
        label = f"  of which {phase}" if phase in INSIDE else phase
        print(f"{label:22}" + "".join(f"{times[key] * 1e3:10.3f}" for key in ("min", "median", "max")))

    timed = "copy" if ours["staged_bytes"] else "device"
    device, floor = phases[timed]["median"], ours["floor_s"]
    rate = moved / device / 1e9
    line = f"\ncopy {rate:.0f} GB/s = {rate / ceilings['local']:.0%} of the local ceiling"
    if rate > ceilings["local"]:
        line += " (the caches hold these weights, and not what the ceiling is measured with)"
    if ours["peer_bytes"] and ceilings["peer"]:
        link = ours["peer_bytes"] / device / 1e9
        line += f"; {_link(result)} {link:.0f} GB/s = {link / ceilings['peer']:.0%} of its ceiling"
    if ours["staged_bytes"] and ceilings["host"]:
        line += f"; {rate / ceilings['host']:.0%} of the rate from the CPU"
    print(line)
    print(
        f"floor {floor * 1e3:.3f} ms: {timed} {device / floor:.3f} x, "
        f"whole call {phases['total']['median'] / floor:.2f} x"
    )
    wrong = ours["wrong_elements"]
    print(f"wrong elements: {'not compared (--verify)' if wrong is None else wrong}")
    print(f"peak extra memory during an update: {_memory(ours)}")
    _print_growth(ours["growth"])
    if ours["decode"] is not None:
        decode = ours["decode"]
        before, after = decode["before_tokens_s"], decode["after_tokens_s"]
        print(
            f"decoding {decode['sequences']} sequences x {decode['tokens']} tokens: {before:.0f} tokens/s before the "
            f"updates, {after:.0f} after ({after / before - 1:+.1%})"
        )


def print_baselines(result: dict[str, Any]) -> None:
    total = result["spmd_engine"]["phases_s"]["total"]["median"]
    print(f"\n{'whole update, ms':22}{'min':>10}{'median':>10}{'max':>10}{'ratio':>9}   peak extra memory, arrival")
    rows = {"SpmdEngine": result["spmd_engine"]["phases_s"]["total"]}
    rows.update({name: found["total_s"] for name, found in result["baselines"].items()})
    for name, times in rows.items():
        line = f"{name:22}" + "".join(f"{times[key] * 1e3:10.3f}" for key in ("min", "median", "max"))
        line += f"{times['median'] / total:8.1f}x"
        if name in result["baselines"]:
            found = result["baselines"][name]
            line += f"   {_memory(found)}; {found['parameters']} parameters changed"
            if found["unlike_spmd_engine"] is not None:
                line += f", {len(found['unlike_spmd_engine'])} differ from SpmdEngine's"
        else:
            line += f"   {_memory(result['spmd_engine'])}"
        print(line)


def _link(result: dict[str, Any]) -> str:
    return "other ranks" if result["header"]["driver"] == "none" else "peer GPUs"


def _memory(found: dict[str, Any]) -> str:
    memory = found["memory"]
    return (
        f"{memory['peak_extra_bytes'] / MIB:.0f} MiB ({memory['peak_over_first_bytes'] / MIB:.0f} MiB over the level "
        "before the first update)"
    )


def _print_growth(growth: dict[str, Any]) -> None:
    def value(name: str, number: int) -> str:
        return f"{number / MIB:+.1f} MiB" if name.endswith("_bytes") else f"{number:+d}"

    changes = ", ".join(f"{name.replace('_', ' ')} {value(name, by)}" for name, by in growth["by"].items())
    print(f"growth over {growth['updates']} updates, the rank with the most: {changes.replace(' bytes', '')}")


def plot(result: dict[str, Any], path: Path) -> None:
    """One PNG: whole updates against the baselines and the floor, and what ours consists of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours, facts = result["spmd_engine"], result["header"]
    phases = {name: times["median"] * 1e3 for name, times in ours["phases_s"].items()}
    floor = ours["floor_s"] * 1e3
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")

    bars = {"SpmdEngine": phases["total"]}
    bars.update({name: found["total_s"]["median"] * 1e3 for name, found in result["baselines"].items()})
    drawn = left.bar(list(bars), list(bars.values()), color=["tab:blue", *["tab:gray"] * (len(bars) - 1)], width=0.6)
    labels = [f"{value:.4g} ms\n{value / phases['total']:.3g} ×" for value in bars.values()]
    left.bar_label(drawn, labels, padding=2)
    left.axhline(floor, color="tab:red", linestyle="--", label=f"floor of the copy, {floor:.3g} ms")
    left.set_yscale("log")
    left.set_ylim(floor / 2, max(bars.values()) * 20)
    left.set_ylabel("whole update, slowest rank, median, ms")
    left.legend(loc="upper left")

    parts = {name: value for name, value in phases.items() if name not in INSIDE and name != "total"}
    bottom = 0.0
    for name, value in parts.items():
        right.bar(["SpmdEngine"], [value], bottom=bottom, width=0.4, label=f"{name} {value:.3g}")
        bottom += value
    right.axhline(floor, color="tab:red", linestyle="--")
    right.set_xlim(-0.5, 1.4)
    right.set_ylabel("each phase, slowest rank, median, ms")
    handles, names = right.get_legend_handles_labels()
    right.legend(handles[::-1], names[::-1], loc="center right")

    figure.suptitle(
        f"{facts['model']} {facts['dtype']}, {facts['trainer']} over {facts['ranks']} ranks, TP {facts['tp']} x "
        f"{facts['dp']} replicas\n{facts['device']}, torch {facts['torch']}, SGLang {facts['sglang']}, "
        f"commit {facts['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
