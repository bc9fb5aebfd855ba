"""The commands that README and documentation show exist, with the options that they show."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("typer")

from adaptcomp_ext.experiments.cli import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"\badaptcomp((?: +(?:[a-z]+|-[-\w]+|[A-Z\d][\w.,]*|[a-z]+(?:[-,][a-z]+)+))+)")


def commands() -> list[str]:
    """All commands in code, each once, in one line."""
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        code = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) + re.findall(r"`(adaptcomp [^`]+)`", text)
        for part in code:
            found |= {" ".join(m.split()) for m in COMMAND.findall(part.replace("\\\n", " "))}
    return sorted(found)


@cache
def help_of(*words: str) -> str:
    """The help text of a command; its exit status is checked."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0, words
    return text.getvalue()


@pytest.mark.promise("examples")
@pytest.mark.parametrize("command", commands())
def test_the_command_exists(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = command.split()
    if words in (["info"], ["--version"]):
        return
    path = [words[0], *(words[1:2] if words[0] in ("run", "bench") else [])]
    text = help_of(*path)
    for option in (w for w in words if w.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"adaptcomp {command}: {option} is unknown"


def test_commands_are_found():
    found = commands()
    assert {"demo", "report"} <= set(found)
    assert sum(c.startswith("run ") for c in found) >= 9
