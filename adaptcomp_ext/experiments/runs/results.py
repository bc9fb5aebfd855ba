"""What the cells of an experiment measured, looked up by setting and path, one value for each seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cells import Cell
from .statistics import counted, mean_interval, measured_over

if TYPE_CHECKING:
    from pandas import Series

__all__ = ["Results"]

_SEED = re.compile(r"-?seed-\d+$")


@dataclass(frozen=True, eq=False)
class Results:
    """The results of some cells of an experiment, which may differ in their settings.

    A quantity is named by its path in a cell's result, such as ``"confidence/0.9/steps"``. A whole number in
    a path is an index into a list, and a path that begins with ``/`` begins at the result, whatever `at`
    says. Looked up, a quantity is a pandas Series indexed by seed: arithmetic on two of them pairs the seeds,
    and `interval` and `points` write their means with an interval.

    Attributes
    ----------
    cells : sequence of Cell
        The cells; sorted by their seed.
    found : mapping
        The result of each cell, by the cell's name.
    config : mapping
        The configuration of the experiment.
    machine : str
        What the experiment ran on, for the opening of its report.
    path : str
        The path at which all lookups begin; empty: the whole result.
    folder : Path
        The folder of the experiment.
    """

    cells: Sequence[Cell]
    found: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    machine: str = ""
    path: str = ""
    folder: Path = Path()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", sorted(self.cells, key=lambda cell: cell.seed))

    def where(self, **options: Any) -> Results:
        """Return the results of the cells with these options; ``a__b`` is the option b in the option a."""
        wanted = {key.replace("__", "/"): value for key, value in options.items()}

        def fits(cell: Cell) -> bool:
            return all(_look(cell.options, path, None) == value for path, value in wanted.items())

        chosen = list(filter(fits, self.cells))
        if not chosen:
            raise KeyError(f"no cell with {options}")
        return replace(self, cells=chosen)

    def at(self, path: str | float) -> Results:
        """Return the same results, in which all further paths begin at `path`."""
        return replace(self, path=self._under(path))

    def __getitem__(self, path: str | float) -> Series:
        """Return the quantity of each seed; a KeyError where a cell lacks it or two cells share a seed."""
        from pandas import Series

        values = {cell.seed: _look(self.found[cell.name], self._under(path)) for cell in self.cells}
        if len(values) < len(self.cells):
            names = ", ".join(cell.name for cell in self.cells)
            raise KeyError(
                f"{path}: expected one cell for each seed, got {names}; choose among them with where()"
            )
        return Series(values, name=path)

    def __contains__(self, path: str | float) -> bool:
        """Whether every cell has the quantity."""
        missing = object()
        under = self._under(path)
        return all(_look(self.found[cell.name], under, missing) is not missing for cell in self.cells)

    def first(self, path: str | float = "") -> Any:
        """Return what the cell of the first seed has at a path: a number, or whatever else JSON holds."""
        return _look(self.found[self.cells[0].name], self._under(path))

    def each(self, path: str, key: str = "") -> list[Series]:
        """Return each element of the list at `path`, or of each element the quantity `key`."""
        return [self[f"{path}/{i}/{key}" if key else f"{path}/{i}"] for i in range(len(self.first(path)))]

    def keys(self, path: str | float = "") -> list[str]:
        """Return the names of what the cell of the first seed has at a path, in their order."""
        return list(self.first(path))

    def options(self, key: str) -> list[Any]:
        """Return the different values that an option has among the cells, in their order."""
        values = [_look(cell.options, key.replace("__", "/"), None) for cell in self.cells]
        return [value for i, value in enumerate(values) if value is not None and value not in values[:i]]

    @property
    def files(self) -> Path:
        """The folder of the first seed's cell, with the files that it wrote."""
        return self.folder / "cells" / self.cells[0].name

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    @property
    def opening(self) -> str:
        """How many seeds were run on what, and what the figures are, as the opening of a report."""
        return f"{counted(len(self.seeds), 'seed')}; {self.machine}. {measured_over(len(self.seeds))}"

    def means(self) -> dict[str, Any]:
        """Return every number of every setting, as the mean over seeds with its interval, for the JSON."""
        groups: dict[str, list[Any]] = {}
        for cell in self.cells:
            groups.setdefault(_SEED.sub("", cell.name) or "all", []).append(self.found[cell.name])
        return {name: _mean(values) for name, values in groups.items()}

    def _under(self, path: str | float) -> str:
        part = path if isinstance(path, str) else f"{path:g}"
        return part[1:] if part.startswith("/") else "/".join(filter(None, (self.path, part)))


_REQUIRED = object()


def _look(where: Any, path: str, default: Any = _REQUIRED) -> Any:
    for part in filter(None, path.split("/")):
        try:
            where = where[int(part)] if isinstance(where, list) else where[part]
        except (KeyError, IndexError, TypeError, ValueError):
            if default is _REQUIRED:
                raise KeyError(f"{path}: no {part!r} there") from None
            return default
    return where


def _mean(values: list[Any]) -> Any:
    one = values[0]
    if isinstance(one, Mapping):
        return {key: _mean([v[key] for v in values]) for key in one if all(key in v for v in values)}
    if isinstance(one, list) and all(len(v) == len(one) for v in values):
        return [_mean(list(parts)) for parts in zip(*values, strict=True)]
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return mean_interval(values)
    return one if all(v == one for v in values) else values
