"""The state of a function at a call, so that the backward pass evaluates the same function.

The backward pass of a descent evaluates the energy again, and that of an equilibrium the step. By then the
parameters may be others (`torch.func.functional_call` puts the module's own back), an attribute, a buffer or
the mode may have changed, and a variable that a function reads may stand for something else. `Snapshot`
therefore remembers, at the call, what the function can read: the parameters, buffers and plain attributes of
modules, the variables of functions, the entries of small lists and dicts. An evaluation in the backward pass
finds all of that in its place again. A change that cannot be followed, such as that of a variable of another
Python module, shows in its effect: the values differ from the recorded ones, or the graph reaches other
tensors, and the backward pass raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.nn._graph import edge, reached
from adaptcomp_ext.nn._reads import MISSING, Entry, entries, read, write

_LARGEST_COPY = 2**18  # elements of a tensor that is copied in case it is changed in place
_PLAIN, _CONSTANT = (
    -2,
    -1,
)  # places among the sources of an entry that is no tensor, and of a tensor that is no source
_lock = threading.RLock()  # held by evaluations that see another state than the live one


class Mark(NamedTuple):
    """The state that one evaluation found, as far as evaluations change it."""

    random: list[Tensor] | None
    """States of the random number generators; None: the function draws no random numbers."""
    values: list[tuple[Any, Any, Any]]
    """Container, key and value of each entry that evaluations change."""


class Snapshot:
    """The state of a function at a call, and the tensors from which its graph starts: its *sources*.

    Sources are parameters and other leaves, and tensors that were computed before the call and stand in a
    place that can be given another tensor. The first `placed` of them stand in such a place; the others are
    leaves in unknown places.

    Parameters
    ----------
    function : callable
    device : torch.device
        The device whose random numbers the function may draw, besides the CPU.
    evaluate : callable, optional
        Evaluates the function once, which gives lazy modules their shapes.
    name : str
        The function's name in messages.
    """

    def __init__(
        self,
        function: Any,
        device: torch.device,
        evaluate: Callable[[], object] | None = None,
        name: str = "energy",
    ) -> None:
        self._name = name
        self._device = device
        self._state = entries(function, evaluate, name)
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
        self.changing = False
        """Whether evaluations change the state that they see: random numbers, buffers, counters."""
        self.marks: list[Mark] = []
        """One for each evaluation; empty where evaluations change nothing."""

    # --- the call ---
    def find_sources(self, values: Sequence[Tensor], but: Sequence[Tensor]) -> list[Tensor]:
        """Find the sources of the first evaluation, which returned `values`, and what it has changed.

        Parameters
        ----------
        values : sequence of Tensor
        but : sequence of Tensor
            The tensors that the function was given. Neither they nor anything behind them is a source.
        """
        tensors = [e.value for e in self._state if isinstance(e.value, Tensor)]
        computed = {edge(t): t for t in tensors if t.grad_fn is not None}
        sources = reached(values, but, computed)
        places = {id(t) for t in tensors}
        self.sources = [t for t in sources if id(t) in places]
        self.placed = len(self.sources)
        self.sources += [t for t in sources if id(t) not in places]
        at = {id(t): i for i, t in enumerate(self.sources)}
        if computed:
            # A computed tensor that the function does not use is let go: an earlier result, for instance,
            # with all its graph.
            self._state = [e for e in self._state if not _computed(e.value) or id(e.value) in at]
            kept = {id(e.value) for e in self._state}
            self._versions = {key: version for key, version in self._versions.items() if key in kept}
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
        self.changing = self._random is not None or bool(self._tracked)
        if self.changing:
            before = [(e.container, e.key, self._copies.get(id(e.value), e.value)) for e in self._tracked]
            self.marks.append(Mark(self._random, before))

    def mark(self) -> None:
        """Remember what the next evaluation finds, if evaluations change it."""
        values = []
        for e in self._tracked:
            live = read(e)
            values.append((e.container, e.key, live.detach().clone() if isinstance(live, Tensor) else live))
        self.marks.append(Mark(_random_states(self._device) if self.random else None, values))

    @property
    def random(self) -> bool:
        """Whether the function draws random numbers."""
        return self._random is not None

    # --- the backward pass ---
    def copied(self) -> int:
        """Return how many sources an evaluation is given copies of: all placed ones, or none.

        Copies are needed where the live state is another one; where a source was computed from others, whose
        graph would be walked once more with every step; where a source has hooks, which belong to its whole
        gradient and not to every step's part of it; and where a source has been frozen since.
        """
        hooked = [t for t in self.sources if t._backward_hooks]
        if any(id(t) == id(h) for h in hooked for t in self.sources[self.placed :]):
            raise RuntimeError(
                f"{self._name}: expected tensors with hooks to be parameters of a module, or variables of "
                "the function, where the backward pass can replace them; got a hook on a leaf that the "
                f"{self._name} reaches in another way"
            )
        if (
            hooked
            or any(t.grad_fn is not None or not t.requires_grad for t in self.sources[: self.placed])
            or self._tracked
            or self._differences(self.sources, None)
        ):
            return self.placed
        return 0

    @contextlib.contextmanager
    def restored(self, sources: Sequence[Tensor | None], evaluation: int | None = None) -> Iterator[None]:
        """Give the function the state of the call, or of an evaluation, within a ``with`` statement.

        Parameters
        ----------
        sources : sequence of Tensor or None
            They stand in the places of the function's own sources.
        evaluation : int, optional
            The number of the evaluation whose state the function sees. Default: the state of the call.
        """
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
        """Return container, key and value of each entry whose live value is another one."""
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
            # A copy, because an evaluation may write to its buffers.
            changes.append((container, key, value.clone() if isinstance(value, Tensor) else value))
        return changes

    def changed(self) -> str:
        """Return the end of an error message: the names of entries known to have changed since the call."""
        names = [e.path for e in self._state if read(e) is not e.value and not _same(read(e), e.value)]
        names += [
            f"{e.path} (in place)" for e, version in self._versions.values() if e.value._version != version
        ]
        names = list(dict.fromkeys(names))
        return f"; known to have changed since the call: {', '.join(names[:8])}" if names else ""

    def check_sources(
        self, value: Tensor, but: Sequence[Tensor], given: Sequence[Tensor | None], partial: bool
    ) -> None:
        """Raise unless the graph of an evaluation starts from the tensors `given` for the sources.

        With `partial`, only some of the rows were evaluated, and the graph may start from fewer tensors.
        """
        found = reached([value], but, {edge(t): t for t in given if t is not None and _computed(t)})
        expected = [t for t in given if t is not None and t.requires_grad]
        if {id(t) for t in found} == {id(t) for t in expected}:
            return
        # What `saved_tensors_hooks` has stored comes back as another tensor at the same place of the graph.
        now, then = ({edge(t) for t in tensors} for tensors in (found, expected))
        if now == then or (partial and (now <= then or then <= now)):
            return
        raise RuntimeError(
            f"{self._name}: expected the backward pass to find the tensors that the call had found, got "
            f"others; the gradient of those of the call would be lost. Keep what the {self._name} reads "
            "until the backward pass has run" + self.changed()
        )

    def other_values(self, values: str) -> RuntimeError:
        """Make the error for a function that returns other `values`, in words, than at the call."""
        return RuntimeError(
            f"{self._name}: expected the same {values} in the backward pass, which evaluates it again, as at "
            f"the call, got others. What the {self._name} reads has changed, or it draws random numbers that "
            "torch does not know of" + self.changed()
        )


def _computed(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _same(a: Any, b: Any) -> bool:
    """Whether two plain values are equal; tensors and modules equal only themselves."""
    if a is b:
        return True
    if a is MISSING or b is MISSING or type(a) is not type(b) or isinstance(a, (Tensor, torch.nn.Module)):
        return False
    try:
        return bool(a == b)
    except Exception:  # raised by a class that the package does not know
        return False


def _random_states(device: torch.device) -> list[Tensor] | None:
    """Return the states of torch's generators; None while a CUDA graph is captured, which has its own."""
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
