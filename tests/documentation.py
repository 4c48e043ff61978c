"""What the documentation tells its readers to type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code of a page in that language, "" for those without one."""
    inside: list[str] = []
    for indent, name, text in re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", page.read_text(), re.M | re.S):
        if name == language:
            inside.append("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return inside


def recipe(launcher: str, language: str) -> list[str]:
    """Those of a recipe: "torchrun", "ray" or "verl"."""
    return blocks(ROOT / "docs" / "recipes" / f"{launcher}.md", language)


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """The text with words of a reader's own in the place of the example's, each of which must be there."""
    for old, new in changes.items():
        assert old in text, f"{old!r} is not in\n{text}"
        text = text.replace(old, new)
    return text
