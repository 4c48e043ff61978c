"""Which room may import which. README.md has the picture; `control` also reads the data of `planning` and `stats`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "spmd_engine"
# What each room may import besides itself, `errors` and (but for the pure ones) third-party packages.
MAY_IMPORT = {
    "planning": set(),
    "control": {"planning", "stats"},
    "transfer": {"planning", "control"},
    "trainer": {"transfer", "planning", "control", "stats"},
    "scheduler": {"transfer", "planning", "control", "stats"},
    "on_paper": {"trainer", "planning", "control"},
}
PURE = {"planning": {"numpy", "msgspec", "matplotlib"}}  # matplotlib only to draw a report


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it; of `from a import b`, both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_rooms_import_only_what_lies_below_them(path):
    parts = path.relative_to(PACKAGE).parts
    names = imports(path)
    room = parts[0] if len(parts) > 1 else ""
    if room in MAY_IMPORT:
        others = {room_of(name) for name in names if name.startswith("spmd_engine.")} - {room, "errors", "_C"}
        assert others <= MAY_IMPORT[room], f"{room} may not import {sorted(others - MAY_IMPORT[room])}"
    outside = {name.split(".")[0] for name in names} - {"spmd_engine"}
    if room in PURE:
        assert outside - set(sys.stdlib_module_names) <= PURE[room]
    if "sglang" in outside:
        assert parts[:2] == ("scheduler", "adapter")
    if "spmd_engine._C" in names:
        assert parts == ("transfer", "_native.py")


def test_the_rules_see_a_forbidden_import(tmp_path):
    (tmp_path / "odd.py").write_text("from spmd_engine.trainer import requests\nimport sglang.srt\n")
    assert {"spmd_engine.trainer.requests", "sglang.srt"} <= imports(tmp_path / "odd.py")
