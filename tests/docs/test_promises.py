"""The page of promises is made from the marks on the tests, and stands behind the README's first screen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.promises import FIRST_SCREEN, NAMES

ROOT = Path(__file__).parents[2]


def make(page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.promises", str(page)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_page_is_what_the_marks_say(tmp_path):
    """Every promise has a test, every mark a promise; otherwise the page is not made."""
    made = make(tmp_path / "promises.md")
    assert made.returncode == 0, made.stderr[-2000:]
    committed = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    again = "run python -m tests.promises docs/promises.md"
    assert (tmp_path / "promises.md").read_text(encoding="utf-8") == committed, again


def sentences(text: str) -> list[str]:
    """The sentences of a document's prose, without headings, code and pictures."""
    text = re.sub(r"^```[^`]*^```$|^#.*$|^!\[.*$", "\n\n", text, flags=re.M)
    paragraphs = [" ".join(part.split()).replace("*", "") for part in re.split(r"\n\s*\n", text)]
    return [s.strip() for part in paragraphs for s in re.split(r"(?<=[.:])\s+(?=[A-Z\[])", part) if s.strip()]


def test_each_sentence_of_the_first_screen_is_promised():
    screen, _, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Install")
    found = sentences(screen)
    for sentence in found:
        behind = [names for begin, names in FIRST_SCREEN.items() if sentence.startswith(begin)]
        assert len(behind) == 1, f"no promise, or several, stand behind: {sentence}"
        assert set(behind[0]) <= set(NAMES)
    assert len(found) >= len(FIRST_SCREEN)


def test_sentences_are_taken_apart():
    text = "# Name\n\n**One sentence:\nof two lines.** And another.\n\n```sh\nno. Sentence\n```\nThe last."
    assert sentences(text) == ["One sentence: of two lines.", "And another.", "The last."]
