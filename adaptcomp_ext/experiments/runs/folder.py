"""An output folder with its configuration: the same one resumes it, any other is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptcomp_ext.experiments.files import read_json, write_json

__all__ = ["CONFIG_NAME", "RunFolder"]

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one experiment and one configuration, and in it a folder for each of its cells.

    Attributes
    ----------
    path : Path
        The folder.
    """

    path: Path

    @classmethod
    def open(cls, path: Path | str, experiment: str, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder, or open it again.

        Parameters
        ----------
        path : Path or str
            Where.
        experiment : str
            What runs there.
        config : mapping
            Everything that the results depend on, as JSON; recorded in ``config.json``.

        Raises
        ------
        ValueError
            If the folder holds another experiment, or this one in another configuration. Nothing is touched
            then.
        """
        path = Path(path)
        wanted = json.loads(json.dumps({"experiment": experiment, "config": dict(config)}))
        if (path / CONFIG_NAME).is_file():
            found = read_json(path / CONFIG_NAME)
            if found != wanted:
                raise ValueError(
                    f"{path}: {_difference(found, wanted)}; nothing was overwritten: choose another "
                    "output folder"
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / CONFIG_NAME, wanted)
        return cls(path)

    @property
    def cells(self) -> Path:
        """The folder of all cells' folders."""
        return self.path / "cells"

    def cell(self, name: str) -> Path:
        """The folder of a cell, made where it is not there."""
        folder = self.cells / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def result(self, name: str) -> dict[str, Any] | None:
        """What a cell that is finished found; None if it is not."""
        path = self.cells / name / "result.json"
        return dict(read_json(path)) if path.is_file() else None

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Record what a cell found."""
        write_json(self.cell(name) / "result.json", dict(result))


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict) or found.get("experiment") != wanted["experiment"]:
        other = found.get("experiment") if isinstance(found, dict) else found
        return f"expected a folder of {wanted['experiment']!r}, found one of {other!r}"
    ours, theirs = wanted["config"], found.get("config") or {}
    keys = sorted({*ours, *theirs}, key=str)
    parts = [
        f"{k} = {theirs.get(k)!r} there, {ours.get(k)!r} asked for"
        for k in keys
        if theirs.get(k) != ours.get(k)
    ]
    return f"it holds another configuration of {wanted['experiment']!r}: {'; '.join(parts)}"
