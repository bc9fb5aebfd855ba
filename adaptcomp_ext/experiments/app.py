"""The commands, on typer; `cli.main` says what to do where the extras are not installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from adaptcomp_ext.experiments.endings import guarded
from adaptcomp_ext.experiments.info import print_info, print_version

__all__ = ["app"]

EXPERIMENTS = ("digits", "distill", "stroop", "maze", "sudoku", "energy", "control", "horizon", "transfer")
"""Each is a package of this name beside this file, and in it an `Experiment` of this name."""
BENCHMARKS = ("halting", "energy", "route", "planning")
"""Each is a module of this name in `bench`, and in it a `Benchmark` of this name."""
RESUMES = "the same command goes on where this run ended"
KEPT = "the same command with --resume keeps what was measured"


class _Command(TyperCommand):
    """A command that lists its options where one is unknown."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's, but typer may bring a click of its own
            if hasattr(error, "option_name") and hasattr(error, "message"):
                known = [
                    name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)
                ]
                error.message += f". Options: {', '.join(known)}."
            raise


class _Declared(TyperGroup):
    """Commands that are made from declarations, each imported when it is wanted."""

    what = "command"
    names: tuple[str, ...] = ()

    def declared(self, name: str) -> Any:
        """Return the command of a declaration."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.names, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, name: str) -> Any:
        return self.declared(name) if name in self.names else super().get_command(ctx, name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"unknown {self.what} {args[0]!r}; expected one of {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def _single(name: str, told: str, function: Callable[..., None]) -> Any:
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=_Command, help=told)(function)
    return typer.main.get_command(alone)


class _Experiments(_Declared):
    what = "experiment"
    names: tuple[str, ...] = EXPERIMENTS

    def declared(self, name: str) -> Any:
        experiment = getattr(import_module(f"adaptcomp_ext.experiments.{name}"), name)
        told = f"{experiment.help} Goes on where it was interrupted."
        return _single(name, told, guarded(RESUMES)(experiment.command))


class _Commands(_Experiments):
    """All commands: the demonstration, which is an experiment, and those below."""

    what = "command"
    names: tuple[str, ...] = ("demo",)


class _Benchmarks(_Declared):
    what, names = "benchmark", BENCHMARKS

    def declared(self, name: str) -> Any:
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
        return _single(name, benchmark.help, guarded(KEPT, (ValueError, RuntimeError, OSError))(command))


app = typer.Typer(
    cls=_Commands,
    help="Adaptive computation for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(cls=_Benchmarks, help="Run a benchmark.", no_args_is_help=True)
app.add_typer(bench, name="bench")
run = typer.Typer(cls=_Experiments, help="Run an experiment.", no_args_is_help=True)
app.add_typer(run, name="run")


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
@guarded(None)
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with results. Default: adaptcomp-out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page, ending in .html or .md.")] = Path(
        "adaptcomp-out/report.html"
    ),
) -> None:
    """Gather the reports of the experiments in these folders into one page."""
    from adaptcomp_ext.experiments.runs.page import find_runs, write_page

    runs = find_runs(folders or [Path("adaptcomp-out")])
    write_page(runs, out)
    typer.echo(f"{len(runs)} experiment{'s' if len(runs) > 1 else ''} on {out}")
