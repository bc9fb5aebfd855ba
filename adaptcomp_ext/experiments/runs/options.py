"""The options that experiments share: each is declared once, with its type, its bounds and its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import typer
from typer.models import OptionInfo

from adaptcomp_ext.ops._checks import check_int, describe

__all__ = [
    "Cluster",
    "Data",
    "Device",
    "Download",
    "Epochs",
    "FirstSeed",
    "Listed",
    "Quick",
    "Seeds",
    "Steps",
    "Task",
    "Threads",
    "Workers",
    "check_option",
    "fetch_images",
]


class Listed(NamedTuple):
    """Mark an option that is a sequence in Python and a text with commas on the command line.

    Attributes
    ----------
    kind : type
        That of an element: str or float.
    what : str
        What the elements are called in an error, such as "numbers".
    """

    kind: type = str
    what: str = "names"

    def split(self, name: str, text: str) -> list[Any]:
        """Return the elements."""
        try:
            return [self.kind(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(
                f"--{name}: expected {self.what} with commas between them, got {text!r}"
            ) from None


Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with MNIST's four IDX files, or torchvision's root. Default: scikit-learn's digits."
    ),
]
Download = Annotated[
    bool,
    typer.Option("--download", help="Download missing files into the --data folder, through torchvision."),
]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
FirstSeed = Annotated[
    int, typer.Option("--seed", min=0, help="First of the seeds. A seed determines weights, order and noise.")
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Passes over the training images. Default: what suits the data."),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Train briefly, with few settings, to see that everything runs: the figures mean nothing.",
    ),
]
Task = Annotated[str, typer.Option(help="Task of the DeepMind Control Suite, such as walker-walk.")]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps of the simulator in each training, in all environments. Default: what suits the task.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Device on which models and data live: cpu, cuda or cuda:N.")
]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes side by side.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch in each process.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster that runs the processes: ray://HOST:10001 (a cluster elsewhere), auto (the one "
        "that this machine belongs to) or local (one that is started for this run). Its machines must "
        "see the folder of the results under the same path. Default: processes of this machine, without "
        "Ray.",
    ),
]


def check_option(name: str, annotation: Any, value: Any) -> None:
    """Require of a Python caller what the command line requires: the type and the bounds of a number."""
    if get_origin(annotation) is not Annotated:
        return
    kind, *marks = get_args(annotation)
    kinds = get_args(kind) or (kind,)
    bounds = next((mark for mark in marks if isinstance(mark, OptionInfo)), None)
    listed = any(isinstance(mark, Listed) for mark in marks)  # its elements are the experiment's to check
    if bounds is None or listed or (value is None and type(None) in kinds):
        return
    if int in kinds:
        check_int(name, value, -(2**63) if bounds.min is None else int(bounds.min))
    elif float in kinds and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if bounds.min is not None and not value >= bounds.min:
            raise ValueError(f"{name}: expected a number >= {bounds.min:g}, got {value!r}")
        if bounds.max is not None and not value <= bounds.max:
            raise ValueError(f"{name}: expected a number <= {bounds.max:g}, got {value!r}")


def fetch_images(data: Path | None) -> None:
    """Do what ``--download`` says."""
    from adaptcomp_ext.experiments.data import fetch_mnist

    if data is None:
        raise ValueError("--download: expected a folder to download into (--data DIR), got none")
    try:
        fetch_mnist(data)
    except ModuleNotFoundError as error:  # of torchvision, which is not among the extras of every experiment
        raise ValueError(str(error)) from None
