"""Checks that the reports of all experiments have to pass."""

from __future__ import annotations

import re


def check_one_seed_report(text: str) -> None:
    """Require that a report of one seed has no interval and no verdict."""
    assert "±" not in text and "p = " not in text
    assert not re.search(r"\[[-+−]?\d", text)
    for verdict in ("Holds", "Does not hold", "A tie", "a tie"):
        assert verdict not in text
    assert "one seed" in text.lower()
