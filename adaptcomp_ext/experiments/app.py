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
    from adaptcomp_ext.experiments.demo import demo as run

    try:
        images = load_digits() if data is None else load_mnist(data)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    run(images, out, epochs=epochs, seed=seed, threads=threads, seconds=seconds)


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


@bench.command()
def energy(
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
