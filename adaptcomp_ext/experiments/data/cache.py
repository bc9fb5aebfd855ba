"""Tensors kept in a file between runs, never trusted further than what the file says of itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptcomp_ext.experiments.files import write_tensors

__all__ = ["cached"]


def cached(
    path: Path | None, about: dict[str, Any], build: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read tensors from a safetensors file if it was made from just this, else build them and write it.

    Parameters
    ----------
    path : Path or None
        The file; its folder is made. None: build, and keep nothing.
    about : dict
        What the tensors depend on, as JSON; stands in the file. A file that says something else is replaced.
    build : callable
        Makes the tensors.
    """
    if path is None:
        return build()
    key = json.dumps(about, sort_keys=True)
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("about") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{path}: a damaged cache is built anew ({error})", stacklevel=3)
    tensors = build()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"about": key})
    return tensors
