"""What the documentation says can be done as it says. (`make docs` checks its links.)"""

from __future__ import annotations

import ast
import importlib
import re
import shlex

import pytest
from documentation import PAGES, ROOT, blocks

import spmd_engine
from spmd_engine import SpmdEngine, cli, errors

# Every command in the documentation, by its first words, and what runs it.
COMMANDS = {
    "make demo": "by hand before a release: it has the time of a whole CI run",
    "make test": "CI",
    ".venv-test-0.5.17/bin/python -m pytest": "CI, for all tests",
    "pip install .": "the Makefile's environments",
    "pip install '.[ray]'": "the extra `ray`, by the test environment's own",
    "spmd-engine doctor": "tests/unit/test_doctor.py, tests/integration/test_nodes.py",
    "spmd-engine plan": "tests/integration/test_on_paper.py",
    "torchrun --standalone --nproc_per_node 2 first.py": "tests/integration/test_docs.py",
    "torchrun --standalone --nproc_per_node 2 examples/grpo.py": "make demo",
    "torchrun --nnodes 2 --node-rank": "tests/integration/test_nodes.py",
    "ray start": "tests/integration/ray_cluster.py",
    "python examples/grpo_ray.py --nodes 2 --ranks-per-node 1": "tests/integration/test_nodes.py",
}


def all_blocks(language):
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, language))
    ]


@pytest.mark.parametrize("text", all_blocks("bash"))
def test_every_command_is_run_by_something(text):
    for line in filter(None, text.splitlines()):
        assert any(line.startswith(known) for known in COMMANDS), line
        words = shlex.split(line, comments=True)
        if words[0] == "spmd-engine":
            cli.make_parser().parse_args(words[1:])


@pytest.mark.needs_sglang
@pytest.mark.parametrize("text", all_blocks("python"))
def test_code_names_what_exists(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spmd_engine"):
            try:
                module = importlib.import_module(node.module)
            except ImportError as error:
                if (error.name or "").startswith("spmd_engine"):
                    raise  # the documentation names what does not exist
                pytest.skip(f"not in this environment: {error}")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("engine", "self.engine"):
            assert hasattr(SpmdEngine, node.attr), ast.unparse(node)


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in set(spmd_engine.__all__) - {"__version__"}:
        module = getattr(spmd_engine, name).__module__
        assert re.search(rf"^::: {module}(\.{name})?$", text, re.M), f"{module}.{name}"


def test_errors_of_the_failure_guide_exist():
    text = (ROOT / "docs" / "failures.md").read_text()
    named = set(re.findall(r"\b[A-Z]\w+Error\b", text)) - {"ncclUnhandledCudaError"}
    assert named and all(hasattr(errors, name) for name in named)
    raised = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    missing = {name for name in raised if name.endswith("Error")} - named - {"SpmdEngineError"}
    assert missing == set(), "the failure guide does not have these"
    messages = "\n".join(text for path in (ROOT / "spmd_engine").rglob("*.py") for text in strings(path))
    phrases = re.findall(r"Error`?:? (?:\.\.\. )?([^`|]{8,}?)(?: \.\.\.)?`", text)
    assert len(phrases) > 5
    for phrase in phrases:
        for part in re.split(r"\s*\.\.\.\s*", phrase):
            assert part in messages, f"no message says {part!r}"


def test_the_reading_path_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w./]+(?:\.py|/))`", text) + re.findall(r"`((?:scheduler|planning|trainer)/\w+)`", text)
    assert len(named) > 15
    roots = (ROOT, ROOT / "spmd_engine", ROOT / "tests" / "integration")
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert missing == []


def test_every_page_of_the_lab_book_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = sorted((ROOT / "docs" / "measurements").glob("*.md"))
    assert len(pages) > 3 and all(f"measurements/{page.name}" in navigation for page in pages)
    assert all(len(page.read_text().splitlines()) < 400 for page in pages)


def strings(path):
    """The strings of a program that are not its documentation."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
