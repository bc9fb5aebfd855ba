"""The commands, on typer, and how they end; `cli.main` says what to do where the extras are not installed."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from .cli import print_info, print_version

__all__ = ["app", "guarded"]

EXPERIMENTS = ("digits", "distill", "stroop", "maze", "sudoku", "energy", "control", "horizon", "transfer")
"""Each is a module of this name beside this file, and in it an `Experiment` of this name."""
BENCHMARKS = ("halting", "recurrence", "energy", "route", "planning", "batcher", "equilibrium")
"""Each is a module of this name in `bench`, and in it a `Benchmark` of this name."""

RESUMES = "the same command goes on where this run ended"
KEPT = "the same command with --resume keeps what was measured"
AGAIN = "nothing of this run is kept, and the same command begins it anew"
REFUSED, INTERRUPTED = 2, 130  # 130 is a shell's own code for Ctrl-C
FULL = (errno.ENOSPC, errno.EDQUOT)

Function = TypeVar("Function", bound=Callable[..., None])


def guarded(again: str, *also: type[Exception]) -> Callable[[Function], Function]:
    """Decorate a command, so that it ends in one sentence on standard error and an exit code.

    Parameters
    ----------
    again : str
        What to do after a full disk or Ctrl-C, such as `RESUMES`.
    *also : exception types
        Those, besides ValueError and OSError, whose message is a sentence for the user.
    """
    refusals: tuple[type[Exception], ...] = (ValueError, OSError, *also)

    def decorate(command: Function) -> Function:
        @functools.wraps(command)
        def run(*arguments: Any, **options: Any) -> None:
            try:
                command(*arguments, **options)
                return
            except KeyboardInterrupt:
                sentence, code = f"interrupted; {again}", INTERRUPTED
            except refusals as error:
                sentence, code = str(error), REFUSED
                if isinstance(error, OSError) and error.errno in FULL:
                    what = f"{error.filename or 'a file'} could not be written"
                    sentence = f"the disk is full: {what}; free some space, then {again}"
            typer.echo(f"adaptcomp: {sentence}", err=True)
            raise typer.Exit(code)

        return run  # type: ignore[return-value]

    return decorate


class _Command(TyperCommand):
    """A command that lists its options where one is unknown."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's NoSuchOption, but typer may bring a click of its own
            if hasattr(error, "possibilities") and hasattr(error, "message"):
                known = [name for p in self.params for name in (*p.opts, *p.secondary_opts)]
                error.message += f". Options: {', '.join(known)}."
                error.possibilities = None  # those that resemble it are among them
            raise


def _single(function: Callable[..., None], name: str, panel: str, told: str, more: str = "") -> Any:
    """Return a command: `told` stands in the list of its group, `more` after it in its own help."""
    alone = typer.Typer(add_completion=False)
    about = f"{told} {more}"
    alone.command(name, cls=_Command, help=about, short_help=told, rich_help_panel=panel)(function)
    return typer.main.get_command(alone)


def _experiment(name: str) -> Any:
    experiment = getattr(import_module(f"adaptcomp_ext.experiments.{name}"), name)
    more = "The same command goes on where a run was interrupted."
    panel = "Commands" if name == "demo" else "Experiments"
    return _single(guarded(RESUMES)(experiment.command), name, panel, experiment.help, more)


def _benchmark(name: str) -> Any:
    package = import_module("adaptcomp_ext.experiments.bench")
    (benchmark,) = (b for b in package.BENCHMARKS if b.name == name)

    def command(**options: Any) -> None:
        getattr(package, f"bench_{name}")(**options)

    parameters = []
    for o in benchmark.Options.declared():
        option = typer.Option(*[f"--{o.name}"] * (o.default is False), help=o.help, min=o.least)
        kind: Any = Annotated[o.kind | None if o.optional else o.kind, option]
        parameters.append(Parameter(o.name, Parameter.KEYWORD_ONLY, default=o.default, annotation=kind))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return _single(guarded(KEPT, RuntimeError)(command), name, "Benchmarks", benchmark.help)


class _Declared(TyperGroup):
    """Commands that are made from declarations, each imported when it is wanted."""

    what: str
    names: tuple[str, ...]
    declared: ClassVar[staticmethod[[str], Any]]

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.names, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, name: str) -> Any:
        return self.declared(name) if name in self.names else super().get_command(ctx, name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"unknown {self.what} {args[0]!r}; expected one of {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


class _Commands(_Declared):
    """All commands: the demonstration, which is an experiment, and those below."""

    what, names, declared = "command", ("demo",), staticmethod(_experiment)


class _Experiments(_Declared):
    what, names, declared = "experiment", EXPERIMENTS, staticmethod(_experiment)


class _Benchmarks(_Declared):
    what, names, declared = "benchmark", BENCHMARKS, staticmethod(_benchmark)


app = typer.Typer(
    cls=_Commands,
    help="Adaptive computation for PyTorch: demonstration, experiments and benchmarks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
run = typer.Typer(
    cls=_Experiments,
    help="Run an experiment; write its report, its figures and its checkpoints into one folder. If it is"
    " interrupted, the same command goes on with it. Durations are those of one CPU core.",
    subcommand_metavar="EXPERIMENT [OPTIONS]",
    no_args_is_help=True,
)
bench = typer.Typer(
    cls=_Benchmarks,
    help="Run a benchmark; write its tables and its figure into one folder.",
    subcommand_metavar="BENCHMARK [OPTIONS]",
    no_args_is_help=True,
)
app.add_typer(run, name="run", short_help="Run an experiment.")
app.add_typer(bench, name="bench", short_help="Run a benchmark.")


def _version(wanted: bool) -> None:
    if wanted:
        print_version()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Print the version, what was compiled, and the torch in use."""
    print_info()


@app.command()
@guarded(AGAIN)
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders that hold results, at any depth. Default: adaptcomp-out."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File of the page: HTML with the pictures in it, or Markdown (.md).")
    ] = Path("adaptcomp-out/report.html"),
) -> None:
    """Gather the reports of all finished experiments into one page."""
    from .runs.page import find_runs, write_page

    runs = find_runs(folders or [Path("adaptcomp-out")])
    write_page(runs, out)
    typer.echo(f"{len(runs)} experiment{'s' if len(runs) > 1 else ''} on {out}")
