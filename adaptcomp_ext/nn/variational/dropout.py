"""`VariationalDropout`: a layer whose weights or outputs carry noise of learned strength."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.nn.variational.kl import kingma_kl, molchanov_kl
from adaptcomp_ext.ops._checks import check_choice, check_fraction, check_int, describe
from adaptcomp_ext.ops.descent import check_number

__all__ = ["FORMS", "GRANULARITIES", "WEIGHTED", "VariationalDropout"]

FORMS = ("sparse", "gaussian")
GRANULARITIES = ("weight", "unit")
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights can carry the noise."""
_CHANNELS_FIRST = (*WEIGHTED[1:], nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WIDTHS = ("out_features", "out_channels", "hidden_size", "num_features")
_TINY = 1e-8  # θ² + this: a weight that is exactly 0 has a large α, not an infinite one
_VARIANCE_FLOOR = 1e-16  # the square root's derivative at 0


class VariationalDropout(nn.Module):
    """Wrap a layer so that noise of learned strength α goes through it while it trains.

    form="sparse" (Molchanov, Ashukha & Vetrov 2017), for linear and convolution layers: every weight is N(θ, αθ²) independently,
    drawn through the pre-activations (local reparametrisation: Kingma, Salimans & Welling 2015)

        training:    out = θ*x + b + √(σ²*x²)·ε,   σ² = αθ²,   ε ~ N(0, 1) for each output of each row
        evaluation:  out = θ'*x + b,               θ' = 0 where log α > threshold, else θ

    with α for each weight. With ``per="unit"`` all weights that feed a unit share one α and one draw (Kingma et al.'s correlated
    weight noise; Neklyudov et al. 2017 prune by it), so that whole units die and `shrink` can remove them

        training:    out = (θ*x)·(1 + √α·ε) + b,   ε ~ N(0, 1) for each unit of each row, the same at all positions

    form="gaussian" (Kingma, Salimans & Welling 2015), for any layer: the outputs are multiplied by N(1, α), α ≤ 1 learned for
    each unit. Nothing is pruned; in evaluation the layer is as it was.

    Parameters
    ----------
    layer : nn.Module
        Becomes part of this module. Returns one Tensor.
    form : str, optional
        Default: "sparse" for ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d``, else "gaussian".
    per : str
        "weight" or "unit": what has an α of its own. Always "unit" for "gaussian".
    threshold : float
        On log α, in nats: 3 is a dropout rate of 0.95.
    log_alpha : float
        Where log α starts: of every unit; for ``per="weight"`` of a weight of average size, the σ of all weights being alike.
    features : int, optional
        Number of units, for a "gaussian" layer that does not tell (``out_features``, ``out_channels``, ``hidden_size``).

    Notes
    -----
    Add ``layer.kl() / N`` to a mean loss, N being the size of the training set; warm it up, or the network is pruned before it
    has learned. log α moves by whole nats, so its parameter wants a larger learning rate than weights (ten times is usual).

    Units lie in the last dimension of what a layer returns, in dimension 1 for convolutions and normalisations.

    The noise comes from torch's global generator. *Not promised:* the same noise for a row whatever surrounds it.
    """

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
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer: expected an nn.Module, got {describe(layer)}")
        if isinstance(layer, VariationalDropout):
            raise TypeError("layer: expected one without variational dropout, got a VariationalDropout")
        if form is None:
            form = "sparse" if isinstance(layer, WEIGHTED) else "gaussian"
        check_choice("form", form, FORMS)
        check_choice("per", per, GRANULARITIES)
        self.form = form
        self.threshold = check_number("threshold", threshold, -math.inf, math.inf, ends="()")
        start = check_number("log_alpha", log_alpha, -math.inf, 0.0 if form == "gaussian" else math.inf, ends="(]")
        if form == "sparse":
            if not isinstance(layer, WEIGHTED):
                raise TypeError(f"layer: form='sparse' expects a linear or convolution layer, got {type(layer).__name__}")
            self.per = per
        else:
            self.per = "unit"
        self.layer = layer
        self.units = self._count_units(layer, features)
        like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        if form == "sparse" and per == "weight":
            assert isinstance(layer, WEIGHTED)
            size = layer.weight.detach().square().mean().clamp(min=_TINY)
            self.log_variance = nn.Parameter((size.log() + start).expand_as(layer.weight).clone())
        else:
            self.log_noise = nn.Parameter(torch.full((self.units,), start, dtype=like.dtype, device=like.device))

    @staticmethod
    def _count_units(layer: nn.Module, features: int | None) -> int:
        known = next((getattr(layer, name) for name in _WIDTHS if isinstance(getattr(layer, name, None), int)), None)
        if known is None:
            if features is None:
                raise ValueError(f"features: expected the number of units, which {type(layer).__name__} does not tell, got None")
            return check_int("features", features, 1)
        if features is not None and features != known:
            raise ValueError(f"features: expected {known}, as {type(layer).__name__} has, got {features}")
        return known

    @property
    def log_alpha(self) -> Tensor:
        """log α: as the weights for ``per="weight"``, else [units]. Differentiable."""
        if self.form == "gaussian":
            return self.log_noise.clamp(max=0)
        if self.per == "unit":
            return self.log_noise
        assert isinstance(self.layer, WEIGHTED)
        return self.log_variance - (self.layer.weight.square() + _TINY).log()

    @property
    def kept(self) -> Tensor:
        """Bool, as the weights: which are not pruned ("sparse" only)."""
        if self.form != "sparse":
            raise ValueError('kept: expected form="sparse", got "gaussian", which prunes nothing')
        assert isinstance(self.layer, WEIGHTED)
        kept = ~(self.log_alpha.detach() > self.threshold)  # a log α that is not a number prunes nothing
        return kept if self.per == "weight" else self._along_units(kept).expand_as(self.layer.weight)

    def _along_units(self, values: Tensor) -> Tensor:
        assert isinstance(self.layer, WEIGHTED)
        return values.view(-1, *(1 for _ in self.layer.weight.shape[1:]))

    def kl(self) -> Tensor:
        """KL(q ‖ p) in nats, scalar, differentiable; 0 where all is noise.

        "sparse": the sum over all weights of the approximation of Molchanov et al. 2017, each counted with its own marginal also
        where a unit's weights share their noise; "gaussian": the sum over units of Kingma et al. 2015's. The bias has no
        posterior.
        """
        if self.form == "gaussian":
            return kingma_kl(self.log_alpha).sum()
        kl = molchanov_kl(self.log_alpha).sum()
        if self.per == "weight":
            return kl
        assert isinstance(self.layer, WEIGHTED)
        return kl * (self.layer.weight.numel() // self.units)

    def sparsity(self) -> float:
        """Share of the weights that are pruned in evaluation; 0 for "gaussian"."""
        return 0.0 if self.form == "gaussian" else 1.0 - float(self.kept.double().mean())

    def prune(self, share: float) -> None:
        """Set the threshold so that evaluation drops this share of what has an α of its own, the noisiest first.

        Parameters
        ----------
        share : float
            In [0, 1), rounded down to whole weights or units: at least one stays.

        Notes
        -----
        A threshold of 3 takes long training to be reached by whole units. Which of them matter least shows much earlier: drop a
        share, `shrink`, and train what is left a little further.
        """
        part = check_fraction("share", share, zero=True)
        if self.form != "sparse" or part == 1.0:
            raise ValueError(f'share: expected a share below 1 of a layer with form="sparse", got {share} of {self.form!r}')
        ordered = self.log_alpha.detach().double().flatten().sort().values
        last = len(ordered) - int(part * len(ordered)) - 1
        self.threshold = float(ordered[last])

    def dense(self) -> nn.Module:
        """Return a copy of the layer alone, its pruned weights 0: the same outputs as this module in evaluation."""
        layer = copy.deepcopy(self.layer)
        if self.form == "sparse":
            assert isinstance(layer, WEIGHTED)
            with torch.no_grad():
                layer.weight.mul_(self.kept)
        return layer

    def forward(self, *inputs: Any) -> Tensor:
        """Run the layer, with noise in training mode, pruned in evaluation mode."""
        if self.form == "gaussian":
            return self._multiplied(self.layer(*inputs))
        (x,) = inputs
        assert isinstance(self.layer, WEIGHTED)
        weight = self.layer.weight
        if not self.training:
            return self._product(x, torch.where(self.kept, weight, torch.zeros_like(weight)), self.layer.bias)
        if self.per == "unit":
            out = self._product(x, weight, None)
            spread = (self.log_noise / 2).exp()
            bias = torch.zeros_like(spread) if self.layer.bias is None else self.layer.bias
            # One draw for each row and unit, the same at all positions: independent ones would average out.
            positions = weight.dim() - 2
            shape = (*out.shape[: out.dim() - positions], *(1 for _ in range(positions)))
            noise = torch.randn(shape, dtype=out.dtype, device=out.device)
            along = (-1, *(1 for _ in range(positions)))
            return out * (1 + spread.view(along) * noise) + bias.view(along)
        mean = self._product(x, weight, self.layer.bias)
        spread = self._product(x.square(), self.log_variance.exp(), None)
        return mean + (spread + _VARIANCE_FLOOR).sqrt() * torch.randn_like(mean)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        convolution: Any = self.layer
        out: Tensor = convolution._conv_forward(x, weight, bias)  # with its stride and its kind of padding
        return out

    def _multiplied(self, out: Any) -> Tensor:
        if not isinstance(out, Tensor):
            raise TypeError(f"layer: expected it to return one Tensor, got {describe(out)}")
        if not self.training:
            return out
        dim = 1 if isinstance(self.layer, _CHANNELS_FIRST) else -1
        if out.shape[dim] != self.units:
            raise ValueError(f"layer: expected {self.units} units in dimension {dim} of its output, got {list(out.shape)}")
        spread = (self.log_alpha / 2).exp().view(-1, *(1 for _ in range(out.dim() - 2 if dim == 1 else 0)))
        return out * (1 + spread * torch.randn_like(out))

    def extra_repr(self) -> str:
        """Form, granularity and threshold."""
        return f"form={self.form!r}, per={self.per!r}, threshold={self.threshold:g}"
