"""Traces of `forward` by torch.fx, with the uses of weights and sizes that a graph does not show."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from adaptcomp_ext.nn._plain import copied, hooked
from adaptcomp_ext.nn.shrinking.operations import LAYERS, NORMS

__all__ = ["Trace", "trace"]

_ABOUT = {"device", "dtype", "is_cuda", "requires_grad"}
"""Attributes of a weight that do not change when it loses rows."""
_ABOUT_GETTERS = {getattr(Tensor, name).__get__ for name in _ABOUT}
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_features")
_DEFAULTS = (type(None), bool, int, float, str)


@dataclass
class Trace:
    """One path through `forward`: in training or evaluation mode, with or without optional arguments."""

    graph: fx.Graph
    training: bool
    read: set[str]
    """Names of parameters and buffers that `forward` reads itself, not through a layer."""
    sized: set[str]
    """Names of layers whose number of units `forward` reads."""
    kept: set[fx.Node]
    """Values that an attribute of a module still holds after the call, so that other code may read them."""


class _Tracer(fx.Tracer):
    """A tracer that treats modules with hooks as leaves: a hook would run while it traces, perhaps unseen."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or hooked(m)


class _Reads(TorchFunctionMode):
    """Record which of the named tensors functions of torch get while `forward` is traced."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ABOUT_GETTERS:
            self.read |= {
                self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names
            }
        return func(*args, **(kwargs or {}))


def trace(module: nn.Module, inputs: Sequence[Any] = ()) -> list[Trace]:
    """Trace `forward` in both modes, with and without its optional arguments.

    With `inputs`, the nodes in evaluation mode have the shapes of their outputs.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"module: expected the forward of {type(module).__name__}, got another one, set on the instance"
        )
    given: list[dict[str, Any] | None] = [None]
    if defaults := _defaults(module):
        given.append(defaults)
    return [_trace(module, training, left_out, inputs) for training in (False, True) for left_out in given]


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Return the defaults of optional arguments, which torch.fx by itself would replace by proxies."""
    parameters = inspect.signature(type(module).forward).parameters
    return {name: p.default for name, p in parameters.items() if isinstance(p.default, _DEFAULTS)}


def _trace(
    module: nn.Module, training: bool, left_out: dict[str, Any] | None, inputs: Sequence[Any]
) -> Trace:
    # A traced `forward` leaves proxies in attributes, and torch.fx leaves constants: trace a copy.
    root = copied("module", module).train(training)
    names = {id(t): name for name, t in chain(root.named_parameters(), root.named_buffers())}
    reads = _Reads(names)
    sized: set[str] = set()
    for name, part in root.named_modules():
        if type(part) in (*LAYERS, *NORMS):
            _watch_sizes(name, part, sized)
    try:
        with reads:
            graph = _Tracer().trace(root, left_out)
    except Exception as error:  # a user's forward may raise anything on proxies
        name, mode = type(module).__name__, "training" if training else "evaluation"
        raise ValueError(
            "module: expected a network that torch.fx can trace, "
            f"but tracing {name} failed in {mode} mode: {error}"
        ) from error
    for node in graph.nodes:
        if node.op == "get_attr" and any(not _about(user) for user in node.users):
            reads.read.add(names.get(id(_attribute(root, str(node.target))), ""))
    kept = {
        leaf.node
        for part in root.modules()
        for leaf in tree_leaves(_state(part))
        if isinstance(leaf, fx.Proxy)
    }
    result = Trace(graph, training, reads.read, sized.copy(), kept)
    if inputs and not training:
        _propagate(root, graph, inputs)
    return result


def _watch_sizes(name: str, layer: nn.Module, sized: set[str]) -> None:
    """Record reads of a layer's sizes: they are plain integers, which shrinking would change."""

    def watch(attribute: str) -> property:
        def read(self: nn.Module) -> Any:
            sized.add(name)
            return vars(self)[attribute]

        return property(read)

    kind = type(layer)
    members = {"__module__": kind.__module__, **{size: watch(size) for size in _SIZES if size in vars(layer)}}
    layer.__class__ = type(kind.__name__, (kind,), members)


def _about(user: fx.Node) -> bool:
    return user.op == "call_function" and user.target is getattr and user.args[1] in _ABOUT


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def _propagate(root: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> None:
    try:
        with torch.no_grad():
            ShapeProp(fx.GraphModule(root, graph)).propagate(*inputs)
    except Exception as error:
        raise ValueError(
            f"inputs: expected what {type(root).__name__} takes, but it failed on them: {error}"
        ) from error
