"""What the experiments share: declaration, cells, training that resumes, results, statistics, reports."""

from ..files import read_json, write_json
from .cells import Cell, Later, RunFolder, Tick, run_cells, span
from .experiment import Experiment, Setup, experiment, grid
from .options import Data, Epochs, FirstSeed, Listed, Quick, Seeds, Steps, Task
from .results import Results
from .statistics import mcnemar, rank_correlation
from .training import Checkpoint, fit, shuffled

__all__ = [
    "Cell",
    "Checkpoint",
    "Data",
    "Epochs",
    "Experiment",
    "FirstSeed",
    "Later",
    "Listed",
    "Quick",
    "Results",
    "RunFolder",
    "Seeds",
    "Setup",
    "Steps",
    "Task",
    "Tick",
    "experiment",
    "fit",
    "grid",
    "mcnemar",
    "rank_correlation",
    "read_json",
    "run_cells",
    "shuffled",
    "span",
    "write_json",
]
