"""What `generate.py` makes of its measurements and prints, from the dictionary that `--json` writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OURS, THEIRS = "SpmdEngine", "sglang.Engine"
ASLEEP = "asleep"
MIB = 1 << 20
HOSTS = ("trainer", "driver")  # processes that would be there without the engine, too


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(seconds: Mapping[str, Sequence[float]], cpu_seconds: Mapping[str, float], tokens: int) -> dict[str, Any]:
    """Tokens a second of both engines, their CPU seconds for 1000 tokens, and the ratio of the former.

    Args:
        seconds: of each round, by engine.
        cpu_seconds: of all processes of an engine in all rounds.
        tokens: made in each round.
    """
    found: dict[str, Any] = {
        name: {
            "tokens_s": spread([tokens / s for s in times]),
            "cpu_s_1000": cpu_seconds[name] / (tokens * len(times)) * 1000,
            "rounds_s": list(times),
        }
        for name, times in seconds.items()
    }
    found["ratio"] = spread([theirs / ours for ours, theirs in zip(seconds[OURS], seconds[THEIRS], strict=True)])
    return found


def added_memory(memory: Mapping[str, Any], key: str) -> int | None:
    """Bytes that an engine adds to the machine: its own processes, and what those grew by that hold it.

    Args:
        memory: "processes" and "hosts_before", lists of `processes.Held` as dicts.
        key: "rss" or "pss"; hosts count by memory that no file backs, since the first to map a library pays for it.
    """
    own = [one[key] for one in memory["processes"] if one["role"] not in HOSTS]
    host_key = "rss" if key == "rss" else "pss_anon"
    after = [one[host_key] for one in memory["processes"] if one["role"] in HOSTS]
    before = [one[host_key] for one in memory["hosts_before"]]
    if None in (*own, *after, *before):
        return None
    return sum(own) + sum(after) - sum(before)


def print_case(case: Mapping[str, Any]) -> None:
    how = "one call" if case["mode"] == "batch" else "a request each, async_generate"
    print(f"\n{case['requests']} x {case['tokens']} tokens, {how}; tokens/s")
    print(f"{'':30}{'min':>10}{'median':>10}{'max':>10}{'CPU s for 1000':>17}")
    for name in (OURS, THEIRS):
        _print_row(name, case[name]["tokens_s"], f"{case[name]['cpu_s_1000']:17.3f}")
    ratio = case["ratio"]
    print(
        f"ratio {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}); other tokens: "
        f"{case['differing_requests']} of {case['compared_requests']} requests",
        flush=True,
    )


def print_rest(result: Mapping[str, Any]) -> None:
    """All but the cases."""
    print("\n" + "  ".join(f"{name} {value}" for name, value in result["header"].items()))
    alone = result["alone"]
    print(
        f"one request at a time: {alone['differing_requests']} of {alone['requests']} x {alone['tokens']} tokens differ"
    )
    for name, times in result["start_s"].items():
        print(f"start of {name}: " + ", ".join(f"{value:.1f} s" for value in times))
    print(f"\n{'memory of processes, MiB':34}{'RSS':>10}{'PSS':>10}")
    for name, memory in result["memory"].items():
        for one in memory["processes"]:
            print(f"  {name + ' ' + one['role']:32}{_mib(one['rss'])}{_mib(one['pss'])}")
        print(f"{name + ' adds':34}{_mib(added_memory(memory, 'rss'))}{_mib(added_memory(memory, 'pss'))}")
    print("\nidle, share of a core")
    for name, processes in result["idle"].items():
        for process, used in processes.items():
            threads = sorted(((share, thread) for thread, share in used.items() if thread != "total"), reverse=True)
            most = ", ".join(f"{thread} {share:.2%}" for share, thread in threads[:4])
            print(f"  {name + ' ' + process:40}{used['total']:8.2%}   {most}")
    waiting = result["waiting"]
    if waiting is not None:
        print(
            f"\n{waiting['requests']} x {waiting['tokens']} tokens, async_generate; tokens/s by what the other ranks do"
            f"\n{'':30}{'min':>10}{'median':>10}{'max':>10}{'ratio':>9}"
        )
        for name, found in waiting["ways"].items():
            _print_row(name, found["tokens_s"], f"{found['ratio']:9.3f}")


def _print_row(name: str, values: Mapping[str, float], more: str = "") -> None:
    print(f"{name:30}" + "".join(f"{values[key]:10.0f}" for key in ("min", "median", "max")) + more)


def _mib(size: int | None) -> str:
    return f"{'?':>10}" if size is None else f"{size / MIB:10.0f}"
