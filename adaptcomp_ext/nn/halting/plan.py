"""Which way a run of `AdaptiveHalt` would take."""

from __future__ import annotations

from typing import NamedTuple

from adaptcomp_ext.ops._fields import documented


@documented
class RunPlan(NamedTuple):
    """The way that a run would take, with the settings and modes of this moment.

    Attributes
    ----------
    way : str
        ``"kernel"``: one kernel call runs all steps of all rows, and the step's ``forward`` is not called.
        ``"loop"``: the step is called for the rows that are active, and one kernel call between two steps
        does the rest. ``"python"``: as ``"loop"``, with a policy that decides in Python.
        ``"reference"``: plain PyTorch.
    why : str
        The reason.
    microseconds : float
        The price of a step of all rows in the cost model that decides about compaction: an order of
        magnitude for two cores of a server CPU, from shapes and numbers of parameters, and no measurement.
    """

    way: str
    why: str
    microseconds: float

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.way}: {self.why} (about {self.microseconds:.3g} microseconds for a step of all rows)"
