"""Ranks on several nodes."""

from __future__ import annotations

from typing import Any

from integration.scenarios.common import greedy


def generate(context: Any, path: str, tp: int) -> dict[str, Any]:
    """Tokens of an engine whose TP ranks are on two nodes."""
    with context.engine(path, tp) as engine:
        return {"tokens": greedy(engine), "checksums": engine.weight_checksums()}
