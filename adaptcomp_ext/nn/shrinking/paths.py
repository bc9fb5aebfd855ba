"""From each layer to the layers that read it: which of its units could be removed, and at what places."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptcomp_ext.nn.shrinking.operations import flattens, passes

__all__ = ["CONVOLUTIONS", "LAYERS", "Path", "find_paths"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Reader:
    """A layer that reads a producer's units; unit j is columns j·run to (j + 1)·run of its weight.

    `constants` [units]: what arrives of a unit whose incoming weights are all 0; NaN where that is not a constant.
    """

    layer: Any
    run: int
    constants: Tensor


@dataclass
class Path:
    """A layer, everything that reads it, and the normalisations on the way."""

    producer: Any
    readers: list[Reader] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)


def find_paths(root: nn.Module, graph: fx.Graph) -> list[Path]:
    """Find the layers whose units are read by nothing but layers, in the order of the graph."""
    modules = dict(root.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for module in root.modules() for p in module.parameters(recurse=False))

    def removable(module: nn.Module | None) -> bool:
        """Whether a layer may change its size: called once, its parameters its own."""
        if not isinstance(module, (*LAYERS, *NORMS)) or calls[module] != 1:
            return False
        if isinstance(module, CONVOLUTIONS) and module.groups != 1:
            return False
        plain = not nn.utils.parametrize.is_parametrized(module) and not module._forward_pre_hooks and not module._forward_hooks
        return plain and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))

    def follow(node: fx.Node, constants: Tensor, channels: bool, run: int, path: Path) -> bool:
        """Walk from a node to all readers; False if anything else sees the units."""
        for user in node.users:
            if user.args[:1] != (node,) or sum(argument is node for argument in user.all_input_nodes) != 1:
                return False
            module = modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, LAYERS):
                fits = isinstance(module, nn.Linear) if not channels else isinstance(module, CONVOLUTIONS)
                if not fits or not removable(module):
                    return False
                columns = module.in_features if isinstance(module, nn.Linear) else module.in_channels
                if columns % len(constants) or (run == 0 and not isinstance(module, nn.Linear)):
                    return False
                path.readers.append(Reader(module, columns // len(constants) if run == 0 else 1, constants))
            elif isinstance(module, NORMS):
                if run == 0 or not removable(module) or module.num_features != len(constants):
                    return False
                path.norms.append(module)
                if not follow(user, _normalised(module, constants), channels, run, path):
                    return False
            elif channels and flattens(user, module):
                if not follow(user, constants, False, 0, path):
                    return False
            else:
                through = passes(user, module, channels)
                if through is None or not follow(user, through(constants), channels, run, path):
                    return False
        return True

    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        if isinstance(module, LAYERS) and removable(module) and node.users:
            path = Path(module)
            with torch.no_grad():
                weight = module.weight
                bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
                if follow(node, bias, isinstance(module, CONVOLUTIONS), 1, path):
                    found.append(path)
    return found


def _normalised(norm: Any, constants: Tensor) -> Tensor:
    if norm.running_mean is None:  # then the batch decides
        return torch.full_like(constants, float("nan"))
    out = (constants - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    return out * norm.weight + norm.bias if norm.affine else out
