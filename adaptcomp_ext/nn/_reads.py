"""The values that a user's function can read.

They are the parameters, buffers and attributes of its modules, the variables of its functions, and the
entries of small containers.
"""

from __future__ import annotations

import dis
import enum
import functools
import io
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

MISSING = object()
"""The value of an entry that does not exist."""

_MAX_ENTRIES = 4096  # so that a function that refers to half of a program has a bounded cost
_MAX_ELEMENTS = 64  # the elements of a longer list or dict are not followed
_MAX_DEPTH = 4  # of nested containers and objects

_LIBRARIES = ("builtins", "torch", "numpy")  # nothing is looked for in their objects
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


class Entry(NamedTuple):
    """A value at its place: an item of a dict or list, or the content of a cell, whose key is None."""

    container: Any
    key: Any
    value: Any
    path: str
    """The name of the place, for messages."""


def read(entry: Entry) -> Any:
    """Return the value that is at the place of an entry now."""
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
    """Put a value at a place; MISSING removes the entry."""
    if isinstance(container, types.CellType):
        container.cell_contents = value
    elif value is MISSING:
        container.pop(key, None) if isinstance(container, dict) else None
    elif isinstance(container, dict) or key < len(container):
        container[key] = value


def entries(
    function: Any, materialize: Callable[[], object] | None = None, name: str = "energy"
) -> list[Entry]:
    """Return the entries that `function` can read, as far as they are followed; paths begin with `name`.

    `materialize` gives the parameters of lazy modules their shapes. It is called first where there are such
    parameters: an evaluation that gave them shapes would seem to change the function and to draw
    random numbers.
    """
    walk = walked([(name, function)])
    if walk.lazy and materialize is not None:
        materialize()
        walk = walked([(name, function)])
    return walk.entries


def walked(functions: Iterable[tuple[str, Any]], methods: bool = False) -> Walk:
    """Walk through what `functions`, given with their names, can read.

    With `methods`, the variables that the ``forward`` of a module's class reads are among it, and those of
    the methods that ``forward`` names.
    """
    walk = Walk(methods)
    for name, function in functions:
        walk.add(function, name, 0)
    while walk.queue:
        visit, value, path, depth = walk.queue.popleft()
        visit(walk, value, path, depth)
    return walk


_Visit = Callable[["Walk", Any, str, int], None]


class Walk:
    """What was found on the way."""

    def __init__(self, methods: bool) -> None:
        self.methods = methods
        self.entries: list[Entry] = []
        self.modules: dict[str, nn.Module] = {}
        """By path; each module once."""
        self.containers: list[Any] = []
        """Dicts, lists, sets and deques, the attributes of modules and objects among them."""
        self.classes: list[type] = []
        self.generators: list[torch.Generator] = []
        self.lazy = False
        """Whether a parameter has no shape yet."""
        self.consumable = False
        """Whether there is an iterator, which a call may use up."""
        self.queue: deque[tuple[_Visit, Any, str, int]] = deque()
        self._visited: set[int] = set()

    def follow(self, container: Any, key: Any, value: Any, path: str, depth: int) -> None:
        """Add an entry, if a value of its type can be put back, and visit the value later."""
        kind = _kind(type(value))
        if kind is None:
            return
        restorable = kind in _KEPT and (kind is not _tuple or all(isinstance(v, _PLAIN) for v in value))
        if restorable and len(self.entries) < _MAX_ENTRIES:
            self.entries.append(Entry(container, key, value, path))
        if kind not in (_plain, _tensor):
            self.add(value, path, depth, kind)

    def add(self, value: Any, path: str, depth: int, kind: _Visit | None = None) -> None:
        """Visit a value later, unless it has been visited."""
        kind = _kind(type(value)) if kind is None else kind
        if (
            kind in (None, _plain, _tensor)
            or id(value) in self._visited
            or depth > _MAX_DEPTH
            or len(self.entries) >= _MAX_ENTRIES
        ):
            return
        self._visited.add(id(value))
        self.queue.append((kind, value, path, depth))


def _plain(walk: Walk, value: Any, path: str, depth: int) -> None: ...


def _tensor(walk: Walk, value: Any, path: str, depth: int) -> None: ...


def _uninitialized(walk: Walk, value: Any, path: str, depth: int) -> None:
    walk.lazy = True


def _iterator(walk: Walk, value: Any, path: str, depth: int) -> None:
    walk.consumable = True


def _generator(walk: Walk, value: torch.Generator, path: str, depth: int) -> None:
    walk.generators.append(value)


def _class(walk: Walk, value: type, path: str, depth: int) -> None:
    """Visit the attributes of a class: counters and lists that its instances share."""
    if not walk.methods or issubclass(value, enum.Enum) or value.__module__.partition(".")[0] in _LIBRARIES:
        return
    walk.classes.append(value)
    for key, item in vars(value).items():
        if isinstance(item, (dict, list, set, deque)):
            walk.add(item, f"{path}.{key}", depth + 1)


def _bag(walk: Walk, value: Any, path: str, depth: int) -> None:
    if len(value) <= _MAX_ELEMENTS:
        walk.containers.append(value)


def _module(walk: Walk, module: nn.Module, path: str, depth: int) -> None:
    own = module.__dict__
    walk.modules[path] = module
    walk.containers.append(own)
    for registry in _REGISTRIES:
        members = own.get(registry)
        if isinstance(members, dict):
            walk.containers.append(members)
            for name, member in members.items():
                if member is not None:
                    walk.follow(members, name, member, f"{path}.{name}", 0)
    for key, value in own.items():
        if key not in _INTERNAL:
            walk.follow(own, key, value, f"{path}.{key}", depth + 1)
    walk.add(type(module), path, depth)
    if walk.methods:
        forward = getattr(type(module), "forward", None)
        if isinstance(forward, types.FunctionType):
            walk.add(forward, path, depth)
            for name in forward.__code__.co_names:
                method = getattr(type(module), name, None)
                if isinstance(method, types.FunctionType):
                    walk.add(method, path, depth)


def _function(walk: Walk, function: types.FunctionType, path: str, depth: int) -> None:
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


def _method(walk: Walk, method: types.MethodType, path: str, depth: int) -> None:
    walk.add(method.__self__, path, depth)
    walk.add(method.__func__, path, depth)


def _partial(walk: Walk, partial: functools.partial[Any], path: str, depth: int) -> None:
    for value in (partial.func, *partial.args):
        walk.add(value, path, depth)
    _dict(walk, partial.keywords, path, depth)


def _dict(walk: Walk, items: dict[Any, Any], path: str, depth: int) -> None:
    if len(items) <= _MAX_ELEMENTS:
        walk.containers.append(items)
        for key, value in items.items():
            walk.follow(items, key, value, f"{path}[{key!r}]", depth + 1)


def _list(walk: Walk, items: list[Any], path: str, depth: int) -> None:
    if len(items) <= _MAX_ELEMENTS:
        walk.containers.append(items)
        for i, value in enumerate(items):
            walk.follow(items, i, value, f"{path}[{i}]", depth + 1)


def _tuple(walk: Walk, items: tuple[Any, ...], path: str, depth: int) -> None:
    if len(items) <= _MAX_ELEMENTS:
        for i, value in enumerate(items):
            walk.add(value, f"{path}[{i}]", depth + 1)


def _object(walk: Walk, value: Any, path: str, depth: int) -> None:
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and len(own) <= _MAX_ELEMENTS:
        walk.containers.append(own)
        for key, item in own.items():
            walk.follow(own, key, item, f"{path}.{key}", depth + 1)
    walk.add(type(value), path, depth)
    for of in type(value).__mro__:
        if isinstance(call := of.__dict__.get("__call__"), types.FunctionType):
            walk.add(call, path, depth)
            break


_KEPT = (_plain, _tensor, _module, _function, _method, _partial, _tuple)


def _find_kind(of: type) -> _Visit | None:
    """Return the function that visits values of a type; None for a type that is not followed."""
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
        (_bag, (set, deque)),
        (_generator, torch.Generator),
    ):
        if issubclass(of, types_):
            return kind
    if issubclass(of, type):
        return _class
    if issubclass(of, (types.ModuleType, io.IOBase)):
        return None
    if issubclass(of, Iterator):
        return _iterator
    if of.__module__.partition(".")[0] in _LIBRARIES:
        return None
    return _object


_kind: Callable[[Any], _Visit | None] = functools.lru_cache(1024)(_find_kind)


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of the globals that a function, or a function inside it, may read."""

    def all_names(code: types.CodeType) -> Iterator[str]:
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from all_names(constant)

    return tuple(dict.fromkeys(all_names(code)))
