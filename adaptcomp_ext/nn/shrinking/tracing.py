"""What `forward` does with layers and weights, as torch.fx sees it, and what it does that no graph shows."""

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
"""Attributes of a weight that stay as they are when it loses rows."""
_ABOUT_GETTERS = {getattr(Tensor, name).__get__ for name in _ABOUT}
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_features")
_DEFAULTS = (type(None), bool, int, float, str)


@dataclass
class Trace:
    """One way through `forward`: in training or evaluation mode, optional arguments given or left out."""

    graph: fx.Graph
    training: bool
    read: set[str]
    """Names of parameters and buffers that `forward` reads itself, rather than through a layer."""
    sized: set[str]
    """Names of layers whose number of units it reads."""
    kept: set[fx.Node]
    """What is still there after the call, in an attribute of a module: anybody may read it."""


class _Tracer(fx.Tracer):
    """Modules with hooks are not looked into: a hook would run now, and what it does with a value need not show."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or hooked(m)


class _Reads(TorchFunctionMode):
    """Note which of these tensors any function of torch is given while `forward` is traced."""

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
    """Trace every way through `forward` that its mode and its optional arguments decide.

    With `inputs` the nodes of evaluation know the shapes of their outputs.
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
    """Optional arguments. torch.fx takes them as given; who leaves them out may go another way."""
    parameters = inspect.signature(type(module).forward).parameters
    return {name: p.default for name, p in parameters.items() if isinstance(p.default, _DEFAULTS)}


def _trace(
    module: nn.Module, training: bool, left_out: dict[str, Any] | None, inputs: Sequence[Any]
) -> Trace:
    # A copy: a traced `forward` leaves proxies in attributes, and torch.fx its constants.
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
    except Exception as error:  # whatever a user's forward raises when it is fed proxies
        name, mode = type(module).__name__, "training" if training else "evaluation"
        raise ValueError(
            f"module: expected a network that torch.fx can trace, but tracing {name} failed in {mode} mode: {error}"
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
    found = Trace(graph, training, reads.read, sized.copy(), kept)
    if inputs and not training:
        _propagate(root, graph, inputs)
    return found


def _watch_sizes(name: str, layer: nn.Module, sized: set[str]) -> None:
    """Note who reads how many units a layer has: they are plain integers, which would be others afterwards."""

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
