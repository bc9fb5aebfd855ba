"""Calls of `AdaptiveHalt` and `EnergyDescent` in a graph of torch.compile: see `adaptcomp_ext.ops.opaque`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._ownership import is_function
from adaptcomp_ext.nn._reads import walked
from adaptcomp_ext.ops import opaque
from adaptcomp_ext.ops._plain import TELLS_EXPORT


class Known(NamedTuple):
    """What is known of a result before the run.

    Attributes
    ----------
    fields : str
        The `Field` of each of its tensors, as a literal.
    has_log_prob : bool
        Whether there is a log-probability.
    traced : int
        The number of tensors of its trace.
    unused : tuple of str
        How the names of parameters begin that no result depends on. Their gradients stay None.
    """

    fields: str
    has_log_prob: bool
    traced: int
    unused: tuple[str, ...] = ()


class InGraph(nn.Module):
    """A module whose call is one operator of a compiled graph."""

    _number: int = 0

    def _enroll(self) -> None:
        # A module that is made within a graph has no number, and its calls split the graph.
        self._number = 0 if torch.compiler.is_compiling() else opaque.enroll(self)

    def __setstate__(self, state: Any) -> None:
        """Give a copy, or what a pickle holds, a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._enroll()


# Dynamo reads this function: it has to stay simple.
def run(
    module: Any,
    arguments: tuple[Any, ...],
    options: Any,
    known_of: Callable[..., Known | None],
    settings: tuple[Any, ...],
) -> tuple[Known, list[Any]] | None:
    """Call a module in a graph; return what is known of its result, and its tensors. None if it cannot be.

    Parameters
    ----------
    module : InGraph
    arguments : tuple of pytrees
        Of its call.
    options : dict
        The keyword arguments: tensors or None.
    known_of : callable
        ``known_of(number, call, forms, settings)``, which the compiler calls with constants and takes for a
        constant: the module's number, the arguments as by `opaque.encode`, for each tensor in them its shape
        without the rows, the name of its dtype and its device; and the settings.
    settings : tuple
        Constants that the form of the result depends on: a change of them makes another graph.
    """
    if not TELLS_EXPORT or torch.compiler.is_exporting():
        return None
    leaves: list[Tensor] = []
    call = opaque.encode(arguments, leaves)
    named = opaque.encode(options, leaves)
    if call is None or named is None or len(leaves) == 0:
        return None
    forms = tuple([(tuple(t.shape[1:]), str(t.dtype)[6:], str(t.device)) for t in leaves])
    known = known_of(module._number, call, forms, settings)
    if known is None:
        return None
    recorded = torch.is_grad_enabled()
    needs = [recorded and t.requires_grad for t in leaves]
    held, needs_held = [], []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        held.append(tensor)
        needs_held.append(recorded and tensor.requires_grad and not name.startswith(known[3]))
    form = f"({needs}, {needs_held}, {call}, {named})"
    autocast = opaque.autocast_setting(leaves[0].device.type)
    tensors = opaque.run(leaves, held, module._number, form, known[0], autocast)
    return known, list(tensors)[:-1]


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the compiler call a function with constants while it traces, and take the result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uses_foreign_tensors(module: nn.Module, functions: Iterable[tuple[str, Any]]) -> bool:
    """Whether a plain function among `functions` reads a tensor with a gradient that `module` does not hold.

    Its gradient would have to leave the graph.
    """
    plain = [(role, function) for role, function in functions if is_function(function)]
    if not plain:
        return False
    held = {id(p) for p in module.parameters()}
    walk = walked(plain)
    tensors = [entry.value for entry in walk.entries if isinstance(entry.value, Tensor)]
    tensors += [p for inner in walk.modules.values() for p in inner.parameters()]
    return any(t.requires_grad and id(t) not in held for t in tensors)
