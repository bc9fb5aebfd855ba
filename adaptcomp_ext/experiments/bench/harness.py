"""The benchmark harness: options, agreement, memory, compilation, report and figure.

A benchmark subclasses `Benchmark`: it declares its options, its configurations, how one of them is measured,
its tables and its figure. Everything that is timed is a function without arguments. The functions are checked
to compute the same before they are timed, since times of different results mean nothing.

Only torch is needed. The progress bar needs rich, the figures need matplotlib: where one of them is not
installed, one sentence says what is left out.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import inspect
import json
import os
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from types import NoneType
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptcomp_ext.experiments.device import device_named
from adaptcomp_ext.experiments.files import read_json, write_json, write_text
from adaptcomp_ext.experiments.style import save

from . import machine
from .timing import Call, Times, clock, interleave, summary

Row = Mapping[str, Any]
Report = Mapping[str, Any]
Columns = Mapping[str, str | Callable[[Any], str]]
"""Heads of a table, and what its cells are made by: a format string of the row's keys, or a function."""
Results = Mapping[str, Sequence[Tensor | None]]

QUICK = "Quick run (--quick): a small grid with little time for each point, so that its figures are rough."


# --- options ------------------------------------------------------------------------------------------------
def option(default: Any, text: str, least: float | None = None) -> Any:
    """Declare an option: a dataclass field with its help text and its smallest value."""
    return field(default=default, metadata={"help": text, "least": least})


class Declared(NamedTuple):
    """An option, as a command line is made from it."""

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    least: float | None


@dataclass(frozen=True)
class Options:
    """The options of every benchmark, declared once for Python and both command lines."""

    full_seconds: ClassVar[float] = 4.0

    out: str = option("results", "Folder of the results.")
    device: str = option("cpu", "Device of torch: cpu or cuda.")
    quick: bool = option(False, "A small grid with little time for each point.")
    threads: int | None = option(None, "Threads of torch. Default: as many as torch is set to.", 1)
    seconds: float | None = option(
        None, "Seconds for all rounds of one configuration. Default: {full:g}, or 1 with --quick.", 0.1
    )
    seed: int = option(0, "Seed of everything that is drawn.", 0)
    resume: bool = option(False, "Keep the rows of an interrupted run with the same settings.")
    progress: bool = option(True, "Whether a progress bar is shown.")

    def __post_init__(self) -> None:
        for declared in self.declared():
            value = getattr(self, declared.name)
            if declared.least is None or (value is None and declared.optional):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{declared.name}: expected a number, got {value!r}")
            if not value >= declared.least:
                raise ValueError(f"{declared.name}: expected at least {declared.least:g}, got {value}")

    @classmethod
    def declared(cls) -> Iterator[Declared]:
        """Yield the options with their types."""
        hints = get_type_hints(cls)
        for f in fields(cls):
            kinds = get_args(hints[f.name]) or (hints[f.name],)
            text = f.metadata["help"].format(full=cls.full_seconds)
            yield Declared(f.name, kinds[0], NoneType in kinds, f.default, text, f.metadata["least"])


# --- agreement ----------------------------------------------------------------------------------------------
class DisagreementError(RuntimeError):
    """A timed function gave another result than the reference, so that its times mean nothing."""


def results_of(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Make every call once."""
    return {name: call() for name, call in calls.items()}


def compare(results: Results, what: Sequence[str], reference: str, allowed: float) -> float:
    """Compare the tensors of every form with those of the reference form; None stands for zeros.

    Returns the largest difference, relative to the largest element of the reference's tensor; raises
    DisagreementError if one is larger than allowed, or not a number.
    """
    worst = 0.0
    for name, tensors in results.items():
        for label, got, want in zip(what, tensors, results[reference], strict=True):
            assert want is not None
            want = want.detach()
            got = torch.zeros_like(want) if got is None else got.detach()
            apart = float((got - want).abs().max()) / max(float(want.abs().max()), 1e-12)
            if not apart <= allowed:
                raise DisagreementError(
                    f"{name}: {label} differs from the {reference} form by {apart:.2e}, allowed {allowed:.0e}"
                )
            worst = max(worst, apart)
    return worst


def compare_gradients(gradients: Results, reference: str, allowed: float) -> float:
    """`compare` gradients."""
    what = [f"a gradient of shape {list(g.shape)}" for g in gradients[reference] if g is not None]
    return compare(gradients, what, reference, allowed)


def compare_both(
    outputs: Results, what: Sequence[str], gradients: Results, reference: str, allowed: float
) -> dict[str, float]:
    """`compare` the outputs and, in training, the gradients."""
    worst = {"output": compare(outputs, what, reference, allowed)}
    if gradients:
        worst["gradient"] = compare_gradients(gradients, reference, allowed)
    return worst


# --- torch.compile ------------------------------------------------------------------------------------------
def no_compiler(device: torch.device) -> str | None:
    """Return None if `torch.compile` works on the device, else the first line of its error."""
    try:
        torch.compile(lambda x: x + x)(torch.ones(8, device=device))
    except Exception as error:  # each missing part, such as a C++ compiler, has an exception of its own
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


class CompileCache:
    """Compiled functions of one model at a time: TorchDynamo gives up after a few recompilations."""

    def __init__(self) -> None:
        machine.separate_compiled_code()
        self._key: object = None
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.seconds: dict[str, float] = {}

    def get(self, key: object, name: str, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return the compiled form of a function of the model ``key``; options as for `torch.compile`."""
        if key != self._key:
            torch._dynamo.reset()
            self._key, self._compiled = key, {}
        if name not in self._compiled:
            self._compiled[name] = torch.compile(function, **options)
        return self._compiled[name]

    def first_call(self, label: str, call: Call) -> None:
        """Make a call that may have to compile, and record the time if that took over a tenth of a second."""
        measure = clock(torch.device("cpu"))
        compiling = (measure(call) - measure(call)) / 1e3
        if compiling > 0.1:
            self.seconds[label] = self.seconds.get(label, 0.0) + compiling


# --- memory -------------------------------------------------------------------------------------------------
def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class LiveBytes(TorchDispatchMode):
    """Follow the storages that operations return inside the mode: bytes alive ``now``, and their ``peak``.

    Storages that existed before are not counted. Memory that one operation allocates and frees is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        # A weak reference keeps the storage's address from being used again, so that it can serve as a key.
        self._before: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes of the followed storages that are still alive."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage._cdata not in self._before:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def both_passes(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run the forward and backward pass."""
    return torch.autograd.grad(loss(), leaves, allow_unused=True, materialize_grads=True)


def kept_and_peak(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> dict[str, int]:
    """Return the bytes alive between forward and backward pass, and the most at any time."""
    loss()  # once before: a first call may look at the step or the energy
    with LiveBytes() as live:
        value = loss()
        kept = live.now
        torch.autograd.grad(value, list(leaves), allow_unused=True)
    return {"kept": kept, "peak": live.peak}


HELD, HELD_BYTES = 128, 2**27
"""How many forward passes are held, unless what they keep reaches this number of bytes before."""


def kept_on_heap(loss: Callable[[], Tensor]) -> int | None:
    """Return by how many bytes a forward pass makes the heap grow until its backward pass; None: unknown.

    `kept_and_peak` sees the tensors that operations return, and the mode that it needs keeps `AdaptiveHalt`
    from a whole run in one kernel call. This sees every allocation on the CPU and changes nothing. Compiled
    code may use blocks of earlier calls again, so that many passes are held until no such block is left; the
    later half of them counts.
    """
    gc.collect()
    start = size = machine.heap_bytes()
    if start is None or size is None:
        return None
    held: list[Tensor] = []
    growths: list[int] = []
    while len(held) < HELD and size - start < HELD_BYTES:
        held.append(loss())
        after = machine.heap_bytes() or 0
        growths.append(after - size)
        size = after
    return int(median(growths[len(growths) // 2 :]))


# --- report -------------------------------------------------------------------------------------------------
class _Cells(string.Formatter):
    """`str.format` with a dash for what is None or missing, and with the formats ms and MB."""

    def get_field(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        try:
            return super().get_field(name, args, kwargs)
        except KeyError:
            return None, name

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            return "–"
        if spec == "ms":
            return f"{value:.3g}" if value < 100 else f"{value:.0f}"
        if spec.startswith("MB"):
            return f"{value / 1e6:.{spec[2:]}f}"
        return f"{format(value, spec)[:-1]} %" if spec.endswith("%") else format(value, spec)


@dataclass(frozen=True)
class Table:
    """A section of the report: a title, a text and a table of one line for each row."""

    title: str
    text: str
    rows: Sequence[Any]
    columns: Columns
    printed: bool = True
    """False: in the file only."""

    def lines(self) -> list[list[str]]:
        """Return the cells of every row."""
        cells = self.columns.values()
        form = _Cells().vformat
        return [[form(c, (), row) if isinstance(c, str) else c(row) for c in cells] for row in self.rows]

    def __str__(self) -> str:
        lines = [list(self.columns), *self.lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        filled = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
        head, rule, *rest = ["| " + " | ".join(line) + " |" for line in filled]
        return "\n".join([head, rule.replace(" ", "-"), *rest])


def compile_times(report: Report, text: str, what: str) -> Table:
    """Return the table of what compiling took."""
    times = [{"name": name, "s": seconds} for name, seconds in report["compile_seconds"].items()]
    return Table("Compile times", text, times, {what: "{name}", "s": "{s:.1f}"})


def panels(count: int, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def curves(
    axis: Any,
    rows: Sequence[tuple[float, Row]],
    under: str,
    styles: Mapping[str, tuple[str, str]],
    labels: Mapping[str, str],
    ticks: Sequence[int],
) -> None:
    """Draw ratios over ``under`` against the places of the rows, a line of its colour and style per form."""
    for name, (color, style) in styles.items():
        points = [(x, row["ratios"].get(f"{name}/{under}")) for x, row in rows]
        points = [point for point in points if point[1] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=labels[name], markersize=4)
    axis.axhline(1, color="tab:green", linewidth=1)
    axis.set_yscale("log")
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()


def legend(figure: Any, title: str) -> None:
    """Give the figure a title and, below its panels, one legend of the lines that have a label."""
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    handles = [line for label, line in lines.items() if not label.startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.suptitle(title, fontsize="medium")


# --- a benchmark --------------------------------------------------------------------------------------------
@contextmanager
def _progress(total: float, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on standard error; yields a function that sets its label and advances it."""
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError:
        if shown:
            print("rich is not installed: no progress bar is shown.", file=sys.stderr)
        yield lambda label, done: None
        return
    columns = progress.BarColumn(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    console = Console(stderr=True)
    with progress.Progress("{task.description}", *columns, console=console, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda label, done: bar.update(task, description=label, advance=done)


class Benchmark:
    """A benchmark; an instance is one run of it with its options.

    A subclass declares the class variables and the methods up to `draw`. Its module's docstring tells what is
    measured and how: the first line is the help of its command, and the report prints the rest. A
    configuration is a frozen dataclass with a ``label``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Options: ClassVar[type[Options]]
    block: ClassVar[float] = 0.0
    """Milliseconds of calls in a row; see `interleave`."""
    extra: ClassVar[Mapping[str, Any]] = {}
    """Keys of the report beside the rows, with their values before anything is measured."""
    help: ClassVar[str]
    about: ClassVar[str]

    def __init_subclass__(cls) -> None:
        text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
        cls.help, _, cls.about = text.partition("\n\n")

    def __init__(self, options: Any) -> None:
        quick = options.quick or getattr(options, "grid", None) == "quick"
        seconds = (1.0 if quick else options.full_seconds) if options.seconds is None else options.seconds
        self.options = replace(options, quick=quick, seconds=seconds)
        self.device = device_named(options.device)
        self.cache = CompileCache()
        self.report: dict[str, Any] = {}

    # What a subclass declares.
    def configs(self) -> Iterable[Any]:
        """Return the configurations of the options' grid, the most important first."""
        raise NotImplementedError

    def measure(self, config: Any) -> dict[str, Any]:
        """Verify and time one configuration: one row of the report, from `timed`."""
        raise NotImplementedError

    def weight(self, config: Any) -> float:
        """Return the time that a configuration takes, in any unit, for the progress bar."""
        return 1.0

    def extras(self) -> None:
        """Measure what belongs to no configuration, into ``self.report``."""

    @staticmethod
    def notes(report: Report) -> str:
        """Return what this run in particular did or left out."""
        return ""

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        """Return the tables of a report, given its rows that have times; empty ones are left out."""
        raise NotImplementedError

    @staticmethod
    def draw(report: Report, rows: Sequence[Row]) -> Any:
        """Return the figure of a report, or None if there is nothing to draw."""

    # What they all share.
    @classmethod
    def bench(cls, *positional: Any, **options: Any) -> dict[str, Any]:
        """Run the benchmark with the fields of its ``Options`` and write its report.

        Returns the content of the JSON file. Raises ValueError before anything runs if an option is out of
        range, and RuntimeError after everything has run and been written if any results disagreed.
        """
        return cls(cls.Options(*positional, **options)).run()

    @classmethod
    def main(cls, words: Sequence[str] | None = None) -> None:
        """Run the benchmark from a command line of its own, for which argparse is enough."""
        parser = argparse.ArgumentParser(description=cls.help)
        for o in cls.Options.declared():
            text = o.help if o.default in (None, False) else f"{o.help} Default: {o.default}."
            flag: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            given = flag if o.kind is bool else {"type": o.kind}
            parser.add_argument("--" + o.name.replace("_", "-"), default=o.default, help=text, **given)
        try:
            cls.bench(**vars(parser.parse_args(words)))
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")

    def timed(
        self,
        config: Any,
        calls: Mapping[str, Call],
        agreement: Callable[[], Any],
        ratios: Callable[[Times], dict[str, float]],
        **known: Any,
    ) -> dict[str, Any]:
        """Check that the calls agree, time them, and return a row of the report.

        ``agreement`` returns the largest differences, or raises DisagreementError: then the row's ``error``
        names the form that disagreed, and it has no times. ``known`` is what the row says besides.
        """
        row = {"config": asdict(config), "label": config.label, **known, "error": None}
        try:
            row["agreement"] = agreement()
        except DisagreementError as error:
            return {**row, "error": str(error)}
        times = interleave(calls, clock(self.device), self.options.seconds, block=self.block)
        row["times_ms"] = {name: summary(values) for name, values in times.items()}
        row["ratios"] = ratios(times)
        # Where other programs are running, the fastest rounds are the undisturbed ones.
        row["ratios_of_minima"] = ratios({name: [min(values)] for name, values in times.items()})
        row["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return row

    def run(self, configs: Iterable[Any] | None = None) -> dict[str, Any]:
        """Run configurations, by default those of the options' grid; as `bench`."""
        out = Path(self.options.out)
        path = out / f"bench_{self.name}.json"
        with machine.threads(self.options.threads):
            keeps = machine.keep_freed_memory()
            chosen = list(dict.fromkeys(self.configs() if configs is None else configs))
            settings = {k: v for k, v in asdict(self.options).items() if k in self._settings}
            self.report.update(
                benchmark=self.name,
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                **machine.describe(self.device),
                quick=self.options.quick,
                **({"note": QUICK} if self.options.quick else {}),
                settings={**settings, "keeps_freed_memory": keeps},
                rows=[],
                compile_seconds=self.cache.seconds,
            )
            self.report = {**self.extra, **self.report}
            out.mkdir(parents=True, exist_ok=True)
            measured = self._measured(path) if self.options.resume else {}
            with _progress(sum(map(self.weight, chosen)), self.options.progress) as show:
                for config in chosen:
                    show(config.label, 0.0)
                    row = measured.get(json.dumps(asdict(config))) or self.measure(config)
                    self.report["rows"].append(row)
                    write_json(path, self.report)
                    show(config.label, self.weight(config))
                show("beside the configurations", 0.0)
                self.extras()
        self.write(self.report, out)
        failed = [f"{row['label']}: {row['error']}" for row in self.report["rows"] if row["error"]]
        if failed:
            raise RuntimeError("results disagree:\n" + "\n".join(failed))
        return self.report

    _settings: ClassVar[tuple[str, ...]] = ("seconds", "seed", "limit_seconds", "compiled", "rows")

    def _measured(self, path: Path) -> dict[str, dict[str, Any]]:
        """Return the good rows, by configuration, of a run on the same machine with the same settings."""
        old = read_json(path) if path.exists() else None
        same = ("machine", "versions", "settings")
        if not isinstance(old, dict) or any(old.get(part) != self.report[part] for part in same):
            return {}
        self.cache.seconds.update(old.get("compile_seconds", {}))
        return {json.dumps(row["config"]): row for row in old["rows"] if row["error"] is None}

    @classmethod
    def write(cls, report: Report, out: Path) -> None:
        """Write the JSON, Markdown and PNG of a report, and print its tables."""
        path, kinds = out / f"bench_{cls.name}", ".json, .md"
        write_json(path.with_suffix(".json"), report)
        write_text(path.with_suffix(".md"), cls.markdown(report))
        figure = None
        try:
            figure = cls.draw(report, _timed(report))
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed: the figure is left out.", file=sys.stderr)
        if figure is not None:
            save(figure, path.with_suffix(".png"), 150, bool(report.get("quick")))
            kinds += ", .png"
        print("\n\n".join([_environment(report), *cls._sections(report, printed=True)]))
        print(f"\nReport: {path}{kinds}" + (f"\n{QUICK}" if report.get("quick") else ""))

    @classmethod
    def markdown(cls, report: Report) -> str:
        """Return the report, the content of the JSON file, as Markdown."""
        keeps = "The allocator keeps freed memory." if report["settings"]["keeps_freed_memory"] else ""
        parts = [f"# {cls.title}", _environment(report), cls.about, cls.notes(report), keeps, _busy(report)]
        return "\n\n".join([*filter(None, parts), *cls._sections(report, printed=False)]) + "\n"

    @classmethod
    def _sections(cls, report: Report, printed: bool) -> Iterator[str]:
        failed = [f"- {row['label']}: {row['error']}" for row in report["rows"] if row["error"] is not None]
        if failed:
            yield "## Errors\n\n" + "\n".join(failed)
        for table in cls.tables(report, _timed(report)):
            if table.rows and (table.printed or not printed):
                yield "\n\n".join(filter(None, [f"## {table.title}", table.text, str(table)]))


def _timed(report: Report) -> list[Row]:
    return [row for row in report["rows"] if row["error"] is None]


def _environment(report: Report) -> str:
    m, versions, settings = report["machine"], report["versions"], report["settings"]
    mark = f"**{QUICK}** " if report.get("quick") else ""
    # Where the number of threads is part of a configuration, those of the rows.
    counts = {row["config"].get("threads") for row in report["rows"]} - {None}
    threads = " and ".join(map(str, sorted(counts) or [m["threads"]]))
    return (
        f"{mark}{m['cpu']}, {m['cores']} cores, {threads} threads, device {m['device']}; "
        f"{_instruction_sets(versions)}Python {versions['python']}, torch {versions['torch']}; "
        f"{report['date']}; {settings['seconds']:g} s for each configuration, seed {settings['seed']}; "
        "float32."
    )


def _instruction_sets(versions: dict[str, Any]) -> str:
    """Name the instruction sets of our kernels and of torch; an older report does not know them."""
    ours = versions["build"].get("instruction_set")
    if ours is None:
        return ""
    text = "kernels with " + {"avx2": "AVX2", "avx512": "AVX-512"}.get(ours, "the basic instruction set")
    if "torch_instruction_set" in versions:
        variables = [f"{name}={value}" for name, value in versions["torch_variables"].items()]
        text += f", torch with {versions['torch_instruction_set']}"
        text += f" ({', '.join(variables)})" if variables else ""
    return text + "; "


def _busy(report: Report) -> str:
    """Return a warning if other programs were running, judged by the load average of the rows."""
    load = max((row["load"] or 0.0 for row in _timed(report)), default=0.0)
    cores = report["machine"]["cores"]
    if load <= cores + 0.5:
        return ""
    return (
        f"**The machine was not quiet**: its load average reached {load:.1f} on {cores} cores. The JSON file "
        "has the ratios of the fastest rounds as well, which suffer less."
    )
