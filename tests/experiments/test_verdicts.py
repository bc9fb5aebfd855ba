"""Verdicts on made-up seeds: one function says in every report whether something holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

for extra in ("pandas", "rich", "scipy"):
    pytest.importorskip(extra)
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

import adaptcomp_ext.experiments as experiments
from adaptcomp_ext.experiments.runs.statistics import Claim, judged, paired, said

FOLDER = Path(experiments.__file__).parent
SEEDS = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=6)


def expected(seeds: list[float], bound: float, most: bool) -> str:
    """The verdict, from SciPy's own interval of the margins."""
    margins = [bound - seed if most else seed - bound for seed in seeds]
    if len(margins) == 1:
        return "Not decided: one seed"
    if len(set(margins)) == 1:
        low = high = margins[0]
    else:
        low, high = ttest_1samp(margins, 0).confidence_interval(0.95)
    mean = sum(margins) / len(margins)
    if min(abs(low), abs(high), abs(mean)) < 1e-6:
        return ""  # on the bound, where a rounding error decides
    if low > 0:
        return "Holds"
    if high < 0:
        return "Does not hold"
    return f"Not decided: {'met' if mean > 0 else 'missed'} by the mean, not by the whole interval"


@pytest.mark.promise("verdicts")
@given(SEEDS, st.sampled_from([-0.5, 0.0, 0.02]), st.booleans())
def test_a_verdict_is_that_of_the_interval(seeds: list[float], bound: float, most: bool) -> None:
    claim = Claim(paired(seeds, [0.0] * len(seeds)), bound, most)
    if wanted := expected(seeds, bound, most):
        assert judged("It is so.", claim) == f"**{wanted}.** It is so."


@given(SEEDS, SEEDS)
def test_several_claims_hold_together_or_not(one: list[float], other: list[float]) -> None:
    verdicts = [expected(seeds, 0.0, False) for seeds in (one, other)]
    said_of_both = judged("", *(Claim(paired(seeds, [0.0] * len(seeds))) for seeds in (one, other)))
    if "" in verdicts:
        return
    if "Not decided: one seed" in verdicts:
        assert said_of_both.startswith("**Not decided: one seed.")
    elif verdicts == ["Holds", "Holds"]:
        assert said_of_both.startswith("**Holds.")
    elif "Does not hold" in verdicts:
        assert said_of_both.startswith("**Does not hold.")
    else:
        assert said_of_both.startswith("**Not decided: m")


@given(SEEDS)
def test_a_direction_is_said_only_where_the_interval_has_one(seeds: list[float]) -> None:
    wanted = expected(seeds, 0.0, False)
    words = said(paired(seeds, [0.0] * len(seeds)), "more", "less")
    if wanted:
        known = {"Holds": "more", "Does not hold": "less", "Not decided: one seed": "not decided: one seed"}
        assert words == known.get(wanted, "not decided: the interval holds 0")


@pytest.mark.promise("verdicts")
@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda p: str(p.relative_to(FOLDER)))
def test_no_report_has_verdicts_of_its_own(path: Path) -> None:
    own = re.findall(r"Holds\b|[Dd]oes not hold|[Nn]ot decided: m", path.read_text(encoding="utf-8"))
    assert not own or path.name == "statistics.py"
