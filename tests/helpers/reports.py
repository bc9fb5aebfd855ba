"""Experiments run for their reports, and checks that all reports have to pass."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import science


def check_one_seed_report(text: str) -> None:
    """Require that a report of one seed has no interval and no verdict."""
    assert "±" not in text and "p = " not in text
    assert not re.search(r"\[[-+−]?\d", text)
    for verdict in ("Holds", "Does not hold", "A tie", "a tie"):
        assert verdict not in text
    assert "one seed" in text.lower()


def run_over_seeds(run: Callable[[Path, int], object], folder: Path, seeds: int) -> None:
    """Call ``run(folder, seeds)``. Without ``--full`` one seed is trained, and a second is made of its cells.

    A report has intervals and verdicts from two seeds on. What it says of them does not ask for a training
    of each.
    """
    if not science.full():
        trained = folder.with_name(f"{folder.name}-trained")
        run(trained, 1)
        for cell in (trained / "cells").glob("*-seed-0"):
            for seed in range(seeds):
                made = folder / "cells" / f"{cell.name.removesuffix('-seed-0')}-seed-{seed}"
                shutil.copytree(cell, made)
                result = json.loads((made / "result.json").read_text("utf-8"))
                (made / "result.json").write_text(json.dumps(_larger(result, 1 + seed / 100)), "utf-8")
    run(folder, seeds)


def _larger(result: Any, factor: float) -> Any:
    """Return a result whose fractions are larger by a factor; whole numbers, as of all or none, are not."""
    if isinstance(result, dict):
        return {key: _larger(value, factor) for key, value in result.items()}
    if isinstance(result, list):
        return [_larger(value, factor) for value in result]
    return result * factor if isinstance(result, float) and not result.is_integer() else result
