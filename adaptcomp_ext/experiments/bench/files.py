"""Files of results."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write"]


def write(path: Path, text: str) -> None:
    """Replace the file at once: an interrupted run leaves the previous state readable."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
