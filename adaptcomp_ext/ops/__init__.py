"""Functional ops on rows: checks, allocation, ``torch.library`` registration, autograd.

Each op has the name of its family in ``csrc``, `adaptcomp_ext.reference`, ``tests`` and ``benchmarks``.

A subclass of ``torch.Tensor`` without a ``__torch_dispatch__`` is treated as a plain tensor: rows that are
moved keep the class (but no attributes of the object), and numbers computed for rows are plain tensors. A
subclass with a ``__torch_dispatch__`` raises TypeError, except for an asynchronous collective's, which is
waited for, and those of torch's tracers.
"""

from adaptcomp_ext.ops._backend import reference_kernels
from adaptcomp_ext.ops.act import ActStep, act_step
from adaptcomp_ext.ops.bernoulli import BernoulliStep, bernoulli_step
from adaptcomp_ext.ops.compaction import compact, compact_padded, scatter_rows
from adaptcomp_ext.ops.confidence import confidence
from adaptcomp_ext.ops.descent import DescentUpdate, descent_update
from adaptcomp_ext.ops.linear import linear
from adaptcomp_ext.ops.pondernet import PonderNetStep, pondernet_step
from adaptcomp_ext.ops.q_halt import q_halt_targets
from adaptcomp_ext.ops.route import merge_rows

__all__ = [
    "ActStep",
    "BernoulliStep",
    "DescentUpdate",
    "PonderNetStep",
    "act_step",
    "bernoulli_step",
    "compact",
    "compact_padded",
    "confidence",
    "descent_update",
    "linear",
    "merge_rows",
    "pondernet_step",
    "q_halt_targets",
    "reference_kernels",
    "scatter_rows",
]
