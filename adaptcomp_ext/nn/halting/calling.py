"""What step, head and readout are called with besides the state: the inputs, and the number of the step.

A step gets state and inputs, a head and a readout the state alone. A function that has a parameter ``n`` gets
the number of the step, and a head or readout that has parameters for the inputs gets these. A head or readout
that is an `nn.ModuleList` has a module of its own for each step. The loops know nothing of it: where it
applies, `bind` wraps the functions.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptcomp_ext.nn._naming import name_of

_WRAPPED = ("module", "_orig_mod")  # names of the module within a wrapper
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Form:
    """What a function takes besides what it always gets."""

    inputs: bool = False
    """Whether it has parameters for the inputs."""
    place: int | None = None
    """The number of positional parameters before its ``n``; 0 for a keyword-only one; None: it has none."""

    def has_n(self, inputs: int) -> bool:
        """Whether a call with state and `inputs` inputs passes ``n``, too."""
        return self.place is not None and (self.place == 0 or self.place > inputs)


PLAIN = Form()
_forms: weakref.WeakKeyDictionary[Any, Form] = weakref.WeakKeyDictionary()  # of the methods of classes


def form_of(function: Any) -> Form:
    """Return what a function takes, by its signature; nothing more for one that has no signature."""
    if not isinstance(function, nn.Module):
        return _read(function) or PLAIN
    if isinstance(function, torch.jit.ScriptModule):  # it has no signature
        return PLAIN
    method = type(function).forward
    form = None
    if "forward" in function.__dict__:
        form = _read(function.forward)
    elif method in _forms:
        return _forms[method]
    else:
        form = _read(method, bound=1)
        if form is not None:
            _forms[method] = form
    if form is None:
        # What DistributedDataParallel, torch.compile and their like have wrapped gets what they get.
        inner = next((function._modules[name] for name in _WRAPPED if name in function._modules), None)
        form = PLAIN if inner is None else form_of(inner)
    return form


def _read(function: Any, bound: int = 0) -> Form | None:
    """Read a signature, without its first `bound` parameters; None where no parameter has a name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):
        return PLAIN
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    if not positional:
        return None
    place = None
    if not (isinstance(function, functools.partial) and "n" in function.keywords):
        for i, parameter in enumerate(parameters[1:], 1):
            if parameter.name == "n" and parameter.kind is not parameter.POSITIONAL_ONLY:
                place = 0 if parameter.kind is parameter.KEYWORD_ONLY else i
    required = any(p.default is p.empty and p.name != "n" for p in positional[1:])
    return Form(required or any(p.kind is p.VAR_POSITIONAL for p in parameters), place)


def alternatives(role: str, function: Any) -> tuple[Any, ...]:
    """Return the modules of a ModuleList, which must not be empty, or the function itself."""
    if not isinstance(function, nn.ModuleList):
        return (function,)
    if len(function) == 0:
        raise ValueError(f"{role}: expected a ModuleList with at least one module, got an empty one")
    return tuple(function)


def check_length(role: str, function: Any, max_steps: int) -> None:
    """Require a module for each step of a ModuleList."""
    if isinstance(function, nn.ModuleList) and len(function) < max_steps:
        raise ValueError(
            f"{role}: expected a ModuleList with a module for each of {max_steps} steps, got one with "
            f"{len(function)}; a smaller max_steps needs fewer"
        )


def is_plain(function: Any) -> bool:
    """Whether a head or readout, or None, is one function of the state alone."""
    return function is None or (not isinstance(function, nn.ModuleList) and form_of(function) == PLAIN)


def call_at(role: str, function: Any, state: Any, inputs: tuple[Any, ...], n: Any) -> Any:
    """Call the head or readout of step n with what it takes."""
    if isinstance(function, nn.ModuleList):
        check_length(role, function, n)
        function = function[n - 1]
    form = form_of(function)
    given = inputs if form.inputs else ()
    return function(state, *given, n=n) if form.has_n(len(given)) else function(state, *given)


class Calls:
    """The functions of one run as the loops call them: a step on state and inputs, the others on the state.

    The step of each number leaves number and inputs for the head and the readout that follow it.
    """

    __slots__ = ("_inputs", "_n")

    def __init__(self) -> None:
        self._n = 0
        self._inputs: tuple[Any, ...] = ()

    def steps(self, steps: Iterable[Any], forms: Iterable[Form]) -> Iterator[Callable[..., Any]]:
        """Yield the step of each number."""
        for n, (step, form) in enumerate(zip(steps, forms, strict=False), 1):
            yield functools.partial(self._step, step, form, n)

    def _step(self, step: Any, form: Form, n: int, state: Any, *inputs: Any) -> Any:
        self._n, self._inputs = n, inputs
        return step(state, *inputs, n=n) if form.has_n(len(inputs)) else step(state, *inputs)

    def forget(self) -> None:
        """Let go of the last step's inputs."""
        self._inputs = ()

    def after(self, role: str, function: Any) -> Any:
        """Return a head or readout, or None, as a function of the state."""
        if is_plain(function):
            return function

        def read(state: Any) -> Any:
            return call_at(role, function, state, self._inputs, self._n)

        read.__qualname__ = name_of(function)
        return read


def bind(problem: Any, known: Any, fused: Any) -> Any:
    """Give each function of a run what it takes, and watch the results of readout and head.

    Parameters
    ----------
    problem : Problem
        Its steps and its readout are replaced.
    known : Known
        Of the functions. A head that has been exchanged for another one of the same kind is noted in it.
    fused : Fused or None
        The policy's decision in the kernel's terms.

    Returns
    -------
    Fused or None
        With the head as a function of the state. A policy that decides in Python calls its head by `call_at`.
    """
    step, readout = known.step, known.readout
    head = known.head if fused is None else fused.head
    has_head = fused is not None and head is not None
    listed = isinstance(step, nn.ModuleList)
    if not known.plain or listed or (has_head and head is not known.head):
        most = problem.run.max_steps
        for role, function in (("readout", readout), ("head", head)):
            check_length(role, function, most)
        forms = [form_of(each) for each in alternatives("step", step)]
        if not listed:
            forms *= most
        plain = is_plain(readout) and is_plain(head)
        if not plain or any(form.place is not None for form in forms):
            calls = Calls()
            problem.steps = calls.steps(problem.steps, forms)
            problem.readout = calls.after("readout", readout)
            if has_head:
                fused = fused._replace(head=calls.after("head", head))
        elif has_head and not listed:
            known.head, known.plain = head, True
    if problem.watch is not None:
        if problem.readout is not None:
            problem.readout = problem.watch.wrap("readout", problem.readout)
        if has_head:
            fused = fused._replace(head=problem.watch.wrap("head", fused.head))
    return fused
