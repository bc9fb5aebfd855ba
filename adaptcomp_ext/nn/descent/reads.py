"""What an energy can read: parameters, buffers and attributes of its modules, variables of its functions, small containers."""

from __future__ import annotations

import dis
import enum
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

MISSING = object()
"""What is read where there is nothing."""

_MOST = 4096  # entries, so that a function that refers to half of a program costs no more than that
_LARGEST = 64  # elements of a list or dict whose elements are followed
_DEPTH = 4  # of containers and objects in each other

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


class Entry(NamedTuple):
    """A value at its place: an item of a dict or list, or the content of a cell, whose key is None."""

    container: Any
    key: Any
    value: Any
    path: str
    """For messages."""


def read(entry: Entry) -> Any:
    """What is at the place of an entry now."""
    container, key = entry.container, entry.key
    if isinstance(container, dict):
        return container.get(key, MISSING)
    if isinstance(container, list):
        return container[key] if key < len(container) else MISSING
    try:
        return container.cell_contents
    except ValueError:
        return MISSING


def write(container: Any, key: Any, value: Any) -> None:
    """Put a value, or nothing, at a place."""
    if isinstance(container, types.CellType):
        container.cell_contents = value
    elif value is MISSING:
        container.pop(key, None) if isinstance(container, dict) else None
    elif isinstance(container, dict) or key < len(container):
        container[key] = value


def entries(energy: Any, materialize: Callable[[], object] | None = None) -> list[Entry]:
    """All that `energy` can read, as far as it is followed.

    Parameters of lazy modules are nothing before they have a shape. Where there are some, `materialize` gives
    them one first: an evaluation that did it would seem to change the energy, and to draw random numbers.
    """
    walk = _walked(energy)
    if walk.lazy and materialize is not None:
        materialize()
        walk = _walked(energy)
    return walk.entries


def _walked(energy: Any) -> _Walk:
    walk = _Walk()
    walk.add(energy, "energy", 0)
    while walk.queue:
        visit, value, path, depth = walk.queue.popleft()
        visit(walk, value, path, depth)
    return walk


_Visit = Callable[["_Walk", Any, str, int], None]


class _Walk:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.lazy = False
        self.queue: deque[tuple[_Visit, Any, str, int]] = deque()
        self._visited: set[int] = set()

    def follow(self, container: Any, key: Any, value: Any, path: str, depth: int) -> None:
        """An entry, if a value of its type can be put back, and what is behind it."""
        kind = _kind(type(value))
        if kind is None:
            return
        restorable = kind in _KEPT and (kind is not _tuple or all(isinstance(v, _PLAIN) for v in value))
        if restorable and len(self.entries) < _MOST:
            self.entries.append(Entry(container, key, value, path))
        if kind not in (_plain, _tensor):
            self.add(value, path, depth, kind)

    def add(self, value: Any, path: str, depth: int, kind: _Visit | None = None) -> None:
        """Visit a value later, unless that is done already."""
        kind = _kind(type(value)) if kind is None else kind
        if (
            kind in (None, _plain, _tensor)
            or id(value) in self._visited
            or depth > _DEPTH
            or len(self.entries) >= _MOST
        ):
            return
        self._visited.add(id(value))
        self.queue.append((kind, value, path, depth))


def _plain(walk: _Walk, value: Any, path: str, depth: int) -> None: ...


def _tensor(walk: _Walk, value: Any, path: str, depth: int) -> None: ...


def _uninitialized(walk: _Walk, value: Any, path: str, depth: int) -> None:
    walk.lazy = True


def _module(walk: _Walk, module: nn.Module, path: str, depth: int) -> None:
    own = module.__dict__
    for registry in _REGISTRIES:
        members = own.get(registry)
        if isinstance(members, dict):
            for name, member in members.items():
                if member is not None:
                    walk.follow(members, name, member, f"{path}.{name}", 0)
    for key, value in own.items():
        if key not in _INTERNAL:
            walk.follow(own, key, value, f"{path}.{key}", depth + 1)


def _function(walk: _Walk, function: types.FunctionType, path: str, depth: int) -> None:
    if (function.__module__ or "").partition(".")[0] in ("torch", "numpy"):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        value = read(Entry(cell, None, None, ""))
        if value is not MISSING:
            walk.follow(cell, None, value, name, depth)
    for name in _names(function.__code__):
        value = function.__globals__.get(name, MISSING)
        if value is not MISSING:
            walk.follow(function.__globals__, name, value, name, depth)
    for value in function.__defaults__ or ():
        walk.add(value, path, depth + 1)
    for own in (function.__kwdefaults__, function.__dict__):
        if own:
            _dict(walk, own, path, depth)


def _method(walk: _Walk, method: types.MethodType, path: str, depth: int) -> None:
    walk.add(method.__self__, path, depth)
    walk.add(method.__func__, path, depth)


def _partial(walk: _Walk, partial: functools.partial[Any], path: str, depth: int) -> None:
    for value in (partial.func, *partial.args):
        walk.add(value, path, depth)
    _dict(walk, partial.keywords, path, depth)


def _dict(walk: _Walk, items: dict[Any, Any], path: str, depth: int) -> None:
    if len(items) <= _LARGEST:
        for key, value in items.items():
            walk.follow(items, key, value, f"{path}[{key!r}]", depth + 1)


def _list(walk: _Walk, items: list[Any], path: str, depth: int) -> None:
    if len(items) <= _LARGEST:
        for i, value in enumerate(items):
            walk.follow(items, i, value, f"{path}[{i}]", depth + 1)


def _tuple(walk: _Walk, items: tuple[Any, ...], path: str, depth: int) -> None:
    if len(items) <= _LARGEST:
        for i, value in enumerate(items):
            walk.add(value, f"{path}[{i}]", depth + 1)


def _object(walk: _Walk, value: Any, path: str, depth: int) -> None:
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and len(own) <= _LARGEST:
        for key, item in own.items():
            walk.follow(own, key, item, f"{path}.{key}", depth + 1)
    for of in type(value).__mro__:
        if isinstance(call := of.__dict__.get("__call__"), types.FunctionType):
            walk.add(call, path, depth)
            break


_KEPT = (_plain, _tensor, _module, _function, _method, _partial, _tuple)


def _find_kind(of: type) -> _Visit | None:
    """How values of a type are visited; None: not at all."""
    for kind, types_ in (
        (_uninitialized, (UninitializedParameter, UninitializedBuffer)),
        (_tensor, Tensor),
        (_module, nn.Module),
        (_plain, _PLAIN),
        (_function, types.FunctionType),
        (_method, types.MethodType),
        (_partial, functools.partial),
        (_dict, dict),
        (_list, list),
        (_tuple, tuple),
    ):
        if issubclass(of, types_):
            return kind
    if issubclass(of, (type, types.ModuleType)) or of.__module__.partition(".")[0] in (
        "builtins",
        "torch",
        "numpy",
    ):
        return None
    return _object


_kind: Callable[[Any], _Visit | None] = functools.lru_cache(1024)(_find_kind)


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a function may read, those of functions in it included."""

    def all_names(code: types.CodeType) -> Iterator[str]:
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from all_names(constant)

    return tuple(dict.fromkeys(all_names(code)))
