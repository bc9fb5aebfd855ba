"""An experiment: functions that lay out its cells, measure a cell, and report; the rest is here."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import typer
from rich.console import Console

from adaptcomp_ext.experiments.device import device_named
from adaptcomp_ext.experiments.style import QUICK

from .cells import Cell, RunFolder, Worker, run_cells
from .cluster import check_cluster
from .options import Cluster, Device, Download, Listed, Threads, Workers, check_option, fetch_images
from .report import Block, publish
from .results import Results
from .statistics import counted

__all__ = ["Experiment", "Setup", "experiment", "grid"]


class Setup(NamedTuple):
    """An experiment laid out.

    Attributes
    ----------
    config : dict
        Everything that the results depend on, as JSON. A folder with another configuration is refused.
    cells : list of Cell
        What is run, in this order.
    then : callable, optional
        ``then(results) -> cells``: further cells whose options depend on the results of `cells`.
    about : str
        What the run begins by printing, such as the data.
    then_alone : bool
        Whether the further cells run one after another on one thread, as timings must.
    """

    config: dict[str, Any]
    cells: list[Cell]
    then: Callable[[Results], list[Cell]] | None = None
    about: str = ""
    then_alone: bool = False


def grid(
    parts: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], common: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Make a cell ``NAME-seed-N`` for each seed and, within it, each part; all have the `common` options."""
    return [
        Cell(f"{name}-seed-{seed}", {**(common or {}), **options}, seed)
        for seed in seeds
        for name, options in parts.items()
    ]


Parameter = inspect.Parameter
Report = Callable[[Results], Sequence[Block]]


class Experiment:
    """A callable that runs an experiment: ``digits(data, out, seeds=3, quick=True)``.

    Its parameters are those of the function that lays it out, and ``out`` (folder of the results and
    checkpoints), ``device`` (on which models and data live, see `device_named`), ``workers`` and ``threads``
    (processes side by side, and threads of torch in each), ``cluster`` (the Ray cluster that runs them, see
    `run_cells`) and ``console`` (where to print). A folder
    that holds another configuration is refused; an interrupted run goes on. Returns the content of
    ``NAME.json``. The same parameters are the options of ``adaptcomp run NAME``.

    Parameters
    ----------
    setup : callable
        ``setup(**options) -> Setup``. Its name is that of the experiment, its parameters are the options, and
        its docstring is the help. Parameters before ``*`` may be given by position.
    measure : Worker
        ``measure(cell, folder, tick) -> result``: runs one cell. At the top of a module, for other processes.
    out : str
        Default folder, in which ``{option}`` stands for an option's value.
    """

    def __init__(self, setup: Callable[..., Setup], measure: Worker, out: str | None = None) -> None:
        self.setup, self.measure = setup, measure
        self.report: Report | None = None
        self.name = self.__name__ = setup.__name__
        self.__module__, self.__doc__ = setup.__module__, setup.__doc__
        self.help = " ".join((inspect.getdoc(setup) or "").split("\n\n")[0].split())
        self.out = out or f"adaptcomp-out/{self.name}"
        options = list(inspect.signature(setup, eval_str=True).parameters.values())
        shown = self.out.format(**{option.name: option.name.upper() for option in options})
        folder = Annotated[Path | None, typer.Option(help=f"Folder of the results. Default: {shown}.")]
        by_name = Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature(
            [
                *(option for option in options if option.kind is not by_name),
                Parameter("out", Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=folder),
                *(option for option in options if option.kind is by_name),
                Parameter("device", by_name, default="cpu", annotation=Device),
                Parameter("workers", by_name, default=1, annotation=Workers),
                Parameter("threads", by_name, default=1, annotation=Threads),
                Parameter("cluster", by_name, default=None, annotation=Cluster),
                Parameter("console", by_name, default=None, annotation=Console | None),
            ],
            return_annotation=dict[str, Any],
        )

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Run what is not finished; write ``NAME.json``, ``NAME.md`` and the figures; return the first."""
        import matplotlib  # noqa: F401 (what only the report needs is missed before the training)
        import pandas  # noqa: F401

        bound = self.__signature__.bind(*arguments, **options)
        bound.apply_defaults()
        for name, parameter in self.__signature__.parameters.items():
            check_option(name, parameter.annotation, bound.arguments[name])
        given = dict(bound.arguments)
        out, device, workers, threads, cluster, console = (
            given.pop(name) for name in ("out", "device", "workers", "threads", "cluster", "console")
        )
        if device_named(device).type == "cuda" and cluster is not None:
            raise ValueError(
                f"device: expected cpu with a cluster, on which cells reserve no GPU, got {device!r}"
            )
        if cluster is not None:
            check_cluster(cluster)
        out = Path(self.out.format(**given) if out is None else out)
        console = console or Console()
        what = _on(device, self.setup(**given))
        folder = RunFolder.open(out, self.name, what.config)
        console.print(f"{what.about or f'[bold]{self.name}[/]'}; {counted(len(what.cells), 'cell')} in {out}")
        if what.config.get("quick"):
            console.print(f"[bold]{QUICK}[/]")
        how: dict[str, Any] = {"workers": workers, "threads": threads, "cluster": cluster}
        run_some = functools.partial(run_cells, folder, worker=self.measure, console=console)
        results = Results(what.cells, run_some(what.cells, **how), what.config, folder=out)
        if what.then:
            more = what.then(results)
            alone = {"workers": 1, "threads": 1} if what.then_alone else {}
            found = {**results.found, **run_some(more, **{**how, **alone})}
            results = Results([*what.cells, *more], found, what.config, folder=out)
        assert self.report is not None, f"{self.name}: no function was decorated with @{self.name}.reports"
        return publish(self.name, out, results, self.report, console)

    def reports(self, report: Report) -> Report:
        """Decorate the function ``report(results) -> blocks``."""
        self.report = report
        return report

    @property
    def command(self) -> Callable[..., None]:
        """The function behind ``adaptcomp run NAME``; typer makes the options from its signature."""

        def run(**options: Any) -> None:
            if options.pop("download", False):
                fetch_images(options["data"])
            for name, convert in listed.items():
                options[name] = convert(name, options[name])
            self(**options)

        listed, parameters = {}, []
        for parameter in self.__signature__.parameters.values():
            if parameter.name == "console":
                continue
            marks = get_args(parameter.annotation)[1:]
            for mark in marks:
                if isinstance(mark, Listed):
                    listed[parameter.name] = mark.split
                    typed = operator.getitem(Annotated, (str, *(m for m in marks if m is not mark)))
                    text = ",".join(f"{v:g}" if isinstance(v, float) else v for v in parameter.default)
                    parameter = parameter.replace(annotation=typed, default=text)
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
            if parameter.name == "data":
                parameters.append(
                    Parameter("download", Parameter.KEYWORD_ONLY, default=False, annotation=Download)
                )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__ = self.name
        return run


def _on(device: str, what: Setup) -> Setup:
    """Have the cells run on a device; on the CPU, which is not recorded, configurations stay as they were."""
    if device == "cpu":
        return what

    def moved(cells: list[Cell]) -> list[Cell]:
        return [cell._replace(options={**cell.options, "device": device}) for cell in cells]

    then = what.then
    return what._replace(
        config={**what.config, "device": device},
        cells=moved(what.cells),
        then=None if then is None else lambda results: moved(then(results)),
    )


def experiment(measure: Worker, out: str | None = None) -> Callable[[Callable[..., Setup]], Experiment]:
    """Decorate the function that lays out an experiment; see `Experiment`."""
    return lambda setup: Experiment(setup, measure, out)
