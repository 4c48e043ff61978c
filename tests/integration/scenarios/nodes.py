"""Ranks on several nodes."""

from __future__ import annotations

from typing import Any

import models

from integration.scenarios.common import greedy, shard


def generate(context: Any, path: str, tp: int) -> dict[str, Any]:
    """Tokens of an engine whose TP ranks are on two nodes."""
    with context.engine(path, tp) as engine:
        return {"tokens": greedy(engine), "checksums": engine.weight_checksums()}


def update(context: Any, path: str, tp: int, config: dict[str, Any]) -> dict[str, Any]:
    """Start from other weights, and move shards in that are spread over both nodes."""
    with context.engine(path, tp) as engine:
        model = shard(models.make_model("qwen2", seed=2, **config), context.world)
        first = engine.update_weights(model, verify=True)
        assert first.planned and first.wrong_elements == 0
        again = engine.update_weights(model, verify=True)
        assert not again.planned and again.wrong_elements == 0
        sizes = {name: getattr(again, f"{name}_bytes") for name in ("local", "remote", "network", "staged")}
        return {"checksums": engine.weight_checksums(), "tokens": greedy(engine), "sizes": sizes}
