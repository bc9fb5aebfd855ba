"""Energies that torch.compile has made with AOTAutograd, which can be differentiated only once.

All backends but "eager" rely on AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

_NODE = "CompiledFunctionBackward"  # AOTAutograd's name for what it has compiled
_SIGN = "double backward"  # in the error that torch raises instead of a second derivative


def second_derivative_error() -> RuntimeError:
    """Make the error for an energy that cannot be differentiated twice."""
    return RuntimeError(
        "energy: expected one that torch can differentiate twice, for the gradient of the descent, got one "
        "that torch.compile has made with AOTAutograd, which it cannot: pass the energy uncompiled, compile "
        'it with backend="eager", or use gradient="detached", which needs no second derivative'
    )


def is_second_derivative_error(error: RuntimeError) -> bool:
    """Whether torch reports that it cannot differentiate a compiled function twice."""
    return _SIGN in str(error) and "torch.compile" in str(error)


def check_not_compiled(value: Tensor, given: Iterable[Tensor]) -> None:
    """Raise where the graph of energies has a compiled part, whose slope has no gradient.

    The tensors that the energy was `given` may have a compiled part behind them.
    """
    seen, stack = {t.grad_fn for t in given}, [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == _NODE:
            raise second_derivative_error()
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
