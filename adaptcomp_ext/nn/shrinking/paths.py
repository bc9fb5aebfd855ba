"""Paths from each layer to the layers that read it, along which its units can be removed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptcomp_ext.nn._plain import intact
from adaptcomp_ext.nn.shrinking.operations import CONVOLUTIONS, LAYERS, NORMS, flattens, in_place, passes
from adaptcomp_ext.nn.shrinking.tracing import Trace

__all__ = ["Path", "find_paths"]


@dataclass
class Reader:
    """A layer that reads a producer's units; unit j is columns j·run to (j + 1)·run of its weight.

    `constants` [units]: the value that arrives from a unit whose incoming weights are all 0; NaN if that is
    not constant.
    """

    layer: Any
    run: int
    constants: Tensor


@dataclass
class Path:
    """A layer, all layers that read it, and the normalisations between them."""

    producer: Any
    readers: list[Reader] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)
    branches: bool = False
    in_place: bool = False

    def agrees(self, other: Path) -> bool:
        """Whether the same layers read the units in another trace."""

        def parts(path: Path) -> Counter[tuple[int, int]]:
            return Counter(
                [(id(r.layer), r.run) for r in path.readers] + [(id(norm), 0) for norm in path.norms]
            )

        return parts(self) == parts(other)

    def restrict(self, other: Path) -> None:
        """Keep the constants that are the same in another trace."""
        constants = {id(reader.layer): reader.constants for reader in other.readers}
        for reader in self.readers:
            same = reader.constants == constants[id(reader.layer)]
            reader.constants = reader.constants.where(same, float("nan"))


def find_paths(root: nn.Module, traces: list[Trace]) -> list[Path]:
    """Find the layers whose units only layers read, the same in all traces; in order of the first trace."""
    first, *rest = [_Follower(root, trace).paths() for trace in traces]
    for paths, trace in zip(rest, traces[1:], strict=True):
        first = {key: path for key, path in first.items() if key in paths and path.agrees(paths[key])}
        if not trace.training:  # the outputs are promised for evaluation
            for key, path in first.items():
                path.restrict(paths[key])
    return list(first.values())


class _Follower:
    """Walks through one trace from each layer to its readers."""

    def __init__(self, root: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.modules = dict(root.named_modules(remove_duplicate=False))
        called = [self.modules[str(node.target)] for node in trace.graph.nodes if node.op == "call_module"]
        self.calls = Counter(called)
        # Submodules of modules that are not traced through.
        self.hidden = {part for module in called for part in module.modules() if part is not module}
        self.owners = Counter(id(t) for module in root.modules() for t in _tensors(module))
        everything = dict(chain(root.named_parameters(), root.named_buffers()))
        self.read = {id(everything[name]) for name in trace.read if name in everything}
        self.sized = {self.modules[name] for name in trace.sized}

    def paths(self) -> dict[int, Path]:
        """Return the paths by the id of their producer."""
        paths = {}
        for node in self.trace.graph.nodes:
            module = self.modules[str(node.target)] if node.op == "call_module" else None
            if module is None or type(module) not in LAYERS or not self.removable(module) or not node.users:
                continue
            path = Path(module)
            weight = module.weight.detach()
            bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
            if self.follow(node, bias, type(module) in CONVOLUTIONS, 1, path) and not (
                path.in_place and path.branches
            ):
                paths[id(module)] = path
        return paths

    def removable(self, module: Any) -> bool:
        """Whether a layer may change its size: it is torch's own, is called once, and shares no parameter."""
        if type(module) not in (*LAYERS, *NORMS) or not intact(module):
            return False
        if self.calls[module] != 1 or module in self.hidden or module in self.sized:
            return False
        if type(module) in CONVOLUTIONS and module.groups != 1:
            return False
        tensors = _tensors(module)
        plain = all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in tensors)
        real = all(t.is_floating_point() and t.numel() for t in module.parameters(recurse=False))
        return plain and real and all(self.owners[id(t)] == 1 and id(t) not in self.read for t in tensors)

    def follow(self, node: fx.Node, constants: Tensor, channels: bool, run: int, path: Path) -> bool:
        """Walk from a node to all readers; return False if anything except layers reads the units."""
        if node in self.trace.kept:
            return False
        path.branches |= len(node.users) > 1
        return all(self.pass_on(node, user, constants, channels, run, path) for user in node.users)

    def pass_on(
        self, node: fx.Node, user: fx.Node, constants: Tensor, channels: bool, run: int, path: Path
    ) -> bool:
        """Take one step of `follow`."""
        if user.args[:1] != (node,) or sum(argument is node for argument in user.all_input_nodes) != 1:
            return False
        module: Any = self.modules.get(str(user.target)) if user.op == "call_module" else None
        if type(module) in LAYERS:
            return self.end(module, constants, channels, run, path)
        if type(module) in NORMS:
            if run == 0 or not self.removable(module) or module.num_features != len(constants):
                return False
            if not channels and _dimensions(node) not in (None, 2):  # [B, T, C]: normalised over T
                return False
            path.norms.append(module)
            return self.follow(user, _normalised(module, constants), channels, run, path)
        if channels and flattens(user, module):
            batched = _dimensions(node) in (None, path.producer.weight.dim())
            return batched and self.follow(user, constants, False, 0, path)
        through = passes(user, module, channels)
        path.in_place |= through is not None and in_place(user, module)
        return through is not None and self.follow(user, through(constants), channels, run, path)

    def end(self, layer: Any, constants: Tensor, channels: bool, run: int, path: Path) -> bool:
        """Record a layer that reads the units, if it may change its size."""
        linear = type(layer) is nn.Linear
        if channels == linear or not self.removable(layer):
            return False
        columns = layer.in_features if linear else layer.in_channels
        if columns % len(constants) or (run == 0 and not linear):
            return False
        path.readers.append(Reader(layer, columns // len(constants) if run == 0 else 1, constants))
        return True


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _dimensions(node: fx.Node) -> int | None:
    """Return the number of dimensions of a node's output, or None without example inputs."""
    about = node.meta.get("tensor_meta")
    return None if about is None else len(about.shape)


def _normalised(norm: Any, constants: Tensor) -> Tensor:
    if norm.running_mean is None or norm.running_var is None:  # the batch's statistics are used
        return torch.full_like(constants, float("nan"))
    out = (constants.double() - norm.running_mean) / (norm.running_var.double() + norm.eps).sqrt()
    scaled: Tensor = out * norm.weight + norm.bias if norm.affine else out
    return scaled.to(constants.dtype)
