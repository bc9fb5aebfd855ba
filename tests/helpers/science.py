"""How much of the science the tests run: a short form, or with ``--full`` all of it."""

from __future__ import annotations

_full = False


def set_full(full: bool) -> None:
    """Take the option ``--full`` of pytest (`conftest`), before the test modules are imported."""
    global _full
    _full = full


def full() -> bool:
    """Whether tests run in full."""
    return _full


def seeds(full: int) -> int:
    """Return the number of seeds of a scientific test: `full` with ``--full``, else two, for an interval."""
    return full if _full else min(2, full)
