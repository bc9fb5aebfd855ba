"""When compaction pays: the public names of `adaptcomp_ext.nn.halting.cost_model`."""

from adaptcomp_ext.nn.halting.cost_model import (
    CostModel,
    at_once,
    count_weights,
    flops_per_row,
    never,
    schedule,
)

__all__ = ["CostModel", "at_once", "count_weights", "flops_per_row", "never", "schedule"]
