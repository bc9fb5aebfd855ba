"""`VariationalDropout`: a layer whose weights or outputs have noise of learned strength."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.nn._plain import copied, hooked
from adaptcomp_ext.nn._scripting import refuse_scripting
from adaptcomp_ext.nn.variational.kl import kingma_kl, molchanov_kl
from adaptcomp_ext.nn.variational.layers import (
    WEIGHTED,
    check_layer,
    count_units,
    plain,
    unit_dimension,
    why_not_called,
    why_not_sparse,
)
from adaptcomp_ext.nn.variational.wide import outside_autocast, wide
from adaptcomp_ext.ops._checks import check_choice, check_fraction, describe
from adaptcomp_ext.ops.descent import check_number

__all__ = ["FORMS", "GRANULARITIES", "VariationalDropout"]

FORMS = ("sparse", "gaussian")
GRANULARITIES = ("weight", "unit")
torch.fx.wrap("wide")  # recorded as one call, because it branches on a dtype, which a proxy does not have
_TINY = 1e-8  # added to θ², so that a weight of 0 has a large α, not an infinite one
_VARIANCE_FLOOR = 1e-16  # keeps the derivative of the square root finite at 0


def _of_layer(name: str) -> property:
    return property(lambda self: getattr(self.layer, name), doc=f"The layer's own ``{name}``.")


def _scalar(number: float, like: torch.dtype, device: torch.device) -> Tensor:
    """Make a threshold: float64 if the noise is, else float32, because some devices lack float64."""
    return torch.tensor(
        number, dtype=torch.float64 if like == torch.float64 else torch.float32, device=device
    )


class VariationalDropout(nn.Module):
    """Wrap a layer so that it has noise of learned strength α in training mode.

    form="sparse" (Molchanov, Ashukha & Vetrov 2017) is for linear and convolution layers. Each weight is
    independently N(θ, αθ²), with an α for each weight, sampled through the pre-activations (local
    reparametrisation: Kingma, Salimans & Welling 2015)

        training:    out = θ*x + b + √(σ²*x²)·ε,   σ² = αθ²,   ε ~ N(0, 1) for each output of each row
        evaluation:  out = θ'*x + b,               θ' = 0 where log α > threshold, else θ

    With ``per="unit"`` all weights of a unit share one α and one ε (Kingma et al.'s correlated weight noise;
    Neklyudov et al. 2017 prune by it), so that complete units die, which `shrink` can remove

        training:    out = (θ*x)·(1 + √α·ε) + b,   ε ~ N(0, 1) for each unit of each row, at all positions

    form="gaussian" (Kingma, Salimans & Welling 2015) is for any layer. The outputs are multiplied by N(1, α)
    with a learned α ≤ 1 for each unit. Nothing is pruned, and evaluation mode has no noise.

    Parameters
    ----------
    layer : nn.Module
        The layer, which becomes part of this module. It returns one real floating-point Tensor.
    form : str, optional
        "sparse" or "gaussian". Default: "sparse" for ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d``,
        parametrised ones included; "gaussian" for other layers, and for subclasses and instances with a
        ``forward`` of their own, with hooks or with complex weights.
    per : str
        "weight" or "unit": whether each weight or each unit has an α. Always "unit" for "gaussian".
    threshold : float
        Weights with log α above it are pruned, in nats. 3 is a dropout rate of 0.95.
    log_alpha : float
        Initial log α. With ``per="weight"`` all weights start with the same σ, and this is log α of a weight
        of average size.
    features : int, optional
        Number of units, for a "gaussian" layer without an attribute that tells it (``out_features``,
        ``out_channels``, ``hidden_size``).

    Attributes
    ----------
    threshold : Tensor
        Scalar buffer, float32 or wider in any precision; a float can be assigned. A state_dict without it,
        written by an older version, leaves it unchanged.
    weight, bias : Tensor
        The tensors for parents that read them instead of calling the layer, as the fast path of
        ``nn.TransformerEncoderLayer`` does. In evaluation mode `weight` is the pruned weight, a new tensor:
        write to ``layer.weight``. In training mode it is θ, the layer's parameter, so that a parent's own
        product has *no noise*; `kl` warns if the layer was never called. Assignments go to the layer.

    Raises
    ------
    TypeError
        If `layer` is not an nn.Module or does not fit the form; at a call, if a layer wrapped in form
        "sparse" has got hooks (in training mode) or a ``forward`` of its own since then.
    ValueError
        If an option is out of range, or the output does not have the units in the expected dimension.

    Notes
    -----
    Add ``layer.kl() / N`` to a mean loss, where N is the size of the training set, and warm it up: otherwise
    the network is pruned before it has learned. log α has to change by several nats, so that its parameter
    needs a larger learning rate than weights (usually ten times).

    A row of a linear layer is a vector of units: in [B, T, C] each of the B·T rows has its own noise.

    Units lie in the last dimension of a layer's output; before the positions for convolutions, transposed
    convolutions, pools and instance normalisation, batched or not; in dimension 1 for batch and group
    normalisation.

    In half precision and under autocast, standard deviations, noise and KL are computed in float32; outputs
    have the layer's dtype.

    The noise comes from torch's global generator. *Not promised:* that a row's noise does not depend on the
    other rows.
    """

    threshold: Tensor
    _called = False  # in training mode
    _read = False  # `weight` was read in training mode

    in_features, out_features = _of_layer("in_features"), _of_layer("out_features")
    in_channels, out_channels = _of_layer("in_channels"), _of_layer("out_channels")
    kernel_size, stride, padding = _of_layer("kernel_size"), _of_layer("stride"), _of_layer("padding")
    dilation, groups = _of_layer("dilation"), _of_layer("groups")

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        layer: nn.Module,
        form: str | None = None,
        per: str = "weight",
        threshold: float = 3.0,
        log_alpha: float = -4.0,
        features: int | None = None,
    ) -> None:
        super().__init__()
        check_layer(layer)
        if isinstance(layer, VariationalDropout):
            raise TypeError("layer: expected one without variational dropout, got a VariationalDropout")
        obstacle = why_not_sparse(layer)
        if form is None:
            form = "sparse" if obstacle is None else "gaussian"
        check_choice("form", form, FORMS)
        check_choice("per", per, GRANULARITIES)
        if form == "sparse" and obstacle is not None:
            raise TypeError(f"layer: form='sparse' {obstacle}")
        self.form = form
        self.per = per if form == "sparse" else "unit"
        self._first_threshold = check_number("threshold", threshold, -math.inf, math.inf, ends="()")
        self._first_log_alpha = check_number(
            "log_alpha", log_alpha, -math.inf, 0.0 if form == "gaussian" else math.inf, ends="(]"
        )
        self.layer = layer
        self.units = count_units(layer, features)
        like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("threshold", _scalar(self._first_threshold, like.dtype, like.device))
        if form == "sparse" and per == "weight":
            assert isinstance(layer, WEIGHTED)
            self.log_variance = nn.Parameter(
                torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
            )
        else:
            self.log_noise = nn.Parameter(torch.empty(self.units, dtype=like.dtype, device=like.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the noise to its initial strength, for the layer's present weights, which do not change."""
        if self.form == "gaussian" or self.per == "unit":
            self.log_noise.fill_(self._first_log_alpha)
        else:
            assert isinstance(self.layer, WEIGHTED)
            size = wide(self.layer.weight.detach()).square().mean().clamp(min=_TINY)
            self.log_variance.copy_((size.log() + self._first_log_alpha).expand_as(self.log_variance))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # as in `decoder.weight = encoder.weight`
            setattr(self.layer, name, value)
            return
        if name == "threshold" and not isinstance(value, Tensor):
            number = check_number("threshold", value, -math.inf, math.inf, ends="()")
            value = _scalar(number, self.threshold.dtype, self.threshold.device)
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The pruned weight in evaluation mode, a new tensor; θ in training mode and for "gaussian"."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        if self.form == "gaussian":
            return weight
        if self.training:
            if not self._read:
                self._read = True
            return weight
        return self._prune(weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return bias

    @property
    def log_alpha(self) -> Tensor:
        """log α, differentiable: in the weights' shape or, per unit, [units]; float32 in half precision."""
        if self.form == "gaussian":
            return wide(self.log_noise).clamp(max=0)
        if self.per == "unit":
            return wide(self.log_noise)
        assert isinstance(self.layer, WEIGHTED)
        return wide(self.log_variance) - (wide(self.layer.weight).square() + _TINY).log()

    @property
    def kept(self) -> Tensor:
        """The mask of weights that are not pruned, bool in the weights' shape; "sparse" only."""
        if self.form != "sparse":
            raise ValueError('kept: expected form="sparse", got "gaussian", which prunes nothing')
        assert isinstance(self.layer, WEIGHTED)
        kept = ~(self.log_alpha.detach() > self.threshold)  # a NaN prunes nothing
        return kept if self.per == "weight" else self._along_units(kept).expand_as(self.layer.weight)

    def _along_units(self, values: Tensor) -> Tensor:
        assert isinstance(self.layer, WEIGHTED)
        positions = getattr(self.layer, "kernel_size", ())  # torch.fx does not know the weight's shape
        return values.view(-1, 1, *(1 for _ in positions))

    def _prune(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept, weight, torch.zeros_like(weight))

    def kl(self) -> Tensor:
        """Compute KL(q ‖ p) in nats: a differentiable scalar, 0 as α → ∞.

        For "sparse" it is the sum over weights of the approximation by Molchanov et al. 2017, of each
        weight's marginal even if a unit's weights share their noise. For "gaussian" it is the sum over units
        of the approximation by Kingma et al. 2015. The bias has no posterior.
        """
        if self.form == "gaussian":
            return kingma_kl(self.log_alpha).sum()
        if self.training and self._read and not self._called:
            warnings.warn(
                f"VariationalDropout: the weight of its {type(self.layer).__name__} was read in training, "
                "but the layer was never called: no noise has entered the loss, and this KL alone prunes. "
                "Call the layer, or do not wrap it.",
                stacklevel=2,
            )
            self._read = False
        kl = molchanov_kl(self.log_alpha).sum()
        if self.per == "weight":
            return kl
        assert isinstance(self.layer, WEIGHTED)
        return kl * (self.layer.weight.numel() // self.units)

    def sparsity(self) -> float:
        """Return the share of weights that evaluation mode prunes; 0 for "gaussian"."""
        return 0.0 if self.form == "gaussian" else 1.0 - float(self.kept.double().mean())

    def prune(self, share: float) -> None:
        """Set the threshold so that evaluation mode prunes a share of weights or units, the noisiest first.

        Parameters
        ----------
        share : float
            Share of weights or, with ``per="unit"``, of units, in [0, 1), rounded down to an integer number.

        Notes
        -----
        Complete units take long training to reach a threshold of 3. Their order shows much earlier: prune a
        share, `shrink`, and train the smaller network a little further.
        """
        part = check_fraction("share", share, zero=True)
        if self.form != "sparse" or part == 1.0:
            raise ValueError(
                f'share: expected a share below 1 of a layer with form="sparse", got {share} of {self.form!r}'
            )
        log_alpha = self.log_alpha.detach().flatten()
        ordered = log_alpha.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort().values
        last = len(ordered) - int(part * len(ordered)) - 1
        low, high = ordered[last], ordered[min(last + 1, len(ordered) - 1)]
        middle = low + (high - low) / 2  # so that another device's rounding of log α changes nothing
        self.register_buffer("threshold", torch.where(middle < high, middle, low))

    def dense(self) -> nn.Module:
        """Return a copy of the layer with its pruned weights set to 0: it has the outputs of evaluation mode.

        In form "sparse", parametrised tensors become plain parameters.
        """
        layer = copied("layer", self.layer)
        if self.form == "sparse":
            plain(layer)
            assert isinstance(layer, WEIGHTED)
            with torch.no_grad():
                layer.weight.copy_(self._prune(layer.weight))
        return layer

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Run the layer: with noise in training mode, pruned in evaluation mode."""
        if self.form == "gaussian":
            return self._multiplied(self.layer(*inputs, **options))
        x = self._only(inputs, options)
        if (obstacle := why_not_called(self.layer)) is not None:
            return self._hooked(x, obstacle)
        assert isinstance(self.layer, WEIGHTED)
        weight, bias = self.layer.weight, self.layer.bias
        if not self.training:
            return self._product(x, self._prune(weight), bias)
        if not self._called:
            self._called = True
        return (
            self._unit_noise(x, weight, bias) if self.per == "unit" else self._weight_noise(x, weight, bias)
        )

    def _only(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return the one input of a linear or convolution layer."""
        if isinstance(inputs, torch.fx.Proxy):  # torch.fx traces this module itself: nothing to count yet
            return inputs[0]
        if options.keys() - {"input"} or len(inputs) + len(options) != 1:
            count = len(inputs) + len(options)
            raise TypeError(f"inputs: expected one, as {type(self.layer).__name__} takes, got {count}")
        return inputs[0] if inputs else options["input"]

    def _unit_noise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = self._product(x, weight, None)
        clean = wide(out)
        spread = (wide(self.log_noise) / 2).exp()
        # One ε for each row and unit, at all positions: independent ones would average out.
        positions = weight.dim() - 2
        along = (-1, *(1 for _ in range(positions)))
        shape = (*out.shape[: out.dim() - positions], *along[1:])
        noisy = clean * (1 + spread.view(along) * torch.randn(shape, dtype=clean.dtype, device=clean.device))
        return (noisy if bias is None else noisy + bias.view(along)).to(out.dtype)

    def _weight_noise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean = self._product(x, weight, bias)
        spread = outside_autocast(self._spread, x, self.log_variance)
        return mean + (spread * torch.randn_like(spread)).to(mean.dtype)

    def _spread(self, x: Tensor, log_variance: Tensor) -> Tensor:
        variance = self._product(wide(x).square(), wide(log_variance).exp(), None)
        return (variance + _VARIANCE_FLOOR).sqrt()

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        convolution: Any = self.layer
        out: Tensor = convolution._conv_forward(x, weight, bias)  # with its stride and its kind of padding
        return out

    def _hooked(self, x: Tensor, obstacle: str) -> Tensor:
        """Call the layer with its pruned weight, so that its hooks run in evaluation mode."""
        if self.training or not hooked(self.layer) or "weight" not in self.layer._parameters:
            raise TypeError(f"layer: form='sparse' {obstacle}")
        out: Tensor = torch.func.functional_call(self.layer, {"weight": self.weight}, (x,))
        return out

    def _multiplied(self, out: Any) -> Tensor:
        if isinstance(out, torch.fx.Proxy) and not self.training:
            return out  # type: ignore[return-value]  # it stands for a Tensor
        if not isinstance(out, Tensor) or not out.is_floating_point():
            raise TypeError(
                f"layer: expected it to return one real floating-point Tensor, got {describe(out)}"
            )
        if not self.training:
            return out
        dim = unit_dimension(self.layer)
        place = dim if dim >= 0 else out.dim() + dim
        if not 0 <= place < out.dim() or out.shape[place] != self.units:
            raise ValueError(
                f"layer: expected {self.units} units in dimension {dim} of its output, got {list(out.shape)}"
            )
        spread = (self.log_alpha / 2).exp().view(-1, *(1 for _ in range(out.dim() - place - 1)))
        clean = wide(out)
        return (clean * (1 + spread * torch.randn_like(clean))).to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VariationalDropout:
        """Move and cast all but the threshold, which only moves: rounding it would prune other weights."""
        known = self._first_threshold if self.threshold.is_meta else float(self.threshold)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        if not self.threshold.is_meta:  # also after `to_empty`, which leaves it uninitialised
            noise = self.log_variance if self.form == "sparse" and self.per == "weight" else self.log_noise
            self.register_buffer("threshold", _scalar(known, noise.dtype, self.threshold.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        *lists: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *lists)
        if (name := prefix + "threshold") in missing:  # written by an older version
            missing.remove(name)

    def extra_repr(self) -> str:
        """Return form, granularity and threshold."""
        threshold = "meta" if self.threshold.is_meta else f"{float(self.threshold):g}"
        return f"form={self.form!r}, per={self.per!r}, threshold={threshold}"
