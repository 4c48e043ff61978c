from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest

from integration.jobs import run_job
from integration.nodes import Node, two_nodes_or_skip

Save = Callable[..., str]
Reference = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """checkpoint(name, seed, **config) -> directory of a saved tiny model; made once."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str, seed: int, **overrides: Any) -> str:
        tag = "-".join([name, str(seed), *(f"{k}{v}" for k, v in sorted(overrides.items()))])
        directory: Path = root / tag
        if not directory.exists():
            models.save_model(name, directory, seed=seed, **overrides)
        return str(directory)

    return save


@pytest.fixture(scope="session")
def reference(checkpoint: Save, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """reference(name, tp, generates, **config) -> what an engine with seed 2 from disk has, by TP rank; run once."""

    @cache
    def run(name: str, tp: int, generates: bool, **config: Any) -> list[Any]:
        directory, path = tmp_path_factory.mktemp("reference"), checkpoint(name, 2, **config)
        return run_job("weights.reference", tp, directory, path=path, tp=tp, generates=generates).values

    return run


@pytest.fixture(scope="session")
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes with a network between them."""
    with two_nodes_or_skip() as found:
        yield found


@pytest.fixture
def leaves_nothing(tmp_path):
    """After the test there is nothing new in /dev/shm, and nothing in the temporary directory of its job."""
    shared = set(os.listdir("/dev/shm"))
    yield
    assert set(os.listdir("/dev/shm")) - shared == set()
    assert os.listdir(tmp_path / "tmp") == []
