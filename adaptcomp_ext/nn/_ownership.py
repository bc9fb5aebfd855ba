"""The warning for functions that use parameters which the module around them does not hold."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adaptcomp_ext.nn._graph import edge, reached
from adaptcomp_ext.nn._reads import walked

_MOST_NAMES = 6


def is_function(function: Any) -> bool:
    """Whether a callable is no module, so that a module that keeps it does not hold its parameters."""
    return function is not None and not isinstance(function, nn.Module)


def foreign_parameters(
    role: str, function: Any, values: Sequence[Tensor], given: Sequence[Tensor], holder: nn.Module
) -> list[str]:
    """Return the names of parameters that `function` has used and `holder` does not hold.

    Parameters
    ----------
    role : str
        The argument's name, which stands for the function in the names.
    function : callable
        It is no module.
    values : sequence of Tensor
        What it returned, with the graph.
    given : sequence of Tensor
        What it was given: parameters behind these tensors, an encoder's for instance, are not meant. Nor are
        those behind a tensor that was computed before the call and stands in one of the function's variables.
    holder : nn.Module
        A parameter of a module that the function can read and that contains `holder` counts as held: whoever
        trains that module trains both.

    Returns
    -------
    list of str
        Names as the function sees them, such as ``cell.weight_ih``; for others the shape.
    """
    used = [p for p in reached(values, given) if isinstance(p, nn.Parameter) and p.requires_grad]
    held = {id(p) for p in holder.parameters()}
    used = [p for p in used if id(p) not in held]
    if not used:
        return []
    walk = walked([(role, function)])
    tensors = [entry.value for entry in walk.entries if isinstance(entry.value, Tensor)]
    computed = {edge(t): t for t in tensors if t.grad_fn is not None}
    if computed:
        still = {id(p) for p in reached(values, given, computed)}
        used = [p for p in used if id(p) in still]
    modules = list(walk.modules.values())
    around = []
    if any(module is holder for module in modules):
        around = [m for m in modules if m is not holder and any(part is holder for part in m.modules())]
        held |= {id(p) for module in around for p in module.parameters()}
    names = {
        id(entry.value): entry.path for entry in reversed(walk.entries) if isinstance(entry.value, Tensor)
    }
    # A parameter without a name may be a copy that a module around the holder has made, gathered from parts.
    return [
        names.get(id(p), f"a parameter of shape {list(p.shape)}")
        for p in used
        if id(p) not in held and (id(p) in names or not around)
    ]


def warn(called: str, role: str, names: Sequence[str], way: str) -> None:
    """Warn that the `names` of parameters are not held; `way` says what to pass instead."""
    shown = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} more"
    warnings.warn(
        f"{called}: {role} is a plain function that uses parameters which this {called} does not hold: "
        f"{shown}. Its parameters(), state_dict() and to() leave them out, and so does an optimiser made "
        f"from it. {way} It does no harm where another module holds them, and that one is trained, saved "
        "and moved.",
        stacklevel=user_level(),
    )


def user_level() -> int:
    """Return the ``stacklevel`` with which the function that asks for it points to the user's call."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_inside(name: str) -> bool:
    return name.startswith(("adaptcomp_ext.nn.", "torch.nn.modules.", "torch._dynamo.", "torch._ops"))
