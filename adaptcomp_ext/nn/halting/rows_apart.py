"""The check that no row's result depends on another row: `AdaptiveHalt`'s ``check_rows``.

Halted rows leave the block, so that a step that mixes rows gives every row other results as soon as its
neighbours halt. The check calls step, readout and head once more, on up to four rows, and takes the gradient
of one row's result. It works on copies of the rows, with a graph of its own, and puts back what the calls
change: see `adaptcomp_ext.nn._undisturbed`. The graph of the user's own first step cannot serve: inference
has none, and to record one would let torch choose other kernels, with other bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaptcomp_ext.nn._mixing import mixed_row
from adaptcomp_ext.nn._reads import Walk, walked
from adaptcomp_ext.nn._tree import flatten, flatten_like, unflatten
from adaptcomp_ext.nn._undisturbed import undisturbed
from adaptcomp_ext.nn.halting.batch_statistics import ADVICE
from adaptcomp_ext.nn.halting.calling import form_of
from adaptcomp_ext.ops._backend import capturing, on_cuda
from adaptcomp_ext.ops._plain import has_dispatch, has_values
from adaptcomp_ext.ops._transforms import is_plain_call

_ROWS = 4  # a row in the middle with neighbours on both sides; an even number, for steps that pair rows
_SPREAD = 0.1  # standard deviation of the noise on tensors whose rows are all equal
_SEED = 0xA9A7
_PATIENCE = 1.0  # seconds that a check waits for the one of another thread
_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the user's functions."""

    role: str
    """The argument: "step", "readout" or "head"."""
    function: Any
    prefix: str
    """In front of the names of its submodules."""
    n: int = 1
    """The step at which it is called."""
    repeated: bool = False
    """Whether a part before it has the same function: it is called for what follows it alone."""

    def arguments(self, state: Any, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, int]]:
        """Return what it is called with."""
        form = form_of(self.function)
        given = inputs if self.role == "step" or form.inputs else ()
        return (state, *given), {"n": self.n} if form.has_n(len(given)) else {}


class _MixedRows(Exception):
    """A part mixes rows."""

    def __init__(self, part: _Part, row: int, where: str) -> None:
        self.part, self.row, self.where = part, row, where


def can_check(device: torch.device) -> bool:
    """Whether a backward pass may run now: nothing is traced, transformed, counted or captured."""
    return is_plain_call() and not (on_cuda(device) and capturing())


def check(step: Any, readout: Any, heads: Sequence[Any], state: Any, inputs: tuple[Any, ...]) -> bool:
    """Raise ValueError if a row of a step's, the readout's or the head's result depends on another row.

    Parameters
    ----------
    step, readout : callable
        The user's functions; of a ModuleList every module is checked. `readout` may be None.
    heads : sequence of callable
        Those of the policies.
    state, inputs : pytree of Tensor
        Those of the call, with at least two rows.

    Returns
    -------
    bool
        False if the check has to wait, because a lazy module has no parameters yet, or for the check of
        another thread. True where a part cannot be checked, too: it is not differentiable, communicates
        between processes, would use up an iterator, or raises on these rows.
    """
    parts = _parts(step, readout, heads)
    walk = walked([(part.prefix or part.role, part.function) for part in parts], methods=True)
    if walk.lazy:
        return False
    if walk.consumable or any(_communicates(module) for module in walk.modules.values()):
        return True
    first = next(leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))
    if not _lock.acquire(timeout=_PATIENCE):
        return False  # this may be a thread for which the check in another one waits
    try:
        with undisturbed(walk, first.device):
            for rows, spread in _attempts((state, inputs), first.shape[0]):
                try:
                    if _is_conclusive(parts, rows, spread, state, inputs, walk):
                        break
                except _MixedRows:
                    raise
                except Exception:  # the user's function, on rows that it did not expect: the run will tell
                    continue
    except _MixedRows as mixed:
        raise _error(mixed) from None
    finally:
        _lock.release()
    return True


def _parts(step: Any, readout: Any, heads: Sequence[Any]) -> list[_Part]:
    """Return the parts in the order of their calls; what all steps share comes after the last stage."""
    roles = [("readout", readout)] if readout is not None else []
    roles += [("head", head) for head in heads]
    listed = [
        len(function) for _, function in [("step", step), *roles] if isinstance(function, nn.ModuleList)
    ]
    parts: list[_Part] = []
    seen: set[int] = set()

    def add(role: str, function: Any, n: int) -> None:
        of_list = isinstance(function, nn.ModuleList)
        if of_list and n > len(function):
            return
        each = function[n - 1] if of_list else function
        repeated = id(each) in seen
        seen.add(id(each))
        if not repeated or role == "step":
            parts.append(_Part(role, each, str(n - 1) if of_list else "", n, repeated))

    for n in range(1, max(listed, default=1) + 1):
        if n == 1 or isinstance(step, nn.ModuleList):
            add("step", step, n)
        for role, function in roles:
            if isinstance(function, nn.ModuleList):
                add(role, function, n)
    for role, function in roles:
        if not isinstance(function, nn.ModuleList):
            add(role, function, 1)
    return parts


def _communicates(module: nn.Module) -> bool:
    """Whether calls have to be made by all processes together."""
    return any(
        base.__module__.startswith(("torch.distributed", "torch.nn.parallel"))
        for base in type(module).__mro__
    ) or any(has_dispatch(parameter) for parameter in module._parameters.values() if parameter is not None)


def _attempts(trees: Any, batch: int) -> Iterator[tuple[int, float]]:
    """Yield numbers of rows, and the noise on equal rows.

    Where rows are equal, as in a state of zeros, derivatives may be zero by coincidence: of
    ``state * state.mean(0)``, for instance. A function that does not take such rows gets the rows as they
    are, and one that needs a certain number of rows gets all.
    """
    rows = min(batch, _ROWS)
    if any(_is_constant(leaf[:rows]) for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)):
        yield rows, _SPREAD
    yield rows, 0.0
    if batch > rows:
        yield batch, 0.0


def _is_constant(rows: Tensor) -> bool:
    return rows.is_floating_point() and bool((rows == rows[:1]).all())


def _is_conclusive(
    parts: Sequence[_Part], rows: int, spread: float, state: Any, inputs: tuple[Any, ...], walk: Walk
) -> bool:
    """Run all parts on copies of the first rows; whether no noise has made a result infinite.

    Raises _MixedRows if a part mixes them, and whatever the user's functions raise.
    """
    random = torch.Generator().manual_seed(_SEED)

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = leaf[:rows].detach().clone()
        if spread and _is_constant(copy):
            copy += spread * torch.randn(copy.shape, generator=random).to(copy)
        return copy

    state, inputs = pytree.tree_map(copied, (state, inputs))
    finite = True
    for part in parts:
        arguments, options = part.arguments(state, inputs)
        given, result = _call(part.function, arguments, options)
        results = _differentiable(result)
        if any(t.shape[:1] != (rows,) for t in results):
            raise ValueError("another number of rows")
        if not all(has_values(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)):
            raise ValueError("nothing to read")
        finite = finite and all(bool(t.isfinite().all()) for t in results)
        row = None if part.repeated else mixed_row(results, given)
        if row is not None:
            raise _MixedRows(part, row, _submodule(part, arguments, options, rows, walk))
        if part.role == "step":
            leaves, structure = flatten_like(result, flatten(state)[1])
            state = unflatten([leaf.detach() for leaf in leaves], structure)
    return finite or spread == 0.0


def _call(function: Any, arguments: Any, options: dict[str, int]) -> tuple[list[Tensor], Any]:
    """Call a function on leaves of a new graph; return these and the result."""
    given: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.clone() if isinstance(value, Tensor) else value
        given.append(value.detach().requires_grad_())
        return given[-1].clone()  # the function may write to it

    arguments = pytree.tree_map(leaf, arguments)
    return given, function(*arguments, **options)


def _differentiable(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad]


@dataclass(slots=True)
class _Called:
    """A call of a submodule."""

    name: str
    given: list[Tensor]
    results: list[Tensor]


def _submodule(part: _Part, arguments: Any, options: dict[str, int], rows: int, walk: Walk) -> str:
    """Return name and class of the first submodule that mixes rows by itself; empty if there is none."""
    calls: list[_Called] = []
    names = {id(module): path for path, module in walk.modules.items()}
    if isinstance(part.function, nn.Module):
        names |= {id(m): f"{part.prefix}.{n}".strip(".") for n, m in part.function.named_modules()}
        names.pop(id(part.function))

    def record(module: nn.Module, given: Any, named: Any, result: Any) -> None:
        name = f"{names[id(module)]} ({type(module).__name__})"
        calls.append(_Called(name, _differentiable((given, named)), _differentiable(result)))

    inside = part.function.modules() if isinstance(part.function, nn.Module) else walk.modules.values()
    for module in inside:
        if id(module) in names:
            module.register_forward_hook(record, with_kwargs=True)  # taken off with the state put back
    given, _ = _call(part.function, arguments, options)

    def mixes(tensors: list[Tensor]) -> bool:
        # The rows may have moved to another dimension, as by ``unsqueeze(0)``.
        placed = [(t, tuple(t.shape).index(rows)) for t in tensors if rows in t.shape]
        return mixed_row([t for t, _ in placed], given, [dim for _, dim in placed]) is not None

    for call in calls:  # in the order in which they returned: the innermost first
        if mixes(call.results) and not mixes(call.given):
            return call.name
    return ""


def _error(mixed: _MixedRows) -> ValueError:
    role = mixed.part.role
    what = "state" if role == "step" else "result"
    where = f", through {mixed.where}" if mixed.where else ""
    stage = f"{role}[{mixed.part.prefix}]" if mixed.part.prefix else role
    return ValueError(
        f"{stage}: expected each row's {what} to depend on that row alone, because halted rows leave the "
        f"block; got one where row {mixed.row} depends on other rows{where}. {ADVICE}"
    )
