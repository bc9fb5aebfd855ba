"""Descent on an energy: the acceptance test of a point, the update to the next one, and the loop.

y ← clamp(y + σ η − α s m),  m ← μ m + clip(∇E)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.reference._broadcast import over
from adaptcomp_ext.reference.philox import normals

GOES_ON, HALTED, MAX_STEPS, NONFINITE, REJECTED = 0, 1, 2, 3, 4


class DescentRule(NamedTuple):
    """The constants of a descent."""

    max_steps: int
    tol: float = 0.0
    """Tolerance of the stopping rule. 0: the rule is off."""
    on_gradient: bool = False
    """Whether a row converges where ‖∇E‖ ≤ tol; else it does where \\|E' − E\\| ≤ tol."""
    if_lower: bool = False
    """Whether a point is rejected whose energy is above the row's."""
    noisy: bool = False
    """Whether σ η is added."""
    momentum: float = 0.0
    clip: float = 0.0
    """Upper bound on the norm of a row's gradient. 0: none."""
    low: float = -math.inf
    high: float = math.inf
    backtracking: float = 0.0
    """Factor of the step size after a rejection. 0: the step size stays."""
    seed: int = 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_row(numbers: Tensor | float, like: Tensor) -> Tensor | float:
    """Shape a number or a tensor [n] to broadcast over the rows of `like`."""
    return over(numbers, like) if isinstance(numbers, Tensor) and numbers.dim() > 0 else numbers


def _norm(rows: Tensor) -> Tensor:
    # In float64, where the norm of a finite gradient does not overflow.
    norm: Tensor = torch.linalg.vector_norm(rows.unsqueeze(-1).flatten(1).to(torch.float64), dim=1)
    return norm


def judge(
    rule: DescentRule, step: int, energy: Tensor, new: Tensor, finite: Tensor, norm: Tensor, moving: Tensor
) -> tuple[Tensor, Tensor]:
    """Return whether each row accepts its new point, and its status: 0 where it goes on.

    Parameters
    ----------
    step : int
        Number of the step; 0 judges the starting points.
    energy, new : Tensor
        Energy of the row and of the new point, [n].
    finite : Tensor
        bool [n]: whether the point and its energy are finite.
    norm : Tensor
        Norm of the gradient at the point, [n], for ``rule.on_gradient``.
    moving : Tensor
        bool [n]: whether the row's velocity was not zero.
    """
    if step == 0:
        return finite, torch.where(finite, GOES_ON, NONFINITE).to(torch.int8)
    energy, new = energy.to(torch.float64), new.to(torch.float64)
    goes_on = MAX_STEPS if step >= rule.max_steps else GOES_ON
    rejected = finite & ~(new <= energy) if rule.if_lower else torch.zeros_like(finite)
    measure = norm if rule.on_gradient else (new - energy).abs()
    stops = measure <= rule.tol if rule.tol > 0 else torch.zeros_like(finite)
    again = moving | bool(rule.noisy or rule.backtracking > 0)
    status = torch.where(stops, HALTED, goes_on)
    status = torch.where(rejected, torch.where(again, goes_on, REJECTED), status)
    status = torch.where(finite, status, NONFINITE)
    return finite & ~rejected, status.to(torch.int8)


def clipped(gradient: Tensor, clip: float) -> Tensor:
    """Clip each row's gradient to the norm `clip` (0: no clipping), in float32 (float64 for float64)."""
    wide = gradient.to(_wide(gradient.dtype))
    if clip == 0:
        return wide
    norm = _norm(gradient)
    longer = ~(norm <= clip)
    factor = torch.where(longer, clip / torch.where(longer, norm, 1.0), 1.0).to(wide.dtype)
    return over(factor, wide) * wide


def descent_update(
    y: Tensor,
    gradient: Tensor,
    step_size: Tensor | float,
    velocity: Tensor | None,
    noise: Tensor | None,
    rule: DescentRule,
) -> tuple[Tensor, Tensor]:
    """Return the next point, in y's dtype, and the velocity, in float32 (float64 for float64)."""
    m = clipped(gradient, rule.clip)
    if velocity is not None:
        m = rule.momentum * velocity + m
    start = y.to(m.dtype) if noise is None else y.to(m.dtype) + noise
    return (start - _per_row(step_size, m) * m).clamp(rule.low, rule.high).to(y.dtype), m


def descent_update_backward(
    y: Tensor,
    gradient: Tensor,
    step_size: Tensor | float,
    after: Tensor | None,
    noise: Tensor | None,
    rule: DescentRule,
    g_next: Tensor,
    g_after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in y (and the noise), the energy's gradient, the step sizes, and the velocity.

    `after` is the velocity after the step, None for the clipped gradient; the last result is the gradient in
    the velocity before the step. The clamp passes a gradient where it changes nothing. Clipping to the norm c
    passes c/‖g‖ (v − ĝ ⟨ĝ, v⟩), with ĝ = g/‖g‖.
    """
    after = clipped(gradient, rule.clip) if after is None else after
    sizes = _per_row(step_size, after)
    g_next = g_next.to(after.dtype)
    if rule.low > -math.inf or rule.high < math.inf:
        start = y.to(after.dtype) if noise is None else y.to(after.dtype) + noise
        free = start - sizes * after
        g_next = g_next * ((free >= rule.low) & (free <= rule.high))
    g_m = -sizes * g_next
    if g_after is not None:
        g_m = g_m + g_after
    g_step = -(g_next * after).unsqueeze(-1).flatten(1).sum(dim=1)
    g_gradient = g_m
    if rule.clip > 0:
        norm = _norm(gradient)
        longer = ~(norm <= rule.clip)
        length = torch.where(longer, norm, 1.0).to(after.dtype)
        unit = gradient.to(after.dtype) / over(length, after)
        along = (unit * g_m).unsqueeze(-1).flatten(1).sum(dim=1)
        bent = over(rule.clip / length, after) * (g_m - over(along, after) * unit)
        g_gradient = torch.where(over(longer, after), bent, g_m)
    return g_next, g_gradient, g_step, rule.momentum * g_m


class Descended(NamedTuple):
    """The result of `energy_descent`; `trace`: outputs, rows and steps, ordered by step and then by row."""

    y: Tensor
    energy: Tensor
    steps: Tensor
    status: Tensor
    trace: tuple[Tensor, Tensor, Tensor]


def energy_descent(
    energy: Callable[..., Tensor],
    y0: Tensor,
    context: Sequence[Tensor],
    step_size: Tensor | float,
    sigma: Tensor | float,
    rule: DescentRule,
    gradient: str = "detached",
    last: int | None = None,
    sample_ids: Tensor | None = None,
) -> Descended:
    """Run all steps of a descent, differentiable by plain autograd.

    Each step is computed twice: first without a graph, to decide which rows accept it, then with a graph for
    those rows. So no point that was rejected or not finite is part of the graph.

    Parameters
    ----------
    gradient : str
        "unrolled" (with `last`: through the last `last` steps of each row), "stepwise", "implicit" or
        "detached".
    """
    batch, wide = y0.shape[0], _wide(y0.dtype)
    through = gradient in ("unrolled", "stepwise") and torch.is_grad_enabled()
    cut = None  # each row's first differentiated step
    if last is not None and through:
        detached = energy_descent(energy, y0, context, step_size, sigma, rule, "detached", None, sample_ids)
        cut = detached.steps - last + 1
        behind = over(cut > 1, y0)
        y0 = torch.where(behind, y0.detach(), y0)  # also where the first steps were rejected
    sample = torch.arange(batch, device=y0.device) if sample_ids is None else sample_ids
    step_sizes = (
        step_size.to(wide)
        if isinstance(step_size, Tensor)
        else torch.tensor(step_size, dtype=wide, device=y0.device)
    )
    step_sizes = step_sizes.expand(batch)
    sigma = sigma.to(wide) if isinstance(sigma, Tensor) else sigma

    def evaluate(y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies and gradients, detached."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            e = energy(y, *(c.detach()[rows] for c in context))
            (g,) = torch.autograd.grad(e.sum(), y)
        return e.detach().to(wide), g

    all_rows = torch.arange(batch, device=y0.device)
    y = y0 if gradient == "unrolled" else y0.detach()
    velocity = torch.zeros(y0.shape, dtype=wide, device=y0.device)
    value, g = evaluate(y, all_rows)
    finite = value.isfinite() & y.detach().unsqueeze(-1).flatten(1).isfinite().all(dim=1)
    scale = torch.ones_like(value)
    moving = torch.zeros_like(finite)
    steps = torch.zeros_like(all_rows)
    _, status = judge(rule, 0, value, value, finite, value, moving)
    records = []
    for k in range(1, rule.max_steps + 1):
        rows = (status == GOES_ON).nonzero()[:, 0]
        if rows.shape[0] == 0:
            break
        noise = None
        if rule.noisy:
            noise = sigma * normals(rule.seed, sample[rows], k, y0[0].numel()).to(wide).view(
                rows.shape[0], *y0.shape[1:]
            )
        sizes = step_sizes * scale

        with torch.no_grad():
            point, m = descent_update(y[rows], g[rows], sizes[rows], velocity[rows], noise, rule)
        new, g_new = evaluate(point, rows)
        finite = new.isfinite() & point.unsqueeze(-1).flatten(1).isfinite().all(dim=1)
        accept, ends = judge(rule, k, value[rows], new, finite, _norm(g_new), moving[rows])
        taken = rows[accept]
        if through:
            if cut is not None:
                first = over(cut == k, y)
                y, velocity = (
                    torch.where(first, y.detach(), y),
                    torch.where(first, velocity.detach(), velocity),
                )
            elif gradient == "stepwise":
                velocity = velocity.detach()
            here = y[taken].detach() if gradient == "stepwise" else y[taken]
            here = here if here.requires_grad else here.requires_grad_()
            (slope,) = torch.autograd.grad(
                energy(here, *(c[taken] for c in context)).sum(), here, create_graph=True
            )
            taken_noise = None if noise is None else noise[accept]
            point, m = descent_update(here, slope, sizes[taken], velocity[taken], taken_noise, rule)
        else:
            point, m = point[accept], m[accept]
        y = y.index_copy(0, taken, point)
        velocity = torch.zeros_like(velocity).index_copy(0, taken, m) if rule.momentum > 0 else velocity
        moving = (velocity.detach() != 0).unsqueeze(-1).flatten(1).any(dim=1)
        value = value.index_copy(0, taken, new[accept])
        g = g.index_copy(0, taken, g_new[accept])
        if rule.backtracking > 0:
            scale = scale.index_copy(
                0, rows, torch.where(accept, scale[rows], scale[rows] * rule.backtracking)
            )
        steps = steps.index_fill(0, rows, k)
        status = status.index_copy(0, rows, ends)
        end = y[rows]
        if cut is not None:
            end = torch.where(over(cut[rows] > k, end), end.detach(), end)
        records.append((end, rows, torch.full_like(rows, k)))

    if gradient == "implicit" and torch.is_grad_enabled():
        y = _implicit(energy, y, context, rule, status)
    if torch.is_grad_enabled():
        finite_rows = ((status != NONFINITE) | (steps > 0)).nonzero()[:, 0]
        e = energy(y[finite_rows], *(c[finite_rows] for c in context)).to(wide)
        value = value.index_copy(0, finite_rows, e)
    empty = (y0.detach()[:0], all_rows[:0], all_rows[:0])
    outputs, row, number = (torch.cat(part) for part in zip(*records, strict=True)) if records else empty
    return Descended(y, value, steps, status, (outputs, row, number))


def _implicit(energy: Any, y: Tensor, context: Sequence[Tensor], rule: DescentRule, status: Tensor) -> Tensor:
    """Return y* − H⁻¹(∇E(y*, θ) − ∇E(y*)): y* with the gradient −H⁻¹ ∂²E/∂θ∂y of a minimum.

    Elements at a bound of the clamp have no gradient.
    """
    rows = (status != NONFINITE).nonzero()[:, 0]
    if rows.shape[0] == 0:
        return y
    here = y[rows].detach().requires_grad_()
    (g,) = torch.autograd.grad(energy(here, *(c[rows] for c in context)).sum(), here, create_graph=True)
    flat = g.flatten(1)
    columns = [
        torch.autograd.grad(
            flat[:, j].sum(), here, retain_graph=True, materialize_grads=True, allow_unused=True
        )[0].flatten(1)
        for j in range(flat.shape[1])
    ]
    free = ((here > rule.low) & (here < rule.high)).flatten(1)
    pairs = free[:, :, None] & free[:, None, :]
    eye = torch.eye(flat.shape[1], dtype=y.dtype, device=y.device)
    hessian = torch.where(pairs, torch.stack(columns, dim=1).detach(), eye)
    moved = torch.linalg.solve(hessian, torch.where(free, flat - flat.detach(), torch.zeros_like(flat)))
    return y.index_copy(0, rows, here.detach() - moved.view_as(here))
