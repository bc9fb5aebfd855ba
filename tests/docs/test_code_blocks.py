"""Every Python block of the README and the documentation runs, and prints what stands below it.

The blocks of a document run one after another in one namespace, as a reader would type them. A ``text`` block
directly below a Python block holds what that prints: the words must be the same, and the numbers nearly. A
block below ``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<mark><!-- not run: [^>]+ -->\n)?```(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^```$", re.M | re.S
)
NUMBER = re.compile(r"[-−]?\d[\d,]*\.?\d*(?:e-?\d+)?")


def blocks(path: Path) -> list[tuple[str, str, int, bool, int, int]]:
    """Kind, text, line, whether it is left out, begin and end of the blocks of a document."""
    text = path.read_text(encoding="utf-8")
    return [
        (
            m["kind"],
            m["body"],
            text.count("\n", 0, m.start("body")),
            m["mark"] is not None,
            m.start(),
            m.end(),
        )
        for m in BLOCK.finditer(text)
    ]


def same(printed: str, expected: str) -> bool:
    """Whether the words are the same and the numbers nearly."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", expected).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True)
    read = [tuple(float(n.replace(",", "").replace("−", "-").rstrip(".")) for n in pair) for pair in pairs]
    return all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.02) for a, b in read)


WITH_CODE = [path for path in DOCUMENTS if any(kind == "python" for kind, *_ in blocks(path))]


TRAINED = {"README.md": "halt", "docs/tutorial.md": "model"}
"""What a document trains: it holds its step and its head, of which nothing is hidden in a plain function."""


@pytest.mark.promise("examples")
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = path.read_text(encoding="utf-8")
    module = types.ModuleType("document")  # which torch.compile finds by its name
    monkeypatch.setitem(sys.modules, "document", module)
    namespace = vars(module)
    printed, end_before = None, -1
    for kind, body, line, left_out, begin, end in blocks(path):
        if kind == "python" and not left_out:
            output = io.StringIO()
            code = compile("\n" * line + body, str(path), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, namespace)
            printed, end_before = output.getvalue(), end
        elif kind == "text" and printed is not None and not text[end_before:begin].strip():
            assert same(printed, body), f"{path.name}, line {line}: printed\n{printed}\nexpected\n{body}"
            printed = None
    name = TRAINED.get(str(path.relative_to(ROOT)))
    if name is not None:
        parameters = dict(namespace[name].named_parameters())
        assert len(parameters) > 4
        assert all(p.grad is not None and bool(p.grad.any()) for p in parameters.values())


def test_few_blocks_are_left_out():
    left_out = [
        path.name for path in WITH_CODE for kind, _, _, out, *_ in blocks(path) if kind == "python" and out
    ]
    assert len(left_out) <= 4, left_out


def test_outputs_are_compared():
    assert same("steps 8.7 [1, 1024]", "steps 8.71 [1, 1024]")
    assert not same("steps 8.7", "steps 12.3")
    assert not same("steps 8.7", "rows 8.7")
    assert not same("8.7", "8.7 9.1")


def test_documents_are_found():
    assert len(WITH_CODE) > 3
