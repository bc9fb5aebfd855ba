"""What the experiments share: folders that remember their configuration, training that resumes, cells, intervals, reports."""

from .cells import Cell, Tick, run_cells, span
from .checkpoint import Checkpoint
from .experiment import Plan, publish, run_plan
from .fit import fit, shuffled
from .folder import RunFolder, read_json, write_json, write_text
from .statistics import Difference, Interval, mcnemar, mean_interval, paired, rank_correlation, wilson
from .tables import counted, interval, percent, points, said, table

__all__ = [
    "Cell",
    "Checkpoint",
    "Difference",
    "Interval",
    "Plan",
    "RunFolder",
    "Tick",
    "counted",
    "fit",
    "interval",
    "mcnemar",
    "mean_interval",
    "paired",
    "percent",
    "points",
    "publish",
    "rank_correlation",
    "read_json",
    "run_cells",
    "run_plan",
    "said",
    "shuffled",
    "span",
    "table",
    "wilson",
    "write_json",
    "write_text",
]
