"""Convergence: one step against the reference and the formulas, with masks, dtypes and every size."""

from __future__ import annotations

import math

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.ops.convergence import CRITERIA, convergence_step_unchecked
from tests.helpers.tensors import FLOATS, ROWS, Unchanged, values

SIZES = [1, 3, 16, 17, 63, 64, 65, 200]


def blocks(rows, size, dtype, device, seed=0):
    """Return two readouts that differ by more or less, so that rounding decides no row, and counts."""
    last = values((rows, size), dtype, device, seed)
    scale = torch.tensor([0.0, 1e-3, 3.0], device=device)[torch.arange(rows, device=device) % 3]
    now = (last.double() + scale[:, None] * values((rows, size), torch.float64, device, seed + 1)).to(dtype)
    still = torch.arange(rows, device=device) % 5 - 1
    return now, last, still


def expected(now, last, still, criterion, tol):
    """The formulas in float64, row by row."""
    counts = []
    for a, b, count in zip(now.double().tolist(), last.double().tolist(), still.tolist(), strict=True):
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x != -math.inf or y != -math.inf]
        if criterion == "kl":
            za, zb = (math.fsum(math.exp(v) for v in side) for side in (a, b))
            p = [(math.exp(x) / za, math.exp(y) / zb) for x, y in pairs]
            change = sum(x * math.log(x / y) if y else math.inf for x, y in p if x)
            same = change <= tol
        else:
            change = math.sqrt(sum((x - y) ** 2 for x, y in pairs))
            size = math.sqrt(sum(x * x for x, _ in pairs if x != -math.inf))
            same = change <= (tol * size if criterion == "relative" else tol)
        counts.append(count + 1 if same and count >= 0 else 0)
    return counts


@pytest.mark.sanitizer
@pytest.mark.promise("formula")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_sizes(criterion, size, device):
    for rows in ROWS:
        now, last, still = blocks(rows, size, torch.float32, device)
        with Unchanged(now, last, still):
            got = convergence_step_unchecked(now, last, still, criterion, 0.1)
        assert torch.equal(got, ac.reference.convergence_step(now, last, still, criterion, 0.1))
    if size > 1 and rows > 2:
        assert 0 < int((got > 0).sum()) < rows


@pytest.mark.promise("formula")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_formula_with_masks(criterion, dtype, device):
    now, last, still = blocks(40, 21, dtype, device, 3)
    now[:20, ::4] = last[:20, ::4] = -math.inf  # they stay masked
    now[5, 1] = last[6, 2] = -math.inf  # a new mask, and one that has gone
    now[7, 0] = math.nan
    got = convergence_step_unchecked(now, last, still, criterion, 0.1)
    want = expected(now, last, still, criterion, 0.1)
    want[7] = 0
    if criterion == "kl":
        want[5] = int(got[5])  # the class's share decides
    assert got.tolist() == want and len(set(want)) > 2
    assert torch.equal(got, ac.reference.convergence_step(now, last, still, criterion, 0.1))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_layouts_and_compilation(criterion):
    now, last, still = blocks(12, 40, torch.float32, "cpu")
    want = convergence_step_unchecked(now, last, still, criterion, 0.1)
    columns = [torch.stack([t, t], 2)[:, :, 0] for t in (now, last)]
    assert torch.equal(convergence_step_unchecked(*columns, still, criterion, 0.1), want)

    def run(now, last, still):
        return convergence_step_unchecked(now, last, still, criterion, 0.1)

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(now, last, still), want)
    torch.library.opcheck(
        torch.ops.adaptcomp.convergence_step.default, (now, last, still, CRITERIA[criterion], 0.1)
    )


def test_a_sum_of_squares_that_overflows_does_not_stand_still(device):
    big = torch.full((2, 20), 1e30, device=device)
    still = torch.zeros(2, dtype=torch.int64, device=device)
    assert convergence_step_unchecked(big, big, still, "relative", 0.5).tolist() == [0, 0]
    assert convergence_step_unchecked(big, big, still, "absolute", 0.5).tolist() == [1, 1]


@pytest.mark.parametrize("size", [16, 33, 64, 65, 200])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_change_of_the_first_or_the_last_element_is_seen(criterion, size, device):
    last = torch.zeros(2, size, device=device)
    now = last.clone()
    now[0, 0] = now[1, -1] = 5.0
    still = torch.zeros(2, dtype=torch.int64, device=device)
    assert convergence_step_unchecked(now, last, still, criterion, 0.1).tolist() == [0, 0]
    assert convergence_step_unchecked(now, now, still, criterion, 0.1).tolist() == [1, 1]
