"""What the experiments share: folders that remember their configuration, training that resumes, cells, intervals, reports."""

from adaptcomp_ext.experiments.files import read_json, write_json, write_text

from .cells import Cell, Tick, run_cells, span
from .checkpoint import Checkpoint
from .experiment import Experiment, Setup, experiment, grid
from .fit import fit, shuffled
from .folder import RunFolder
from .options import Data, Epochs, FirstSeed, Listed, Quick, Seeds
from .plan import Plan, publish, run_plan, seeds_from
from .report import Block, Column, Picture, Table, Verdicts, panels, tabulate
from .results import Results
from .statistics import (
    ONE_SEED,
    Claim,
    Difference,
    Interval,
    Shown,
    counted,
    estimate,
    form,
    interval,
    judged,
    mcnemar,
    mean_interval,
    measured_over,
    millions,
    paired,
    percent,
    points,
    rank_correlation,
    said,
    table,
    wilson,
)

__all__ = [
    "ONE_SEED",
    "Block",
    "Cell",
    "Checkpoint",
    "Claim",
    "Column",
    "Data",
    "Difference",
    "Epochs",
    "Experiment",
    "FirstSeed",
    "Interval",
    "Listed",
    "Picture",
    "Plan",
    "Quick",
    "Results",
    "RunFolder",
    "Seeds",
    "Setup",
    "Shown",
    "Table",
    "Tick",
    "Verdicts",
    "counted",
    "estimate",
    "experiment",
    "fit",
    "form",
    "grid",
    "interval",
    "judged",
    "mcnemar",
    "mean_interval",
    "measured_over",
    "millions",
    "paired",
    "panels",
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
    "tabulate",
    "wilson",
    "write_json",
    "write_text",
]
