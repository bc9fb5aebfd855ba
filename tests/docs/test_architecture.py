"""The architecture page is true: imports go down, and the folders and files that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adaptcomp_ext"
LAYERS = ("_C", "reference", "ops", "nn", "models", "experiments")
"""From the lowest to the highest."""


def imported(path: Path) -> set[str]:
    """The layers that a module imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(path.relative_to(ROOT).parent.parts)
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("adaptcomp_ext.")} & set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_imports_go_down(layer):
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    upward = {str(path.relative_to(ROOT)): found for path in files if (found := imported(path) & above)}
    assert not upward


def test_the_package_imports_no_experiment():
    assert "experiments" not in imported(PACKAGE / "__init__.py")


@pytest.mark.parametrize("page", ["architecture.md", "contributing.md", "limits.md"])
def test_the_paths_exist(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    paths = [p for p in re.findall(r"`([\w.]+(?:/[\w.]+)*)`", text) if "/" in p or p == "csrc"]
    # How a run of an experiment goes is told from inside its layer.
    roots = (ROOT, PACKAGE / "experiments")
    missing = [p for p in paths if not any((r / p).exists() for r in roots) and p != "adaptcomp_ext/_C"]
    assert not missing


def test_every_layer_stands_in_the_table():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `adaptcomp_ext/(\w+)` \|", text, re.M)
    assert tuple(reversed(rows)) == LAYERS
