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
    """Remove the units that are dead and return a smaller dense network with the same outputs in evaluation mode.

    Zeros scattered over a weight save no time; rows and columns that are gone do. A unit of a linear or
    convolution layer is dead

    - if all its outgoing weights are 0: nobody reads it; or
    - if all its incoming weights are 0: it is a constant, its bias, through whatever follows. A constant 0 is
      dropped, any other is added to the biases that follow (a new one where there was none), where that is
      exact: not where a convolution pads with zeros, so that its border sees less.

    A unit that is removed may leave others dead; this is repeated until none is. One unit stays in every
    layer.

    Parameters
    ----------
    module : nn.Module
        Left as it is. Traced by ``torch.fx`` in both modes: its control flow must not depend on data. Every
        `VariationalDropout` in it becomes its pruned dense layer first.
    *inputs : Any
        An example of what `module` takes; it runs once. Without one shapes are not known, and two layouts are
        assumed: batch normalisation behind a linear layer sees [B, C], not [B, T, C], and what is flattened
        behind a convolution has a batch dimension. Where an assumption is wrong the smaller network stops at
        a size that does not fit: give an example.

    Returns
    -------
    nn.Module
        Of the same classes, with smaller layers; a plain layer for a `VariationalDropout`. In the mode
        `module` was in. Trains on.

    Raises
    ------
    TypeError
        If `module` is no nn.Module, is compiled, or cannot be copied.
    ValueError
        If it cannot be traced, has parameters on the meta device, or fails on `inputs`; the message says what
        failed.

    Notes
    -----
    The outputs are the same up to the rounding of sums that are put together in another order, for inputs
    that are finite.

    Between two layers it looks through activations, dropout, pooling, batch normalisation, and the flattening
    of channels into features. Units that anything else sees are left alone: the network's own outputs, what
    `forward` keeps in an attribute, sums of branches (residual connections), reshapes to sizes written in the
    code, softmax, attention, recurrent cells. So are layers

    - that are called twice, share weights, have groups, hooks, parametrisations or a ``forward`` of their
      own;
    - whose weights or sizes `forward` reads itself, as tied decoders, penalties and scales do;
    - whose units other layers read in training mode, or where an optional argument is left out.

    So are inputs that nobody reads: the input keeps its shape.

    *Not promised:* that gradients at the removed units' neighbours stay the same, or batch statistics in
    training mode; that weights shared with a layer in a `VariationalDropout`, or views of one memory, stay
    shared; what methods other than `forward` compute, or what hooks of the whole network and lists outside of
    it see.

    Examples
    --------
    >>> small = ac.shrink(acc.default.eval())
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        raise TypeError(
            f"module: expected a network in Python, as it was before it was compiled, got {type(module).__name__}"
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
        while any(
            _remove(path) for path in find_paths(result, traces)
        ):  # one at a time: a removal changes what others see
            pass
    return result


def _is_layer(module: nn.Module) -> bool:
    """Whether a network is one layer of torch's, which a tracer does not look into."""
    kind = type(module)
    return (
        kind.__module__.startswith("torch.nn.modules.")
        and not issubclass(kind, nn.Sequential)
        and kind.forward is not nn.Module.forward
    )


def _dense(module: nn.Module) -> nn.Module:
    """Replace every variational layer by its pruned dense one, one by one even where it is used twice."""
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
    """Remove the dead units of one layer; say whether there were any."""
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
    """A reader's weight as [outputs, units, whatever belongs to one unit]."""
    weight = layer.weight.detach()
    return weight.reshape(len(weight), units, run * weight[0, 0].numel())


def _pads_with_zeros(layer: Any) -> bool:
    if not isinstance(layer, CONVOLUTIONS) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _fold(layer: Any, constants: Tensor, dead: Tensor, units: int, run: int) -> None:
    """Add to a reader's biases what the units that go had always sent it."""
    sent = torch.where(dead, constants, torch.zeros_like(constants))  # NaN never multiplies a weight
    if bool((sent != 0).any()):
        shift = _columns(layer, units, run).sum(dim=2).double() @ sent.double()
        if layer.bias is None:
            zeros = layer.weight.new_zeros(len(layer.weight))
            layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
        layer.bias.copy_(layer.bias.double() + shift)
    _clear(layer, dead, units)


def _clear(layer: Any, dead: Tensor, units: int) -> None:
    """Read no more what was folded: the one unit that has to stay would be counted twice."""
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
