"""Calls of a user's functions that leave no trace: what the calls change is put back afterwards."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._reads import MISSING, Entry, Walk, read, write
from adaptcomp_ext.ops._backend import capturing
from adaptcomp_ext.ops._plain import has_values

_LARGEST_COPY = 2**22  # elements of a tensor outside a module's buffers that is copied beforehand
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def undisturbed(walk: Walk, device: torch.device) -> Iterator[None]:
    """Undo, at the end, what calls of the functions in `walk` change within a ``with`` statement.

    Put back are: random states of torch on the CPU and on `device`, of Python and of NumPy, and of generators
    that the functions hold; buffers and other tensors that are not parameters; attributes; variables; the
    contents of short lists, dicts, sets and deques. Within the statement, modules run without their hooks,
    compiled functions run as they were written, ``torch.autograd.graph.saved_tensors_hooks`` of the caller
    see nothing, and gradients are recorded, in inference mode too.

    What the walk does not reach is not put back: files, iterators, objects of other libraries. Two threads
    must not be in such a statement at once, since one would take the other's state for the user's.
    """
    with contextlib.ExitStack() as stack:
        for restore in _random_states(walk, device):
            stack.callback(restore)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for context in _eager(device):
            stack.enter_context(context)
        stack.callback(_put_back, *_kept(walk))
        _replace_tensors(walk)
        for module in walk.modules.values():
            _without_hooks(module)
        yield


def _kept(walk: Walk) -> tuple[list[tuple[Any, Any]], list[Entry], list[tuple[type, str, Any]]]:
    """Return what `_put_back` takes: containers with copies, variables, and attributes of classes."""
    containers = [(container, container.copy()) for container in walk.containers]
    known = {id(container) for container in walk.containers}
    variables = [entry for entry in walk.entries if id(entry.container) not in known]
    shared = [
        (cls, key, value)
        for cls in walk.classes
        for key, value in vars(cls).items()
        if isinstance(value, (int, float)) or value is None
    ]
    return containers, variables, shared


def _put_back(
    containers: Sequence[tuple[Any, Any]],
    variables: Sequence[Entry],
    shared: Sequence[tuple[type, str, Any]],
) -> None:
    # Only what has changed is written, so that threads that use the same objects notice little.
    for container, copy in containers:
        if isinstance(container, dict):
            for key in [key for key in container if key not in copy]:
                del container[key]
            for key, value in copy.items():
                if container.get(key, MISSING) is not value:
                    container[key] = value
        elif isinstance(container, list):
            if len(container) != len(copy) or any(a is not b for a, b in zip(container, copy, strict=True)):
                container[:] = copy
        elif container != copy:
            container.clear()
            container.extend(copy) if isinstance(container, deque) else container.update(copy)
    for entry in variables:
        if read(entry) is not entry.value:
            write(entry.container, entry.key, entry.value)
    for cls, key, value in shared:
        if vars(cls).get(key, MISSING) is not value:
            setattr(cls, key, value)


def _replace_tensors(walk: Walk) -> None:
    """Put copies in the places of tensors to which the functions may write; the tensors are put back.

    Only so the tensors themselves are never written to: one that is written to while gradients are recorded
    has a graph afterwards.
    """
    buffers = {id(t) for module in walk.modules.values() for t in module._buffers.values() if t is not None}
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for container, key, value, _ in walk.entries:
            if (
                isinstance(value, Tensor)
                and not isinstance(value, nn.Parameter)
                and not value.requires_grad
                and has_values(value)
                and (value.numel() <= _LARGEST_COPY or id(value) in buffers)
            ):
                if id(value) not in copies:
                    copies[id(value)] = value.detach().clone()
                write(container, key, copies[id(value)])


def _without_hooks(module: nn.Module) -> None:
    """Take the hooks off a module. They are among its attributes, which are put back."""
    for name in _HOOKS:
        if module.__dict__.get(name):
            module.__dict__[name] = OrderedDict()


def _random_states(walk: Walk, device: torch.device) -> list[Callable[[], object]]:
    """Return functions that set the random states that are now."""
    states = [
        _setter(torch.set_rng_state, torch.get_rng_state()),
        _setter(random.setstate, random.getstate()),
    ]
    if device.type == "cuda" and not capturing():
        states.append(_setter(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append(_setter(numpy.random.set_state, numpy.random.get_state()))
    states += [_setter(generator.set_state, generator.get_state()) for generator in walk.generators]
    return states


def _setter(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _eager(device: torch.device) -> list[contextlib.AbstractContextManager[Any]]:
    """Return the contexts in which calls are not compiled, recorded or cached."""
    contexts: list[contextlib.AbstractContextManager[Any]] = [_autocast_cache_off()]
    if getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)():
        # The hooks of a checkpoint count the tensors that are saved.
        contexts.append(torch.autograd.graph.saved_tensors_hooks(_same, _same))
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is not None and "torch._dynamo" in sys.modules:
        contexts.append(stance("force_eager"))
    if device.type == "cuda":
        contexts.append(_may_wait())
    return contexts


def _same(value: Any) -> Any:
    return value


@contextlib.contextmanager
def _autocast_cache_off() -> Iterator[None]:
    """Make autocast cast each weight anew: one that inference would not have cached would be read later."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextlib.contextmanager
def _may_wait() -> Iterator[None]:
    """Let the host wait for the device, which ``torch.cuda.set_sync_debug_mode`` may forbid."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
