"""The series g = Σₖ (Jᵀ)ᵏ v of the backward pass of fixed points, with a length of its own for each row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.reference._broadcast import over

EACH = 16  # terms that are looked at one by one
EVERY = 4  # of the later ones every fourth is, because a look takes as long as a small product
_DONATED = "donated buffers"
"""In torch's error for the graph of a compiled step whose memory the first walk gives away."""


class Points(Protocol):
    """The points of the rows, and the step to apply to them."""

    points: list[Tensor]
    """[n, ...] each; those that move need a gradient."""
    moving: list[int]
    tol: float
    max_steps: int
    fixed_size: bool
    """Whether rows may see each other, so that all of them stay."""

    def apply_again(self, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Apply the step to some of the points; return points and results that move, with their graph."""


class Series:
    """The solution of g = Jᵀg + v for each row, where v is the gradient that arrives at its fixed point."""

    def __init__(self, points: Points) -> None:
        self._points = points
        self._reusable = True
        """Whether the graph of an application can be walked more than once."""

    def solve(self, after: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor]:
        """Return g for each tensor that moves.

        A row has converged when a term is at most the tolerance times g. A row that has not converged after
        `max_steps` products keeps the sum up to its smallest term, and a warning tells. A row whose v is not
        finite gets v.

        Parameters
        ----------
        after : sequence of Tensor
            The step's results at the points, with their graph.
        upstream : sequence of Tensor or None
            v; None stands for zero.
        """
        points = self._points
        here, now = [points.points[i] for i in points.moving], list(after)
        term = [
            torch.zeros_like(t) if v is None else v.to(t.dtype) for t, v in zip(now, upstream, strict=True)
        ]
        total = [t.to(compute_dtype(t.dtype), copy=True) for t in term]
        result = [t.clone() for t in total]
        least = size = _norms(total)
        kept = total  # the sum before the terms have grown, of the rows that are `rising`
        rising = torch.zeros_like(size, dtype=torch.bool)
        active = (size > 0) & size.isfinite()
        at = torch.arange(size.shape[0], device=size.device)
        tol = max(points.tol, *(torch.finfo(t.dtype).eps for t in now))
        left, failed = int(active.sum()), 0

        def write(rows: Tensor, sums: list[Tensor]) -> int:
            index = rows.nonzero()[:, 0]
            for whole, part in zip(result, sums, strict=True):
                whole.index_copy_(0, at.index_select(0, index), part.index_select(0, index))
            return index.shape[0]

        for k in range(1, points.max_steps + 1):
            if left == 0:
                break
            if 2 * left <= active.shape[0] and not points.fixed_size:
                index = active.nonzero()[:, 0]
                at, least, rising, active = (t.index_select(0, index) for t in (at, least, rising, active))
                term, total, kept = ([t.index_select(0, index) for t in ts] for ts in (term, total, kept))
                if self._reusable:
                    here, now = points.apply_again(at)
            term = self._product(at, here, now, term)
            if k > EACH and k % EVERY and k < points.max_steps:
                total = [t + more for t, more in zip(total, term, strict=True)]
                continue
            change = _norms(term)
            grown = ~(change <= least)  # NaN has grown, too
            if bool(grown.any()):
                fresh = grown & ~rising
                kept = [torch.where(over(fresh, t), t, old) for t, old in zip(total, kept, strict=True)]
                lost = active & ~change.isfinite()
                gone = write(lost, kept)
                active, left, failed = active & ~lost, left - gone, failed + gone
            rising = grown
            least = torch.fmin(least, change)
            total = [t + more for t, more in zip(total, term, strict=True)]
            done = active & ~grown & (change <= tol * _norms(total))
            if bool(done.any()):
                left -= write(done, total)
                active = active & ~done
        if left > 0:
            failed += write(
                active, [torch.where(over(rising, t), old, t) for t, old in zip(total, kept, strict=True)]
            )
        if failed:
            warnings.warn(
                f"AdaptiveHalt: the backward pass of {failed} of {size.shape[0]} rows has not converged in "
                f"max_steps = {points.max_steps} products. Their gradients are the sums up to the smallest "
                "term, and are not those of a fixed point. More steps help a row that converges slowly; a "
                "row that diverges has no stable fixed point",
                UserWarning,
                stacklevel=2,
            )
        return [t.to(to.dtype) for t, to in zip(result, after, strict=True)]

    def _product(self, at: Tensor, here: list[Tensor], now: list[Tensor], term: list[Tensor]) -> list[Tensor]:
        """Return Jᵀ times a vector for each row, by the graph from `here` to `now` if it is reusable."""
        if self._reusable:
            try:
                return _product(here, now, term, retain=True)
            except RuntimeError as error:
                if _DONATED not in str(error):
                    raise
                self._reusable = False
        return _product(*self._points.apply_again(at), term, retain=False)


def _product(here: list[Tensor], now: list[Tensor], term: list[Tensor], retain: bool) -> list[Tensor]:
    pairs = [(t, v) for t, v in zip(now, term, strict=True) if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(v) for v in term]
    found = torch.autograd.grad(
        [t for t, _ in pairs], here, [v for _, v in pairs], retain_graph=retain, allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, term, strict=True)]


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each row over all tensors."""
    norms: list[Tensor] = []
    for t in tensors:
        flat = t.flatten(1) if t.dim() > 1 else t[:, None]
        norms.append(torch.linalg.vector_norm(flat, dim=1, dtype=compute_dtype(t.dtype)))
    if len(norms) == 1:
        return norms[0]
    widest = torch.float64 if any(t.dtype == torch.float64 for t in norms) else torch.float32
    whole: Tensor = torch.linalg.vector_norm(torch.stack([t.to(widest) for t in norms], 1), dim=1)
    return whole
