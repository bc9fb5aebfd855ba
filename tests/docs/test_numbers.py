"""The numbers of the README and the documentation are those of the committed reports."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="a source distribution leaves the reports out")

POLICIES = {"FixedSteps": "fixed", "Confidence": "confidence", "ACT": "act"}
COLUMNS = {
    "`AdaptiveHalt`": "auto/limit",
    "boolean indexing": "boolean/limit",
    "masked": "masked/limit",
    "masked, `torch.compile`": "masked_compile/limit",
}


def tables(path: Path, first: str) -> list[dict[str, str]]:
    """The rows of the table of a document that has a column `first`."""
    for block in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.M):
        head, _, *rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in block.splitlines()]
        head = [c.strip("| ") for c in head]
        if first in head:
            return [dict(zip(head, [c.strip("|* ") for c in row], strict=True)) for row in rows]
    raise AssertionError(f"{path.name} has no table with a column {first!r}")


def quoted(text: str, value: float) -> bool:
    """Whether a number as it is written is `value`, rounded."""
    digits = -Decimal(text).as_tuple().exponent
    unit = 10.0**-digits
    return abs(float(text) - value) <= 0.5001 * unit


@cache
def halting() -> list[dict]:
    return json.loads((RESULTS / "bench_halting.json").read_text())["rows"]


@pytest.mark.promise("figures")
@pytest.mark.parametrize("name", ["README.md", "docs/measured.md"])
def test_the_halting_table(name):
    rows = tables(ROOT / name, "`AdaptiveHalt`")
    assert len(rows) >= (9 if name == "README.md" else 12)
    for row in rows:
        wanted = {
            "core": row.get("core", "gru"),
            "policy": POLICIES[row["policy"]],
            "batch": int(row["B"]),
            "dim": int(row["D"]),
            "fraction": float(row["mean/M"]),
            "training": row["mode"] == "train",
        }
        found = [
            r for r in halting() if wanted.items() <= r["config"].items() and r["config"]["max_steps"] == 16
        ]
        found = found or [r for r in halting() if wanted.items() <= r["config"].items()]
        assert found, wanted
        measured = found[0]
        assert quoted(row["lower bound, ms"], measured["times_ms"]["limit"]["median"]), row
        for column, ratio in COLUMNS.items():
            assert quoted(row[column], measured["ratios"][ratio]), (row, column)


@pytest.mark.promise("figures")
def test_the_energy_table():
    """Each pair is AVX-512 / AVX2."""
    reports = [
        {r["label"]: r for r in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}
        for name in ("bench_energy", "bench_energy_avx2")
    ]
    columns = {
        "eager autograd": "eager/kernel",
        "compiled": "compiled/kernel",
        "analytic": "analytic/kernel",
        "all steps": "kernel_all/kernel",
        "matrix product's rate": "kernel/matmul",
    }
    rows = tables(ROOT / "docs" / "measured.md", "eager autograd")
    assert len(rows) == len(reports[0]) == len(reports[1])
    for row in rows:
        mode = {"all steps": "all", "rows stop": "stop", "train": "train"}[row["mode"]]
        energy = row["energy"] if row["energy"] in ("hopfield", "quadratic") else f"mlp {row['energy']}"
        start, sizes = f"{mode} {energy} B={row['B']} ", f" y={row['y']} hidden={row['hidden']} "
        (label,) = (n for n in reports[0] if n.startswith(start) and sizes in n)
        times = [report[label]["times_ms"]["kernel"]["median"] for report in reports]
        assert all(quoted(n, t) for n, t in zip(row["kernel, ms"].split(" / "), times, strict=True)), row
        for column, ratio in columns.items():
            values = [report[label]["ratios"].get(ratio) for report in reports]
            if None in values:
                assert row[column] == "–", (label, column)
            elif ratio == "kernel/matmul":
                assert row[column] == " / ".join(f"{100 * value:.0f} %" for value in values), label
            else:
                assert row[column] == " / ".join(f"{value:.1f}" for value in values), (label, column)


@pytest.mark.promise("figures")
def test_the_peers():
    peers = {r["label"]: r for r in json.loads((RESULTS / "bench_peers.json").read_text())["rows"]}
    readme = {
        line.split("|")[1].strip(): line
        for line in (ROOT / "README.md").read_text().splitlines()
        if "|" in line
    }
    for name, peer in peers.items():
        (line,) = [
            line for first, line in readme.items() if name in first.lower() and peer["version"] in first
        ]
        assert f" {peer['ratios']['peer/own']:.1f}: " in line
    rows = tables(ROOT / "docs" / "measured.md", "peer")
    assert {row["peer"] for row in rows} == {f"{r['label']} {r['version']}" for r in peers.values()}
    for row in rows:
        peer = peers[row["peer"].split()[0]]
        assert row["work"] == peer["what"]
        assert row["time of the peer / time of adaptcomp_ext"] == f"{peer['ratios']['peer/own']:.1f}"


def of_halting(ratio: str, **wanted: object) -> list[float]:
    """A ratio of the configurations of the halting benchmark that have these values, those with M = 16."""
    rows = [r for r in halting() if wanted.items() <= r["config"].items() and r["config"]["max_steps"] == 16]
    return [r["ratios"][ratio] for r in rows if ratio in r["ratios"]]


def of_large(training: bool) -> list[float]:
    """How many times longer masking takes where B >= 1024, D >= 256 and the mean is M/4."""
    sizes = [(1024, 256), (4096, 256)]
    return [
        value
        for batch, dim in sizes
        for value in of_halting(
            "masked/auto", core="gru", batch=batch, dim=dim, fraction=0.25, training=training
        )
    ]


def bookkeeping(training: bool) -> list[float]:
    """Microseconds a step that `AdaptiveHalt` takes over the lower bound at B = 32, D = 64."""
    wanted = {"core": "gru", "batch": 32, "dim": 64, "training": training}
    rows = [r for r in halting() if wanted.items() <= r["config"].items()]
    over = [r["times_ms"]["auto"]["median"] - r["times_ms"]["limit"]["median"] for r in rows]
    return [1000 * ms / r["rows"]["longest"] for ms, r in zip(over, rows, strict=True)]


def of_energy(label: str, form: str) -> float:
    """How many times longer than the kernel a form of a descent takes."""
    rows = json.loads((RESULTS / "bench_energy.json").read_text())["rows"]
    (ratios,) = [r["ratios"] for r in rows if r["label"].startswith(label)]
    return ratios[f"{form}/kernel"]


def of_autograd(training: bool) -> list[float]:
    """How many times longer than a plain loop a plain function as an energy takes over all steps."""
    mode = "train" if training else "all"
    rows = json.loads((RESULTS / "bench_energy.json").read_text())["rows"]
    return [1 / r["ratios"]["eager/generic"] for r in rows if r["label"].startswith(mode)]


def of_stopping() -> list[float]:
    """How many times longer than rows that stop all steps take in the kernel, by the number of rows."""
    rows = json.loads((RESULTS / "bench_energy.json").read_text())["rows"]
    return [r["ratios"]["kernel_all/kernel"] for r in rows if r["label"].startswith("stop")]


def of_route(form: str, least: int, most: int) -> list[float]:
    """A form's time over route's where the number of rows is in between."""
    rows = json.loads((RESULTS / "bench_route.json").read_text())["rows"]
    return [r["ratios"][f"{form}/route"] for r in rows if least <= r["config"]["batch"] <= most]


def of_memory(form: str) -> list[float]:
    """MiB kept for the backward pass, by mean/M, at B = 1024, D = 256 with scripted halting."""
    memory = json.loads((RESULTS / "bench_halting.json").read_text())["memory"]
    wanted = {"core": "gru", "policy": "fixed", "batch": 1024, "dim": 256}
    rows = sorted(
        (r for r in memory if wanted.items() <= r["config"].items()), key=lambda r: r["config"]["fraction"]
    )
    return [r["bytes"][form] / 2**20 for r in rows]


def of_stroop(column: str, without: str = "") -> list[list[float]]:
    """Mean, low and high of a column in the report of the arms, from the table that lacks another column."""
    content = json.loads((RESULTS / "stroop-arms.json").read_text())["tables"]
    (rows,) = (t["rows"] for t in content if column in t["rows"][0] and without not in t["rows"][0])
    return [[100 * value for value in row[column][:3]] for row in rows]


def left_to_know() -> list[list[list[float]]]:
    """What knowing who is right adds to entropy, by proportion congruent in training and rate of calls."""
    rows = of_stroop("− entropy", without="− random")
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


def of_recurrence(label: str, ratio: str, report: str = "bench_recurrence") -> float:
    rows = json.loads((RESULTS / f"{report}.json").read_text())["rows"]
    return next(r["ratios"][ratio] for r in rows if r["label"] == label)


def of_batcher(label: str, *path: str) -> float:
    rows = {r["label"]: r for r in json.loads((RESULTS / "bench_batcher.json").read_text())["rows"]}
    value = rows[label]
    for key in path:
        value = value[key]
    return value


def of_equilibrium(matrix: str) -> float:
    rows = json.loads((RESULTS / "bench_equilibrium.json").read_text())["rows"]
    return next(r["ratios"]["best/own"] for r in rows if r["label"] == f"{matrix} B=1024 D=128")


def of_request(label: str) -> float:
    rows = json.loads((RESULTS / "bench_batcher.json").read_text())["requests"]
    return next(r["ratio"] for r in rows if r["label"] == label)


STREAM, SHORT = "D=512 mean=16 M=64", "D=128 mean=16 M=64"
QUOTES = {
    ("docs/measured.md", r"keeps (\S+) % of the slots in use and takes (\S+) times less time than"): lambda: [
        100 * of_batcher(STREAM, "utilization"),
        of_batcher(STREAM, "ratios", "batches/batcher"),
    ],
    ("docs/measured.md", r"ten times the mean, (\S+) times less\. It reaches (\S+) % of the speed"): lambda: [
        of_batcher("D=512 mean=8 M=256 slow=0.05", "ratios", "batches/batcher"),
        100 * of_batcher(STREAM, "ratios", "steps/batcher"),
    ],
    ("docs/measured.md", r"at half load wait (\S+) times as long"): lambda: [of_request(STREAM)],
    (
        "docs/limits.md",
        r"keeps (\S+) % of the speed of the steps alone where a step on a full block takes (\S+) ms, "
        r"and (\S+) % where it takes (\S+) ms",
    ): lambda: [
        value
        for label in (STREAM, SHORT)
        for value in (100 * of_batcher(label, "ratios", "steps/batcher"), of_batcher(label, "block_ms"))
    ],
    ("docs/measured.md", r"full block takes (\S+) ms, batches are faster: (\S+)\. Single"): lambda: [
        of_batcher(SHORT, "block_ms"),
        of_batcher(SHORT, "ratios", "batches/batcher"),
    ],
    ("docs/measured.md", r'"implicit"` take (\S+) \(W orthogonal\) and (\S+) times'): lambda: [
        of_equilibrium(matrix) for matrix in ("rotating", "symmetric")
    ],
    # A sentence, with its numbers as groups, and what they are computed from.
    ("README.md", r"(\S+) to (\S+) times its lower bound"): lambda: [
        min(of_halting("auto/limit", core="gru", batch=32, dim=64, fraction=1)),
        max(of_halting("auto/limit", core="gru", batch=32, dim=64)),
    ],
    ("README.md", r"takes (\S+) times less than that bound, (\S+) in training"): lambda: [
        of_recurrence(f"gru B=32 D=64 {mode} 1 thread", "alone/ours") for mode in ("infer", "train")
    ],
    ("README.md", r"(\S+) times as fast as eager autograd for 16 rows of 32, and (\S+) times for"): lambda: [
        of_energy("all mlp silu B=16", "eager"),
        of_energy("all mlp silu B=1024", "eager"),
    ],
    ("README.md", r"what autograd costs, and (\S+) to (\S+) times that"): lambda: [
        bound(of_autograd(True)) for bound in (min, max)
    ],
    ("docs/limits.md", r"without a stop rule it took (\S+) to (\S+) times"): lambda: [
        bound(of_autograd(False)) for bound in (min, max)
    ],
    ("docs/limits.md", r"Trained through all steps it takes (\S+) to (\S+) times"): lambda: [
        bound(of_autograd(True)) for bound in (min, max)
    ],
    (
        "docs/limits.md",
        r"is (\S+) times as fast at B = 16, (\S+) times at B = 128, (\S+) times at B = 256 and (\S+) times",
    ): of_stopping,
    (
        "README.md",
        r"it adds (\S+) \((\S+)–(\S+)\) and (\S+) points \((\S+)–(\S+)\), "
        r"weighting one CNN's rows (\S+) \((\S+)–(\S+)\) and (\S+) \((\S+)–(\S+)\)",
    ): lambda: [
        *chain(*of_stroop("ACC, 20 % called", without="that CNN − the CNN")),
        *chain(*of_stroop("that CNN − the CNN")),
    ],
    (
        "README.md",
        r"Knowing who is right beats entropy by up to (\S+) \((\S+)–(\S+)\) and (\S+) \((\S+)–(\S+)\)",
    ): lambda: [n for rates in left_to_know() for n in max(rates)],
    (
        "docs/experiments/stroop.md",
        r"reads more: (\S+), (\S+), (\S+), (\S+) and (\S+) points at .*? congruent, "
        r"and (\S+), (\S+), (\S+), (\S+) and (\S+) points where 99 %",
    ): lambda: [mean for rates in left_to_know() for mean, _, _ in rates],
    ("docs/experiments/stroop.md", r"at most (\S+) points better than entropy"): lambda: [
        max(row[0] for row in of_stroop("− entropy", without="− value"))
    ],
    ("docs/limits.md", r"Of the (\d+) configurations"): lambda: [len(halting())],
    ("docs/limits.md", r"in one: (\S+) %"): lambda: [
        100 * (max(r["ratios"]["auto/best"] for r in halting()) - 1)
    ],
    ("docs/limits.md", r"in small problems, by (\d+) %"): lambda: [
        100 * (max(1 / r["ratios"]["masked_compile/auto"] for r in halting() if r["config"]["compiled"]) - 1)
    ],
    ("docs/limits.md", r"(\d+) to (\d+) µs a step in inference, (\d+) to (\d+) µs in training"): lambda: [
        bound(bookkeeping(training)) for training in (False, True) for bound in (min, max)
    ],
    ("docs/limits.md", r"masking is up to (\S+) times as fast where"): lambda: [
        1 / min(of_route("masking", 64, 64))
    ],
    ("docs/limits.md", r"`index_copy` up to (\S+) times"): lambda: [1 / min(of_route("indexed", 64, 64))],
    ("docs/limits.md", r"takes up to (\d+) times as long"): lambda: [max(of_route("masking", 1024, 99999))],
    ("docs/limits.md", r"a tie throughout \((\S+) to (\S+) of"): lambda: [
        bound(of_route("indexed", 1024, 99999)) for bound in (min, max)
    ],
    (
        "docs/measured.md",
        r"it is (\S+), (\S+), (\S+) and (\S+) MiB at .* "
        r"against (\S+), (\S+), (\S+) and (\S+) MiB with masking",
    ): lambda: [*of_memory("auto"), *of_memory("masked")],
    ("docs/measured.md", r"(\S+) to (\S+) times faster in inference and (\S+) to (\S+) times"): lambda: [
        bound(of_large(training)) for training in (False, True) for bound in (min, max)
    ],
}


@pytest.mark.promise("figures")
@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[1])
def test_a_sentence_quotes_the_report(quote):
    name, pattern = quote
    text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
    (found,) = re.finditer(pattern, text)
    values = QUOTES[quote]()
    assert all(quoted(n, value) for n, value in zip(found.groups(), values, strict=True)), (found[0], values)


@pytest.mark.promise("figures")
def test_the_recurrence_table():
    rows = tables(ROOT / "docs" / "measured.md", "torch's layer")
    assert len(rows) == 10
    forms = {"loop": "loop", "hoisted": "hoisted", "torch's layer": "layer", "steps alone": "alone"}
    for row in rows:
        label = f"gru B={row['B']} D={row['D']} {row['mode']} 1 thread"
        for column, form in forms.items():
            reports = ("bench_recurrence", "bench_recurrence_avx2")
            values = [of_recurrence(label, f"{form}/ours", report) for report in reports]
            assert row[column] == " / ".join(f"{value:.1f}" for value in values), (label, column)


PAGES = sorted(p.stem for p in (ROOT / "docs" / "experiments").glob("*.md") if p.stem != "index")
NOT_MEASURED = {
    # Settings, sizes and versions, which no report of the page holds.
    "distill": {"2017"},
    "control": {
        "1.0.31",
        "3.3.3",
        "1.0.50",
        "3.17.0",
        "0.25",
        "0.2793",
        "512",
        "128",
        "1000",
        "192",
        "192000",
    },
}


def numbers_of(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers_of(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers_of(v)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.promise("figures")
@pytest.mark.parametrize("page", PAGES)
def test_the_numbers_of_an_experiment_stand_in_its_reports(page):
    """Numbers with a decimal point, or of three digits: each is a number of the page's reports, rounded."""
    text = (ROOT / "docs" / "experiments" / f"{page}.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?^```|!?\[[^]]*\]\([^)]*\)|`[^`]*`", " ", text, flags=re.M | re.S)
    prose = re.sub(r"(?<=\d),(?=\d{3})", "", prose)
    reports = [p for p in RESULTS.iterdir() if p.stem.startswith(page) and p.suffix in (".json", ".md")]
    # A page of tables rather than the raw numbers of its runs, among which nearly every number occurs.
    reports = [p for p in reports if p.suffix == ".md"] or reports
    assert reports
    known: list[float] = []
    for report in reports:
        content = report.read_text(encoding="utf-8")
        if report.suffix == ".json":
            known += numbers_of(json.loads(content))
        content = re.sub(r"(?<=\d),(?=\d{3})", "", content)
        known += [float(n) for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?", content)]
    known += [100 * n for n in known if abs(n) <= 1]
    missing = [
        n
        for n in re.findall(r"(?<![\d.])\d+(?:\.\d+)+|(?<![\d.])\d{3,}", prose)
        if n not in NOT_MEASURED.get(page, ()) and not any(quoted(n, abs(k)) for k in known)
    ]
    assert not missing
