"""The targets of Q-halting."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.ops import _checks


def q_halt_targets(
    logits: Tensor, right: Tensor, following: Tensor | None = None, last: Tensor | None = None
) -> Tensor:
    """Return the targets, in [0, 1], of the halting logits of one step, for a binary cross-entropy.

    ::

        q_halt     → 1 if the row's whole answer is right, else 0
        q_continue → σ(q'_halt) at the last possible step, σ(max(q'_halt, q'_continue)) before it

    with q' the logits of the same rows after one more step. They are the targets of the hierarchical
    reasoning model (Wang et al. 2025). A head with q_halt alone has the first of them (tiny recursive models,
    Jolicoeur-Martineau 2025).

    Parameters
    ----------
    logits : Tensor
        [n, 2]: q_halt and q_continue; or q_halt alone, [n] or [n, 1]. float32, float64, bfloat16 or float16.
    right : Tensor
        bool [n]: whether the row's answer after this step is right as a whole.
    following : Tensor, optional
        [n, 2]: the logits after one more step. A row that is NaN there has none. Default: no row has any.
        Where a row has none, q_continue's target is σ(q_continue), with which it has no gradient.
    last : Tensor, optional
        bool [n]: whether this step is the last possible one, number `max_steps`. Default: of no row.

    Returns
    -------
    Tensor
        In the shape and dtype of `logits`, without a gradient.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    logits = _checks.check_floating("logits", logits)
    rows, device = logits.shape[0] if logits.dim() else 0, logits.device
    if logits.shape not in ((rows, 2), (rows, 1), (rows,)) or logits.dim() == 0:
        raise ValueError(f"logits: expected shape [n, 2], [n, 1] or [n], got {list(logits.shape)}")
    flags = {"right": right} if last is None else {"right": right, "last": last}
    for name, value in flags.items():
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            raise TypeError(f"{name}: expected a bool Tensor, got {_checks.describe(value)}")
        if value.shape != (rows,) or value.device != device:
            raise ValueError(f"{name}: expected shape [{rows}] on {device}, got {_checks.describe(value)}")
    if following is not None:
        following = _checks.check_floating("following", following)
        if following.shape != (rows, 2) or following.device != device:
            raise ValueError(
                f"following: expected shape [{rows}, 2] on {device}, got {_checks.describe(following)}"
            )
    with torch.no_grad():
        if logits.shape != (rows, 2):
            return reference.q_halt_targets(logits.reshape(rows), right).reshape(logits.shape)
        if following is None:
            return reference.q_halt_targets(logits, right)
        targets = reference.q_halt_targets(logits, right, following, last)
        own = reference.q_halt_targets(logits, right)
        return torch.where(following.isnan().any(dim=1, keepdim=True), own, targets)
