"""A module's run as one operator in a graph of torch.compile, opaque to the compiler.

The compiler sees tensors in and tensors out, of known sizes. When the graph runs, the operator runs the
module as it is. With gradients it keeps the autograd graph of the run until the backward pass, which is
another operator. That graph belongs to a token, a tensor among the results that the compiled graph saves for
its backward pass: when nothing holds the token's memory any more, the autograd graph goes, too.

torch's own `leaf_function` does the same for the backends "eager" and "aot_eager" (torch 2.13), but not for
inductor.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.ops._library import define_differentiable


class Field(NamedTuple):
    """A tensor of a result, as the compiler needs to know it.

    Attributes
    ----------
    shape : tuple of int
        Of a row.
    dtype : str
        The name of the dtype, such as "float32".
    rows : bool
        Whether it has one row for each row of the batch; otherwise a number that the data decide.
    """

    shape: tuple[int, ...]
    dtype: str
    rows: bool = True


class _Kept(NamedTuple):
    """The autograd graph of a run."""

    results: list[Tensor]
    sources: list[Tensor]  # the tensors whose gradients are asked for, in the order of the operator's


class _Token(bytearray):
    """The memory of a token; unlike a bytearray it can be referred to weakly."""


_numbers = itertools.count(1)
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_kept: dict[int, _Kept] = {}
_lock = threading.Lock()


def enroll(module: nn.Module) -> int:
    """Return a number by which graphs call a module; a copy of the module needs one of its own."""
    with _lock:
        number = next(_numbers)
        _modules[number] = module
    return number


def enrolled(number: int) -> Any:
    """Return the module of a number."""
    module = _modules.get(number)
    if module is None:
        raise RuntimeError("the module of a compiled graph does not exist any more")
    return module


# --- trees as literals, which are constants of a graph ------------------------------------------------------
def encode(tree: Any, leaves: list[Tensor]) -> str | None:
    """Append the tensors of a tree to `leaves`, and return the tree as a literal with their numbers.

    None where it has something else than tensors, None, tuples, lists, and dictionaries with strings as keys.
    The compiler reads this function, too.
    """
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return str(len(leaves) - 1)
    if tree is None:
        return "None"
    if type(tree) is tuple or type(tree) is list:
        text = "(" if type(tree) is tuple else "["
        for value in tree:
            part = encode(value, leaves)
            if part is None:
                return None
            text += part + ","
        return text + (")" if type(tree) is tuple else "]")
    if type(tree) is dict:
        text = "{"
        for key, value in tree.items():
            part = encode(value, leaves)
            if part is None or not isinstance(key, str) or not key.isidentifier():
                return None
            text += "'" + key + "':" + part + ","
        return text + "}"
    return None


def decode(text: str, leaves: Sequence[Any]) -> Any:
    """Return the tree of a literal, with these leaves."""
    return fill(ast.literal_eval(text), leaves)


def fill(tree: Any, leaves: Sequence[Any]) -> Any:
    """Return a tree with leaves in place of their numbers."""
    if isinstance(tree, int):
        return leaves[tree]
    if isinstance(tree, (tuple, list)):
        return type(tree)(fill(value, leaves) for value in tree)
    if isinstance(tree, dict):
        return {key: fill(value, leaves) for key, value in tree.items()}
    return None


def rebuild(tree: Any, leaves: list[Any]) -> Any:
    """Return a tree of the form of `tree`, with leaves that are taken from the front of the list."""
    if isinstance(tree, Tensor):
        return leaves.pop(0)
    if type(tree) is tuple:
        return tuple([rebuild(value, leaves) for value in tree])
    if type(tree) is list:
        return [rebuild(value, leaves) for value in tree]
    if type(tree) is dict:
        return {key: rebuild(value, leaves) for key, value in tree.items()}
    return None


# --- the operators ------------------------------------------------------------------------------------------
_AUTOGRAD = (
    "ADInplaceOrView",
    "AutogradCPU",
    "AutogradCUDA",
    "AutogradFunctionality",
    "AutogradNestedTensor",
    "AutogradOther",
)


def _with_autograd() -> AbstractContextManager[Any]:
    """Let operations record gradients again, which the dispatcher has switched off for operators."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:
        key = getattr(torch._C.DispatchKey, name, None)
        if key is not None:
            excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@contextlib.contextmanager
def _autocast(setting: str) -> Iterator[None]:
    """Enter the autocast of the place in the graph: "cpu:bfloat16", or "" for none."""
    if not setting:
        yield
        return
    device, dtype = setting.split(":")
    with torch.autocast(device, getattr(torch, dtype)):
        yield


def autocast_setting(device: str) -> str:
    """Return the active autocast of a type of device for `run`; the compiler reads this function, too."""
    if not torch.is_autocast_enabled(device):
        return ""
    return device + ":" + str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def _run(
    tensors: list[Tensor], held: list[Tensor], number: int, form: str, fields: str, autocast: str
) -> list[Tensor]:
    module = enrolled(number)
    needs, needs_held, call, options = ast.literal_eval(form)
    record = any(needs) or any(needs_held)
    given = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, needs, strict=True)]
    arguments, named = fill(call, given), fill(options, given)
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    own = [*module.parameters(), *module.buffers()]
    # Other tensors than the module's own, as of a functional call within the graph.
    others = any(
        p.data_ptr() != q.data_ptr() or p.requires_grad < needed
        for p, q, needed in zip(own, held, needs_held, strict=True)
    )
    with torch.set_grad_enabled(record), _with_autograd(), _autocast(autocast):
        if others:
            own = [t.detach().requires_grad_(needed) for t, needed in zip(held, needs_held, strict=True)]
            swapped = dict(zip(names, own, strict=True))
            results = torch.func.functional_call(module, swapped, arguments, named)
        else:
            results = module(*arguments, **named)
        results = module._graph_results(results)
    expected = ast.literal_eval(fields)
    rows = tensors[0].shape[0]
    if len(results) != len(expected) or not all(
        _fits(t, Field(*field), rows) for t, field in zip(results, expected, strict=True)
    ):
        raise RuntimeError(
            f"{type(module).__name__}: expected results of the form for which torch.compile has made the "
            "graph, got others, because a setting, or what a function returns, has changed since then: call "
            "torch.compiler.reset() after such a change"
        )
    token = torch.zeros(1, dtype=torch.int64)
    if record and any(t.requires_grad for t in results):
        memory = _Token(8)
        token = torch.frombuffer(memory, dtype=torch.int64)
        token[0] = next(_numbers)
        key = int(token[0])
        sources = zip([*given, *own], [*needs, *needs_held], strict=True)
        _kept[key] = _Kept(results, [t for t, needed in sources if needed])
        weakref.finalize(memory, _kept.pop, key, None)
        # The compiled graph may write to them, and the autograd graph may need them.
        return [*(t.detach().clone() for t in results), token]
    seen: set[int] = set()
    apart = []
    for t in results:
        t = t.detach()
        apart.append(t.clone() if t.numel() and t.data_ptr() in seen else t)
        seen.add(t.data_ptr())
    return [*apart, token]


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo, which reads what a split graph calls, out of a kernel."""
    kept: Callable[..., Any] = torch._disable_dynamo(function)  # type: ignore[attr-defined]
    return kept


def _fits(tensor: Tensor, field: Field, rows: int) -> bool:
    return (
        tuple(tensor.shape[1:]) == tuple(field.shape)
        and str(tensor.dtype) == f"torch.{field.dtype}"
        and (not field.rows or tensor.shape[0] == rows)
    )


def _run_fake(
    tensors: list[Tensor], held: list[Tensor], number: int, form: str, fields: str, autocast: str
) -> list[Tensor]:
    rows, some = tensors[0].shape[0], None
    results = []
    for shape, dtype, of_rows in ast.literal_eval(fields):
        if not of_rows and some is None:
            some = torch.library.get_ctx().new_dynamic_size()
        size = (rows if of_rows else some, *shape)
        results.append(tensors[0].new_empty(size, dtype=getattr(torch, dtype)))
    return [*results, torch.empty(1, dtype=torch.int64)]


def _backward(token: Tensor, grads: list[Tensor | None], sources: list[Tensor]) -> list[Tensor]:
    kept = _kept.get(int(token[0]))
    if kept is None:  # no result depends on a source
        return [torch.zeros_like(t) for t in sources]
    pairs = [(t, g) for t, g in zip(kept.results, grads, strict=True) if g is not None and t.requires_grad]
    with torch.enable_grad(), _with_autograd():
        found = torch.autograd.grad(
            [t for t, _ in pairs], kept.sources, [g for _, g in pairs], retain_graph=True, allow_unused=True
        )
    return [
        torch.zeros_like(t) if g is None else g.detach().clone(memory_format=torch.contiguous_format)
        for t, g in zip(kept.sources, found, strict=True)
    ]


def _backward_fake(token: Tensor, grads: list[Tensor | None], sources: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in sources]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, held, _, form, *_ = inputs
    ctx.needs, ctx.needs_held = ast.literal_eval(form)[:2]
    sources = zip([*tensors, *held], [*ctx.needs, *ctx.needs_held], strict=True)
    ctx.save_for_backward(output[-1], *(t for t, needed in sources if needed))


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> Any:
    token, *sources = ctx.saved_tensors
    found = list(_run_backward(token, list(grads[:-1]), sources))
    of_tensors = [found.pop(0) if needed else None for needed in ctx.needs]
    of_held = [found.pop(0) if needed else None for needed in ctx.needs_held]
    return of_tensors, of_held, None, None, None, None


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "a run of AdaptiveHalt or EnergyDescent in a compiled graph has no second derivative: leave the "
        "outer torch.compile out"
    )


_run_backward: Callable[..., list[Tensor]] = define_differentiable(
    "run_opaque_backward(Tensor token, Tensor?[] grads, Tensor[] sources) -> Tensor[]",
    _outside(_backward),
    _backward_fake,
    _no_second,
)
run: Callable[..., list[Tensor]] = define_differentiable(
    "run_opaque(Tensor[] tensors, Tensor[] held, int number, str form, str fields, str autocast) -> Tensor[]",
    _outside(_run),
    _run_fake,
    _differentiate,
    _save,
)
"""Run an enrolled module.

Parameters
----------
tensors : list of Tensor
    The leaves of the arguments.
held : list of Tensor
    The module's parameters, then its buffers.
number : int
    The module's.
form : str
    A literal: for each of `tensors`, and for each of `held`, whether it needs a gradient; the arguments and
    the keyword arguments as by `encode`.
fields : str
    A literal: the `Field` of each result.
autocast : str
    As by `autocast_setting`.

Returns
-------
list of Tensor
    What the module's ``_graph_results`` makes of its result, and a token.
"""
