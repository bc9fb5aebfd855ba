"""What `adaptcomp info` and `adaptcomp --version` print. Needs no optional extra."""

from __future__ import annotations

import adaptcomp_ext as ac

__all__ = ["print_info", "print_version"]


def print_version() -> None:
    """Print the name and the version of the package."""
    print(f"adaptcomp_ext {ac.__version__}")


def print_info() -> None:
    """Print `adaptcomp_ext.build_info`, one line each."""
    info = ac.build_info()
    width = max(map(len, info))
    for name, value in info.items():
        shown = (
            "-"
            if value in (None, "")
            else {True: "yes", False: "no"}[value]
            if isinstance(value, bool)
            else value
        )
        print(f"{name.replace('_', ' '):{width}}  {shown}")
