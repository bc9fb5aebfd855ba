"""Where the package describes itself it says what ran where, in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SENTENCES = "CPU: tested and measured. CUDA: compiled and run under emulation, not yet on a GPU."
FIRST = {
    "README.md": 10,
    "docs/index.md": 10,
    "adaptcomp_ext/__init__.py": 6,
    "pyproject.toml": 12,
    "mkdocs.yml": 6,
    "CITATION.cff": 12,
}
"""The files, and how many of their first lines are looked at."""


@pytest.mark.promise("figures")
@pytest.mark.parametrize("name", FIRST)
def test_the_first_lines_say_what_ran_where(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()[: FIRST[name]]
    assert SENTENCES in " ".join(" ".join(lines).split())
