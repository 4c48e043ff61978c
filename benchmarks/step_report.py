"""What `rl_step.py` prints, from the dictionary that `--json` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS, THEIRS = "SpmdEngine", "sglang.Engine"
STEP = "whole step"
PHASES = ("sleep", "train", "wake weights", "update_weights", "wake KV cache", "rollout", STEP)
MIB = 1 << 20


def print_engine(result: Mapping[str, Any], name: str) -> None:
    found = result["engines"][name]
    if len(result["engines"]) == 1:
        print("\n" + "  ".join(f"{key} {value}" for key, value in result["header"].items()))
    print(f"\n{name + ': slowest rank, ms':36}{'min':>10}{'median':>10}{'max':>10}{'peak, MiB':>12}{'after, MiB':>12}")
    for phase in PHASES:
        times, memory = found["phases_s"].get(phase), found["memory"].get(phase)
        line = f"  {phase:34}"
        line += "".join(
            f"{'-' if times is None else f'{times[key] * 1e3:.1f}':>10}" for key in ("min", "median", "max")
        )
        if phase != STEP:
            line += "".join(
                f"{'-' if memory is None else f'{memory[key] / MIB:.0f}':>12}" for key in ("peak_bytes", "after_bytes")
            )
        print(line)
    wrong = found["wrong_elements"]
    print(
        f"  start {found['start_s']:.1f} s; loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}; "
        + ("every parameter changed" if wrong is None else f"wrong elements: {wrong}"),
        flush=True,
    )


def print_comparison(result: Mapping[str, Any]) -> None:
    if result["rollouts"] is None:
        return
    ours, theirs = (result["engines"][name]["phases_s"] for name in (OURS, THEIRS))
    print(f"\n{'median, ms':20}{OURS:>15}{THEIRS:>15}{'ratio':>9}")
    for phase in PHASES:
        a, b = (times[phase]["median"] * 1e3 if phase in times else None for times in (ours, theirs))
        is_alike = phase != STEP or ours.keys() == theirs.keys()  # on the CPU only one of them sleeps
        cells = "".join(f"{'-' if value is None else f'{value:.1f}':>15}" for value in (a, b))
        print(f"{phase:20}{cells}{f'{b / a:.2f}' if a and b and is_alike else '-':>9}")
    compared = result["rollouts"]
    print(f"other tokens: {compared['differing']} of {compared['requests']} requests", flush=True)
