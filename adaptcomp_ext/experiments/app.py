"""The commands, on typer; `cli.main` says what to do where the extras are not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaptcomp_ext.experiments.info import print_info

__all__ = ["app"]

app = typer.Typer(
    help="Adaptive computation for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Run a benchmark.", no_args_is_help=True)
app.add_typer(bench, name="bench")
run = typer.Typer(help="Run an experiment.", no_args_is_help=True)
app.add_typer(run, name="run")


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"adaptcomp: {error}", err=True)
    return typer.Exit(2)


@app.command()
def info() -> None:
    """Print the version, what was compiled, and the torch in use."""
    print_info()


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder with the four IDX files of MNIST. Default: scikit-learn's digits.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("adaptcomp-out"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and jitter.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="For all repeats of the timing together.")] = 5.0,
) -> None:
    """Train a reader that looks longer at hard digits; time it; draw what it did. Under a minute."""
    from adaptcomp_ext.experiments.data import load_digits, load_mnist
    from adaptcomp_ext.experiments.demo import demo as run_demo

    try:
        images = load_digits() if data is None else load_mnist(data)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    run_demo(images, out, epochs=epochs, seed=seed, threads=threads, seconds=seconds)


@bench.command()
def halting(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/bench_halting"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: one or two minutes.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: as they are set.")] = None,
    cores: Annotated[str, typer.Option(help="Steps, out of gru, mlp and transformer.")] = "gru,mlp,transformer",
    grid: Annotated[str, typer.Option(help="default, quick or required.")] = "default",
    seconds: Annotated[float | None, typer.Option(min=0.1, help="For all repeats of one configuration.")] = None,
    limit_seconds: Annotated[float, typer.Option(min=0.0, help="Leave out configurations slower than this.")] = 1.5,
    compiled: Annotated[bool, typer.Option(help="Whether compiled contenders take part.")] = True,
    memory: Annotated[bool, typer.Option(help="Whether training memory is measured.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an interrupted run.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, tensors and step counts.")] = 0,
) -> None:
    """Time AdaptiveHalt against masking, boolean indexing and the limit."""
    from adaptcomp_ext.experiments.bench import bench_halting

    try:
        bench_halting(
            out=str(out),
            device=device,
            quick=quick,
            threads=threads,
            cores=cores,
            grid=grid,
            seconds=seconds,
            limit_seconds=limit_seconds,
            compiled=compiled,
            memory=memory,
            resume=resume,
            seed=seed,
        )
    except (ValueError, RuntimeError) as error:
        raise _fail(error) from None


@bench.command("energy")
def energy_benchmark(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/bench_energy"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: less than a minute.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: as they are set.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="For all repeats of one configuration.")] = None,
    compiled: Annotated[bool, typer.Option(help="Whether the compiled contender takes part.")] = True,
    memory: Annotated[bool, typer.Option(help="Whether training memory is measured.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, tensors and step counts.")] = 0,
) -> None:
    """Time EnergyDescent against autograd, torch.compile and hand-written loops."""
    from adaptcomp_ext.experiments.bench import bench_energy

    try:
        bench_energy(
            out=str(out),
            device=device,
            quick=quick,
            threads=threads,
            seconds=seconds,
            compiled=compiled,
            memory=memory,
            seed=seed,
        )
    except (ValueError, RuntimeError) as error:
        raise _fail(error) from None


@bench.command("route")
def route_benchmark(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/bench_route"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: less than half a minute.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: as they are set.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="For all repeats of one configuration.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, tensors and routed rows.")] = 0,
) -> None:
    """Time route against masking, boolean indexing and index_select."""
    from adaptcomp_ext.experiments.bench import bench_route

    try:
        bench_route(out=str(out), device=device, quick=quick, threads=threads, seconds=seconds, seed=seed)
    except (ValueError, RuntimeError) as error:
        raise _fail(error) from None


@run.command()
def sudoku(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("adaptcomp-out/sudoku"),
    size: Annotated[int, typer.Option(help="4 or 9.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs, each with its own split, puzzles and weights.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few updates, to see that it runs.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Solve Sudoku by descending a learnt energy, longer where it is harder. Two minutes per seed; ten for 9×9."""
    from adaptcomp_ext.experiments.sudoku import sudoku as run_sudoku

    try:
        out.mkdir(parents=True, exist_ok=True)
        run_sudoku(out, size=size, seeds=seeds, first_seed=seed, quick=quick, threads=threads)
    except (ValueError, OSError) as error:
        raise _fail(error) from None


@run.command()
def energy(
    data: Annotated[
        Path | None, typer.Option(help="Folder with the four IDX files of MNIST. Default: scikit-learn's digits.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("adaptcomp-out"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and corruption.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Report on so many training images instead of the test images.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few epochs and little timing.")] = False,
) -> None:
    """Train a latent-variable energy through its own descent; see which digits take many steps."""
    from adaptcomp_ext.experiments.data import load_digits, load_mnist
    from adaptcomp_ext.experiments.energy import energy as run_energy

    try:
        images = load_digits() if data is None else load_mnist(data)
        out.mkdir(parents=True, exist_ok=True)
        run_energy(images, out, epochs=epochs, seed=seed, threads=threads, held_out=held_out, quick=quick)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
