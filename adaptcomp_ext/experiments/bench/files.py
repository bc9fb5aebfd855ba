"""Files of results."""

from __future__ import annotations

from adaptcomp_ext.experiments.files import write_text as write

__all__ = ["write"]
