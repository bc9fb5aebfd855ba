"""Functional ops on rows: checks, allocation, ``torch.library`` registration, autograd.

Each op has the name of its family in ``csrc``, `adaptcomp_ext.reference`, ``tests`` and ``benchmarks``.
"""

from adaptcomp_ext.ops._backend import reference_kernels
from adaptcomp_ext.ops.act import ActStep, act_step
from adaptcomp_ext.ops.compaction import compact, compact_padded, scatter_rows
from adaptcomp_ext.ops.confidence import confidence
from adaptcomp_ext.ops.descent import DescentUpdate, descent_update
from adaptcomp_ext.ops.pondernet import PonderNetStep, pondernet_step
from adaptcomp_ext.ops.route import merge_rows

__all__ = [
    "ActStep",
    "DescentUpdate",
    "PonderNetStep",
    "act_step",
    "compact",
    "compact_padded",
    "confidence",
    "descent_update",
    "merge_rows",
    "pondernet_step",
    "reference_kernels",
    "scatter_rows",
]
