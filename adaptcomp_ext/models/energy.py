"""A classifier that descends an energy of class logits and a latent."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn import EnergyDescent, EnergyResult, MLPEnergy
from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops.descent import check_number


class LatentEnergyClassifier(nn.Module):
    """A classifier that descends E(x, y, z) over class logits y and a latent z, each row to a local minimum.

    ::

        c = encoder(x),   v = [y | z] = 0 at first
        v ← v − α ∇E(v, c)   until E falls by at most tol;   the class is argmax y

    E is an `MLPEnergy` with ρ > 0, so that every row has a minimum. Where all hidden units are saturated, E
    is ρ/2·‖v‖² plus a linear term, and one step of α = 1/ρ reaches the minimum; elsewhere the descent takes
    more steps. α starts at 1/ρ; its logarithm is learned.

    Parameters
    ----------
    encoder : nn.Module
        ``encoder(x) -> [B, dim_context]``.
    dim_context : int
        Width of the encoder's output.
    classes : int
        Number of classes, the first elements of v.
    dim_latent : int
        Number of elements of z; 0: no latent.
    hidden : int or pair of int
        Widths of the energy's hidden layers.
    activation : str
        See `MLPEnergy`.
    ridge : float
        ρ > 0.
    max_steps : int
        Upper bound on the number of steps, at least 1.
    tol : float
        A row converges when its energy falls by at most this.

    Attributes
    ----------
    descend : EnergyDescent
        It has ``accept="if_lower"`` and ``backtracking=0.5``, because steps of a fixed size can oscillate
        across a narrow valley; and ``gradient="stepwise"``, for a loss on the logits after every step
        (``keep_trace=True``). Its attributes may be changed between calls.

    Notes
    -----
    The latent-variable energy follows LeCun et al. 2006 ("A Tutorial on Energy-Based Learning"); training
    through the descent follows Du et al. 2022 ("Learning Iterative Reasoning through Energy Minimization").
    Unlike LeCun's, this energy is not bounded below by 0, and is not trained to equal the loss. Arguments
    that are not as described raise TypeError or ValueError.

    Examples
    --------
    >>> model = LatentEnergyClassifier(encoder, dim_context=128)
    >>> result = model(images)
    >>> classes, steps = model.logits(result.y).argmax(dim=1), result.steps
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim_context: int,
        classes: int = 10,
        dim_latent: int = 16,
        hidden: int | tuple[int, int] = 64,
        activation: str = "silu",
        ridge: float = 1.0,
        max_steps: int = 50,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected an nn.Module, got {describe(encoder)}")
        self.classes = check_int("classes", classes, 1)
        self.dim_latent = check_int("dim_latent", dim_latent, 0)
        ridge = check_number("ridge", ridge, 0, math.inf, ends="()")
        self.encoder = encoder
        self.energy = MLPEnergy(
            classes + dim_latent, check_int("dim_context", dim_context, 1), hidden, activation, ridge
        )
        self.log_step_size = nn.Parameter(torch.tensor(-math.log(ridge)))
        self.descend = EnergyDescent(
            self.energy,
            max_steps=max_steps,
            tol=tol,
            accept="if_lower",
            backtracking=0.5,
            gradient="stepwise",
        )

    @property
    def step_size(self) -> Tensor:
        """The step size α, a scalar tensor; differentiable."""
        return self.log_step_size.exp()

    def start(self, context: Tensor) -> Tensor:
        """Return v₀ = 0, [B, classes + dim_latent], for encoded inputs [B, dim_context]."""
        return context.new_zeros(context.shape[0], self.energy.dim_y)

    def logits(self, v: Tensor) -> Tensor:
        """Return the class logits [..., classes] of points [..., classes + dim_latent]."""
        return v[..., : self.classes]

    def forward(self, x: Tensor, step_size: Tensor | None = None) -> EnergyResult:
        """Descend the energy of each row.

        Parameters
        ----------
        x : Tensor
            The encoder's input, [B, ...].
        step_size : Tensor, optional
            Step size of this call, scalar or [B]. Default: the learned one.

        Returns
        -------
        EnergyResult
            ``y`` and the trace's outputs hold [y | z]: see `logits`.
        """
        # Autocast may have narrowed the context, and the energy has one dtype.
        context = self.encoder(x).to(self.log_step_size.dtype)
        result: EnergyResult = self.descend(
            self.start(context), context, step_size=self.step_size if step_size is None else step_size
        )
        return result
