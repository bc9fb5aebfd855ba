"""What the experiments share: folders that remember their configuration, training that resumes, cells, intervals, reports."""

from adaptcomp_ext.experiments.files import read_json, write_json, write_text

from .cells import Cell, Tick, run_cells, span
from .checkpoint import Checkpoint
from .experiment import Plan, publish, run_plan, seeds_from
from .fit import fit, shuffled
from .folder import RunFolder
from .statistics import Difference, Interval, mcnemar, mean_interval, paired, rank_correlation, wilson
from .tables import counted, interval, percent, points, table
from .verdicts import ONE_SEED, Claim, judged, measured_over, said

__all__ = [
    "ONE_SEED",
    "Cell",
    "Checkpoint",
    "Claim",
    "Difference",
    "Interval",
    "Plan",
    "RunFolder",
    "Tick",
    "counted",
    "fit",
    "interval",
    "judged",
    "mcnemar",
    "mean_interval",
    "measured_over",
    "paired",
    "percent",
    "points",
    "publish",
    "rank_correlation",
    "read_json",
    "run_cells",
    "run_plan",
    "said",
    "seeds_from",
    "shuffled",
    "span",
    "table",
    "wilson",
    "write_json",
    "write_text",
]
