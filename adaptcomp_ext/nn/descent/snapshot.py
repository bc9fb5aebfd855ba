"""What an energy's evaluations saw, so that the backward pass evaluates the same energy.

The backward pass of a descent evaluates the energy again. By then its parameters may be others
(`torch.func.functional_call` puts the module's own back), an attribute, a buffer or the mode may have
changed, and a variable that a function reads may stand for something else. `Seen` therefore remembers, at the
call, what the energy can read: the parameters, buffers and plain attributes of modules, the variables of
functions, the entries of small lists and dicts. An evaluation in the backward pass finds all that in its
place again. What cannot be followed, such as a variable of another Python module, is found out by its effect:
the energies then are not the ones recorded, or the graph reaches other tensors, and the backward pass raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent.reads import MISSING, Entry, entries, read, write

_LARGEST_COPY = 2**18  # elements of a tensor that is copied in case it is changed in place
_PLAIN, _CONSTANT = (
    -2,
    -1,
)  # instead of its position among the sources: no tensor; a tensor that is none of them
_lock = threading.RLock()  # of the evaluations that see something else than the live state


class Mark(NamedTuple):
    """What an evaluation found that an earlier one had changed."""

    rows: int
    random: list[Tensor] | None
    """States of the generators; None: the energy draws no random numbers."""
    values: list[tuple[Any, Any, Any]]
    """Container, key and value."""


class Seen:
    """The state of an energy at a call, and the tensors that its graph starts from: its *sources*.

    Sources are parameters and other leaves, and tensors that were computed before the call, where they are
    found in a place that can be given another tensor. `placed` of them come first; the others are leaves in
    places unknown.
    """

    def __init__(
        self, energy: Any, device: torch.device, evaluate: Callable[[], object] | None = None
    ) -> None:
        self._device = device
        self._state = entries(energy, evaluate)
        tensors = {id(e.value): e for e in self._state if isinstance(e.value, Tensor)}
        self._versions = {
            key: (e, e.value._version) for key, e in tensors.items() if not e.value.is_inference()
        }
        self._constant = {key for key, e in tensors.items() if not e.value.requires_grad}
        with torch.no_grad():
            self._copies = {
                key: t.detach().clone()
                for key in self._constant & self._versions.keys()
                if (t := tensors[key].value).numel() <= _LARGEST_COPY
                and not isinstance(t, torch.nn.Parameter)
            }
        self._random: list[Tensor] | None = _random_states(device)
        self._tracked: list[Entry] = []
        self.sources: list[Tensor] = []
        self.placed = 0
        self.marks: list[Mark] = []
        """Of each evaluation; empty where none changed anything."""
        self._rows = 0

    # --- the descent ---
    def before(self, evaluation: int, rows: int) -> None:
        """Before an evaluation of so many rows, counted from 0."""
        if evaluation == 0:
            self._rows = rows
        elif self.changing:
            values = []
            for e in self._tracked:
                live = read(e)
                values.append(
                    (e.container, e.key, live.detach().clone() if isinstance(live, Tensor) else live)
                )
            self.marks.append(Mark(rows, _random_states(self._device) if self.random else None, values))

    def first(self, value: Tensor, but: Sequence[Tensor]) -> list[Tensor]:
        """After the first evaluation, which returned `value`: its sources, without `but` and what is behind them."""
        tensors = [e.value for e in self._state if isinstance(e.value, Tensor)]
        computed = {_edge(t): t for t in tensors if t.grad_fn is not None}
        found = reached(value, but, computed)
        places = {id(t) for t in tensors}
        self.sources = [t for t in found if id(t) in places]
        self.placed = len(self.sources)
        self.sources += [t for t in found if id(t) not in places]
        at = {id(t): i for i, t in enumerate(self.sources)}
        if computed:
            # A computed tensor that the energy does not use is let go: an earlier result, for instance, with
            # all its graph.
            self._state = [e for e in self._state if not _computed(e.value) or id(e.value) in at]
            kept = {id(e.value) for e in self._state}
            self._versions = {key: found for key, found in self._versions.items() if key in kept}
        self._at = [
            at.get(id(e.value), _CONSTANT) if isinstance(e.value, Tensor) else _PLAIN for e in self._state
        ]
        self._look_for_changes()
        return self.sources

    def _look_for_changes(self) -> None:
        states = _random_states(self._device)
        if (
            self._random is None
            or states is None
            or all(torch.equal(a, b) for a, b in zip(self._random, states, strict=True))
        ):
            self._random = None
        for e, at in zip(self._state, self._at, strict=True):
            if at == _PLAIN:
                if (live := read(e)) is not e.value and not _same(live, e.value):
                    self._tracked.append(e)
            elif id(e.value) in self._copies and self._versions[id(e.value)][1] != e.value._version:
                self._tracked.append(e)
        if self.changing:
            before = [(e.container, e.key, self._copies.get(id(e.value), e.value)) for e in self._tracked]
            self.marks.append(Mark(self._rows, self._random, before))

    @property
    def changing(self) -> bool:
        """Whether the energy's evaluations change what they see: random numbers, buffers, counters."""
        return self._random is not None or bool(self._tracked)

    @property
    def random(self) -> bool:
        """Whether the energy draws random numbers."""
        return self._random is not None

    # --- the backward pass ---
    def apart(self) -> bool:
        """Whether an evaluation has to be given copies of the placed sources.

        Where the live state is another one; where a source was computed from others, whose graph would be
        walked once more with every step; where a source has hooks, which belong to its whole gradient and not
        to every step's part of it; and where it has been frozen since.
        """
        hooked = [t for t in self.sources if t._backward_hooks]
        if any(id(t) == id(h) for h in hooked for t in self.sources[self.placed :]):
            raise RuntimeError(
                "energy: expected tensors with hooks to be parameters of a module, or variables of the function, where the "
                "backward pass can replace them; got a hook on a leaf that the energy reaches in another way"
            )
        if hooked or any(t.grad_fn is not None or not t.requires_grad for t in self.sources[: self.placed]):
            return True
        return bool(self._tracked or self._differences(self.sources, None))

    @contextlib.contextmanager
    def again(self, sources: Sequence[Tensor | None], evaluation: int | None = None) -> Iterator[None]:
        """Where the energy sees what it saw at the call, or at an evaluation, with `sources` in the places of its own."""
        mark = self.marks[evaluation] if evaluation is not None and self.marks else None
        changes = self._differences(sources, mark)
        if not changes and (mark is None or mark.random is None):
            yield
            return
        with _lock, contextlib.ExitStack() as stack:
            if mark is not None and mark.random is not None:
                stack.callback(_set_random_states, self._device, _random_states(self._device))
                _set_random_states(self._device, mark.random)
            for container, key, value in changes:
                stack.callback(write, container, key, read(Entry(container, key, None, "")))
                write(container, key, value)
            yield

    def _differences(self, sources: Sequence[Tensor | None], mark: Mark | None) -> list[tuple[Any, Any, Any]]:
        """Container, key and value of all that is another than it was."""
        changes = []
        for e, at in zip(self._state, self._at, strict=True):
            value = e.value
            if at >= 0:
                value = sources[at]
            elif at == _PLAIN:
                pass
            elif id(value) in self._copies and self._versions[id(value)][1] != value._version:
                value = self._copies[id(value)]
            elif id(value) in self._constant and value.requires_grad:
                value = value.detach()
            live = read(e)
            if live is not value and not _same(live, value):
                changes.append((e.container, e.key, value))
        for container, key, value in mark.values if mark is not None else ():
            # An evaluation may write to its buffers.
            changes.append((container, key, value.clone() if isinstance(value, Tensor) else value))
        return changes

    def changed(self) -> str:
        """The names of what is known to be another now than at the call; for a message."""
        names = [e.path for e in self._state if read(e) is not e.value and not _same(read(e), e.value)]
        names += [
            f"{e.path} (in place)" for e, version in self._versions.values() if e.value._version != version
        ]
        names = list(dict.fromkeys(names))
        return f"; known to have changed since the call: {', '.join(names[:8])}" if names else ""

    def check_sources(
        self, value: Tensor, but: Sequence[Tensor], given: Sequence[Tensor | None], partial: bool
    ) -> None:
        """Raise unless the graph of an evaluation starts from the tensors `given` for the sources. `partial`: of some rows."""
        found = reached(value, but, {_edge(t): t for t in given if t is not None and _computed(t)})
        expected = [t for t in given if t is not None and t.requires_grad]
        if {id(t) for t in found} == {id(t) for t in expected}:
            return
        # What `saved_tensors_hooks` has stored comes back as another tensor at the same place of the graph.
        now, then = ({_edge(t) for t in tensors} for tensors in (found, expected))
        if now == then or (partial and (now <= then or then <= now)):
            return
        raise RuntimeError(
            "energy: expected the backward pass to find the tensors that the call had found, got others; the gradient of those "
            f"of the call would be lost. Keep what the energy reads until the backward pass has run{self.changed()}"
        )

    def other_values(self) -> RuntimeError:
        """The error for an energy that returns others than it did at the call."""
        return RuntimeError(
            "energy: expected the same energies in the backward pass, which evaluates it again, as at the call, got others. What "
            f"the energy reads has changed, or it draws random numbers that torch does not know of{self.changed()}"
        )


def reached(value: Tensor, but: Sequence[Tensor], computed: dict[Any, Tensor] | None = None) -> list[Tensor]:
    """The leaves that the graph of `value` reaches, in the order of the walk, without those of `but` and what is behind them.

    Of `computed`, tensors by their edges, the tensors themselves instead of what is behind them.
    """
    own = {id(t) for t in but if t.is_leaf}
    seen = {t.grad_fn for t in but if t.grad_fn is not None}
    leaves: dict[int, Tensor] = {}
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        edges = node.next_functions
        if not edges:  # a leaf's node, or that of a function without inputs
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in own:
                leaves.setdefault(id(leaf), leaf)
        if not computed:
            stack.extend([following for following, _ in edges])
            continue
        for edge in edges:
            tensor = computed.get(edge)
            if tensor is None:
                stack.append(edge[0])
            else:
                leaves.setdefault(id(tensor), tensor)
    return list(leaves.values())


def _computed(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Where gradients of a tensor arrive: a node of the graph, and which of its outputs."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch.enable_grad():
        view = tensor.view_as(tensor)
    assert view.grad_fn is not None
    edge: tuple[Any, int] = view.grad_fn.next_functions[0]
    return edge


def _same(a: Any, b: Any) -> bool:
    """Whether two plain values are equal; of tensors and modules only the same one is."""
    if a is b:
        return True
    if a is MISSING or b is MISSING or type(a) is not type(b) or isinstance(a, (Tensor, torch.nn.Module)):
        return False
    try:
        return bool(a == b)
    except Exception:  # of a class that the package does not know
        return False


def _random_states(device: torch.device) -> list[Tensor] | None:
    """Of torch's generators; None while a CUDA graph is captured, which has its own."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_states(device: torch.device, states: list[Tensor] | None) -> None:
    if states is None:
        return
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
