"""What `adaptcomp info` prints. Needs no optional extra."""

from __future__ import annotations

import adaptcomp_ext as ac

__all__ = ["print_info"]


def print_info() -> None:
    """Print `adaptcomp_ext.build_info`, one line each."""
    info = ac.build_info()
    width = max(map(len, info))
    for name, value in info.items():
        shown = "-" if value in (None, "") else {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")
