"""The search of the first step with a graph for parameters that `AdaptiveHalt` does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptcomp_ext.nn._ownership import foreign_parameters, is_function, warn
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.policy import heads_of

_WAY = "Pass a module instead: the one that holds them, or a small nn.Module whose forward calls it."


def search(
    halt: Any, problem: Problem, leaves: Sequence[Tensor], readout: Tensor | None, decided: Sequence[Any]
) -> None:
    """Search the graphs of the first step's results, and warn of parameters that `halt` does not hold.

    A plain function without a graph is looked at again at the next call.

    Parameters
    ----------
    halt : AdaptiveHalt
    problem : Problem
        The call.
    leaves, readout : Tensor
        The new state, and its readout, which may be None.
    decided : sequence
        The logits or the decision; what is no tensor in it is ignored.
    """
    parts = [(halt.step, leaves, "step"), (halt.readout, (readout,), "readout")]
    parts += [(head, decided, "head") for head in heads_of(problem.policy)]
    graphs = [[t for t in part[1] if isinstance(t, Tensor) and t.requires_grad] for part in parts]
    if not any(graphs):
        return
    waiting = False
    given = [t for t in (*problem.state, *problem.inputs) if t.requires_grad]
    for (function, _, role), graph in zip(parts, graphs, strict=True):
        if is_function(function):
            waiting = waiting or not graph
            names = foreign_parameters(role, function, graph, given, halt)
            if names:
                halt._searched(warned=True)  # before the warning, which may be an error
                warn("AdaptiveHalt", role, names, _WAY)
                return
        given = given + graph
    if not waiting:
        halt._searched(warned=False)
