"""The ops in plain PyTorch: the specification that the kernels are tested against.

The functions are readable and differentiable to any order. They are slow: nothing is fused, and nothing is
checked. Each module has the name of its family in ``csrc``, ``adaptcomp_ext.ops``, ``tests`` and
``benchmarks``.
"""

from adaptcomp_ext.reference.act import act_step, act_step_backward
from adaptcomp_ext.reference.bernoulli import bernoulli_step, bernoulli_step_backward
from adaptcomp_ext.reference.compaction import compact_index, compact_index_padded, gather_rows, scatter_rows
from adaptcomp_ext.reference.confidence import confidence
from adaptcomp_ext.reference.convergence import convergence_step, stands_still
from adaptcomp_ext.reference.descent import (
    DescentRule,
    clipped,
    descent_update,
    descent_update_backward,
    energy_descent,
    judge,
)
from adaptcomp_ext.reference.halting import act_halt_backward, halt_rows, halt_rows_backward, plan_packing
from adaptcomp_ext.reference.hopfield_energy import hopfield_energy
from adaptcomp_ext.reference.linear import linear
from adaptcomp_ext.reference.mlp_energy import mlp_energy
from adaptcomp_ext.reference.philox import normals, uniform
from adaptcomp_ext.reference.pondernet import pondernet_step, pondernet_step_backward
from adaptcomp_ext.reference.q_halt import q_halt_least, q_halt_step, q_halt_targets
from adaptcomp_ext.reference.quadratic_energy import quadratic_energy
from adaptcomp_ext.reference.recurrence import recurrence
from adaptcomp_ext.reference.route import merge_rows, split_rows

__all__ = [
    "DescentRule",
    "act_halt_backward",
    "act_step",
    "act_step_backward",
    "bernoulli_step",
    "bernoulli_step_backward",
    "clipped",
    "compact_index",
    "compact_index_padded",
    "confidence",
    "convergence_step",
    "descent_update",
    "descent_update_backward",
    "energy_descent",
    "gather_rows",
    "halt_rows",
    "halt_rows_backward",
    "hopfield_energy",
    "judge",
    "linear",
    "merge_rows",
    "mlp_energy",
    "normals",
    "plan_packing",
    "pondernet_step",
    "pondernet_step_backward",
    "q_halt_least",
    "q_halt_step",
    "q_halt_targets",
    "quadratic_energy",
    "recurrence",
    "scatter_rows",
    "split_rows",
    "stands_still",
    "uniform",
]
