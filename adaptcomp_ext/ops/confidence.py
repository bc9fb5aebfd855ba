"""The confidence of a row of class logits."""

from __future__ import annotations

from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import compute_dtype, dtype_code, on_reference, place
from adaptcomp_ext.ops._library import register

# The codes of csrc/confidence/rows.h.
MEASURES = {"max_prob": 0, "margin": 1, "entropy": 2}


def _kernel(logits: Tensor, measure: int) -> Tensor:
    out = logits.new_empty((logits.shape[0],), dtype=compute_dtype(logits.dtype))
    _C.confidence(
        [
            *(logits.shape[0], logits.shape[1], measure, logits, dtype_code(logits.dtype), out),
            *place(logits.device),
        ]
    )
    return out


_confidence = register(
    "confidence(Tensor logits, int measure) -> Tensor",
    _kernel,
    lambda logits, measure: logits.new_empty((logits.shape[0],), dtype=compute_dtype(logits.dtype)),
    tensor_at=0,
)


def confidence(logits: Tensor, measure: str = "max_prob") -> Tensor:
    """Compute the confidence, in [0, 1], of each row of class logits.

    With probabilities p₁ ≥ p₂ ≥ … and entropy H it is p₁, the margin p₁ − p₂, or 1 − H / log C.

    Parameters
    ----------
    logits : Tensor
        [rows, C] with C ≥ 2; float32, float64, bfloat16 or float16.
    measure : str
        ``"max_prob"``, ``"margin"`` or ``"entropy"`` (normalised by its maximum log C, so that a threshold
        does not depend on C).

    Returns
    -------
    Tensor
        [rows], float32 (float64 for float64 logits). A logit of −∞ masks its class, which still counts in C;
        a row with a single class left has confidence 1. A row with a NaN, or with no class left, gives NaN.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The result is not differentiable.
    """
    logits = _checks.check_floating("logits", logits)
    _checks.check_choice("measure", measure, tuple(MEASURES))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected shape [rows, C] with C >= 2, got {list(logits.shape)}")
    logits = logits.detach()
    if on_reference():
        return reference.confidence(logits, measure)
    result: Tensor = _confidence(logits, MEASURES[measure])
    return result
