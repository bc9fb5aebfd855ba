"""`shrink`: a smaller dense network with the same outputs."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._plain import copied, move_hooks
from adaptcomp_ext.nn.shrinking.operations import CONVOLUTIONS
from adaptcomp_ext.nn.shrinking.paths import Path, find_paths
from adaptcomp_ext.nn.shrinking.tracing import trace
from adaptcomp_ext.nn.variational import VariationalDropout
from adaptcomp_ext.ops._checks import describe

__all__ = ["shrink"]


def shrink(module: nn.Module, *inputs: Any) -> nn.Module:
    """Remove dead units: return a smaller dense network with the same outputs in evaluation mode.

    Scattered zeros in a weight save no time; removed rows and columns do. A unit of a linear or convolution
    layer is dead

    - if all its outgoing weights are 0, so that no layer reads it; or
    - if all its incoming weights are 0, so that its value is a constant. A constant other than 0 is added to
      the biases of the layers that read it (a new bias if there is none). Where that is not exact, because a
      convolution pads with zeros, the unit stays.

    Removing a unit may make others dead, so that this is repeated until no unit is. Every layer keeps at
    least one unit.

    Parameters
    ----------
    module : nn.Module
        The network; it is not changed. ``torch.fx`` traces it in both modes, so that its control flow must
        not depend on data. Every `VariationalDropout` in it is first replaced by its pruned dense layer.
    *inputs : Any
        Example arguments of `module`, which runs once on them. Without them the shapes are unknown, and two
        layouts are assumed: the input of batch normalisation after a linear layer is [B, C], not [B, T, C],
        and a convolution's output that is flattened has a batch dimension. If an assumption is wrong, the
        smaller network raises at a size that does not fit: give an example.

    Returns
    -------
    nn.Module
        A copy of the same classes, with smaller layers, and a plain layer for each `VariationalDropout`. It
        is in the mode of `module` and can be trained further.

    Raises
    ------
    TypeError
        If `module` is not an nn.Module, is compiled, or cannot be copied.
    ValueError
        If it cannot be traced, has parameters on the meta device, or fails on `inputs`; the message says
        which.

    Notes
    -----
    For finite inputs the outputs are the same, up to the rounding of sums in another order.

    Between two layers there may be activations, dropout, pooling, batch normalisation, and the flattening of
    channels into features. Units that anything else reads stay: the network's own outputs, values that
    `forward` keeps in an attribute, sums of branches (residual connections), reshapes to sizes written in the
    code, softmax, attention, recurrent cells. The units of a layer also stay

    - if it is called twice, shares weights, or has groups, hooks, parametrisations or a ``forward`` of its
      own;
    - if `forward` reads its weights or sizes itself, as tied decoders, penalties and scales do;
    - if other layers read its units in training mode, or where an optional argument is left out.

    The input keeps its shape, even where no layer reads it.

    *Not promised:* the same gradients at the neighbours of removed units, and the same batch statistics in
    training mode; that weights stay shared with a layer in a `VariationalDropout`, or as views of one memory;
    the results of methods other than `forward`, of hooks of the whole network, and of lists outside of it.

    Examples
    --------
    >>> small = ac.shrink(acc.default.eval())
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        raise TypeError(
            "module: expected a network in Python, as it was before it was compiled, "
            f"got {type(module).__name__}"
        )
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"module: expected parameters and buffers with values, got {name} on the meta device"
            )
    with torch.inference_mode(False), torch.no_grad():
        result = _dense(copied("module", module))
        if _is_layer(result):
            return result
        traces = trace(result, inputs)
        # One removal at a time, because it changes the other paths.
        while any(_remove(path) for path in find_paths(result, traces)):
            pass
    return result


def _is_layer(module: nn.Module) -> bool:
    """Whether a network is a single layer of torch, which a tracer treats as a leaf."""
    kind = type(module)
    return (
        kind.__module__.startswith("torch.nn.modules.")
        and not issubclass(kind, nn.Sequential)
        and kind.forward is not nn.Module.forward
    )


def _dense(module: nn.Module) -> nn.Module:
    """Replace each variational layer by its pruned dense layer, by the same one wherever it is used."""
    made: dict[nn.Module, nn.Module] = {}

    def replace(part: nn.Module) -> nn.Module:
        if isinstance(part, VariationalDropout):
            if part not in made:
                made[part] = replace(part.dense().train(part.training))
                move_hooks(part, made[part])
            return made[part]
        for name, child in part._modules.items():
            if child is not None and (new := replace(child)) is not child:
                setattr(part, name, new)
        return part

    return replace(module)


def _remove(path: Path) -> bool:
    """Remove the dead units of one layer; return whether there were any."""
    producer = path.producer
    units = len(producer.weight)
    read = torch.zeros(units, dtype=torch.bool, device=producer.weight.device)
    folds = torch.ones_like(read)
    for reader in path.readers:
        columns = _columns(reader.layer, units, reader.run)
        used = (columns != 0).any(dim=2).any(dim=0)
        read |= used
        constant = reader.constants
        exact = constant.isfinite() & ((constant == 0) | (not _pads_with_zeros(reader.layer)))
        folds &= exact | ~used
    constant_units = (producer.weight == 0).flatten(1).all(dim=1)
    dead = ~read | (constant_units & folds)
    folded = dead & read
    if bool(dead.all()):
        dead[0] = False
    if not bool((dead | folded).any()):
        return False
    for reader in path.readers:
        _fold(reader.layer, reader.constants, folded, units, reader.run)
    kept = (~dead).nonzero()[:, 0]
    _keep_rows(producer, kept)
    for norm in path.norms:
        _keep_norm(norm, kept)
    for reader in path.readers:
        _keep_columns(reader.layer, kept, units, reader.run)
    return True


def _columns(layer: Any, units: int, run: int) -> Tensor:
    """Return a reader's weight as [outputs, units, weights of one unit]."""
    weight: Tensor = layer.weight.detach()
    return weight.reshape(len(weight), units, run * weight[0, 0].numel())


def _pads_with_zeros(layer: Any) -> bool:
    if not isinstance(layer, CONVOLUTIONS) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _fold(layer: Any, constants: Tensor, dead: Tensor, units: int, run: int) -> None:
    """Add the constant contribution of removed units to a reader's biases."""
    sent = torch.where(dead, constants, torch.zeros_like(constants))  # NaN never multiplies a weight
    if bool((sent != 0).any()):
        shift = _columns(layer, units, run).sum(dim=2).double() @ sent.double()
        if layer.bias is None:
            zeros = layer.weight.new_zeros(len(layer.weight))
            layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
        layer.bias.copy_(layer.bias.double() + shift)
    _clear(layer, dead, units)


def _clear(layer: Any, dead: Tensor, units: int) -> None:
    """Set the weights of folded units to 0: a unit that stays in the layer would otherwise count twice."""
    weight = layer.weight
    weight.copy_(weight.reshape(len(weight), units, -1).masked_fill(dead[:, None], 0).reshape(weight.shape))


def _parameter(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)


def _keep_rows(layer: Any, kept: Tensor) -> None:
    layer.weight = _parameter(layer.weight, layer.weight[kept])
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias, layer.bias[kept])
    if isinstance(layer, nn.Linear):
        layer.out_features = len(kept)
    else:
        layer.out_channels = len(kept)


def _keep_columns(layer: Any, kept: Tensor, units: int, run: int) -> None:
    weight = layer.weight
    shape = (len(weight), len(kept) * run, *weight.shape[2:])
    layer.weight = _parameter(weight, weight.reshape(len(weight), units, -1)[:, kept].reshape(shape))
    if isinstance(layer, nn.Linear):
        layer.in_features = len(kept) * run
    else:
        layer.in_channels = len(kept)


def _keep_norm(norm: Any, kept: Tensor) -> None:
    if norm.affine:
        norm.weight = _parameter(norm.weight, norm.weight[kept])
        norm.bias = _parameter(norm.bias, norm.bias[kept])
    if norm.running_mean is not None:
        norm.running_mean = norm.running_mean[kept].clone()
        norm.running_var = norm.running_var[kept].clone()
    norm.num_features = len(kept)
