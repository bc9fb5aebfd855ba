"""When compact="auto" compacts: it depends on shapes only, and wastes at most a factor of two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.cost_model import CostModel, at_once, count_weights, flops_per_row, never
from adaptcomp_ext.nn.halting.cost_model import schedule as make_schedule

SIZES = [1, 2, 3, 10, 100, 1000]


def schedule(weights=10_000, dim=64, **prices):
    return make_schedule(
        weights, [torch.zeros(1, dim)], [torch.zeros(1, dim)], CostModel(**prices) if prices else CostModel()
    )


def test_expensive_steps_pack_at_once():
    costly = schedule(weights=10**8)
    assert [costly.least(rows) for rows in SIZES] == [1] * len(SIZES)


def test_cheap_steps_wait_for_more_rows_to_halt():
    cheap = schedule(weights=1)
    least = [cheap.least(rows) for rows in SIZES]
    assert least == sorted(least) and least[0] > 1


def test_what_was_wasted_brings_packing_closer_until_it_is_due():
    s = schedule(weights=100)
    seen = [s.least(200)]
    while seen[-1] > 1:
        s.kept(seen[-1] - 1 if seen[-1] > 1 else 1)
        seen.append(s.least(200))
        assert seen[-1] <= seen[-2] and len(seen) < 200
    assert len(seen) > 2 and seen[-1] == 1
    s.packed()
    assert s.least(200) == seen[0]


def test_at_once_and_never():
    for rows in SIZES:
        assert at_once().least(rows) == 1
        assert never().least(rows) > rows


def test_never_less_than_one_row():
    s = schedule(weights=10**12)
    s.kept(10**6)
    assert s.least(0) == s.least(1) == s.least(10**9) == 1


@pytest.mark.parametrize("weights", [10, 1000, 100_000])
@pytest.mark.parametrize("rate", [0.02, 0.2, 0.9])
def test_at_most_about_twice_the_best_schedule_in_hindsight(weights, rate):
    """Compare the cost with the optimum, by dynamic programming over the steps at which to compact."""
    rows, steps = 200, 60
    generator = torch.Generator().manual_seed(0)
    halting = (torch.rand(rows, generator=generator).log() / torch.log1p(torch.tensor(-rate))).long()
    active = [int((halting >= n).sum()) for n in range(1, steps + 1)]
    active = active[: next((i for i, a in enumerate(active) if a == 0), len(active))]
    if len(active) < 2:
        return
    s = schedule(weights=weights)
    row, move, fixed = s.row, s.move, s.fixed

    spent, block = 0.0, active[0]
    for now in active[1:]:
        if block - now >= s.least(block):
            spent += fixed + now * move
            block = now
            s.packed()
        elif block > now:
            s.kept(block - now)
        spent += (block - now) * row

    best = {active[0]: 0.0}
    for now in active[1:]:
        packed = min(best.values()) + fixed + now * move
        best = {b: cost + (b - now) * row for b, cost in best.items()}
        best[now] = min(best.get(now, float("inf")), packed)
    assert spent <= 2.5 * min(best.values()) + fixed + rows * move


def test_flops_are_estimated_from_weights_and_positions():
    assert flops_per_row(100, torch.zeros(3, 10)) == 200
    assert flops_per_row(100, torch.zeros(3, 7, 10)) == 1400  # seven positions
    assert flops_per_row(None, torch.zeros(3, 10)) == 200  # one dense layer
    assert flops_per_row(0, torch.zeros(3, 10)) == 20
    assert flops_per_row(None, torch.zeros(3)) == 2
    assert flops_per_row(None, torch.zeros(3, 0)) == 0


def test_weights_of_modules_lists_and_functions():
    layer = nn.Linear(3, 4)
    assert count_weights(layer) == 16 and count_weights(nn.ModuleList([layer, nn.Linear(3, 4)])) == 16
    assert count_weights(lambda h: h) is None
    assert count_weights(nn.LazyLinear(4)) == 0


def test_lazy_modules_can_be_steps():
    for compact in ("auto", True):
        halt = ac.AdaptiveHalt(nn.LazyLinear(4), ac.FixedSteps(2), 3, compact=compact)
        assert halt(torch.zeros(5, 4)).steps.tolist() == [2] * 5


@pytest.mark.promise("seed")
def test_the_same_call_takes_the_same_decisions():
    sizes = []

    def step(h):
        sizes.append(h.shape[0])
        return h * 0.9

    n = torch.arange(300) % 37 + 1
    halt = ac.AdaptiveHalt(step, ac.FixedSteps(n), 40, compact="auto")
    runs = []
    for _ in range(3):
        sizes.clear()
        with torch.no_grad():
            halt(torch.zeros(300, 8))
        runs.append(list(sizes))
    assert runs[0] == runs[1] == runs[2]
    active = [int((n > k).sum()) for k in range(len(runs[0]))]
    assert all(size >= a for size, a in zip(runs[0], active, strict=True))
    assert any(size > a for size, a in zip(runs[0], active, strict=True))  # a cheap step: some rows stay


def test_auto_leaves_packing_out_where_it_does_not_pay_and_takes_it_where_it_does():
    def sizes(step, rows, dim):
        seen = []

        def counted(h):
            seen.append(h.shape[0])
            return step(h)

        if isinstance(step, nn.Module):
            step.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
            counted = step
        n = torch.arange(rows) % 8 + 1
        with torch.no_grad():
            ac.AdaptiveHalt(counted, ac.FixedSteps(n), 8, compact="auto")(torch.zeros(rows, dim))
        return seen

    assert sizes(lambda h: h + 1, 4, 2) == [4] * len(sizes(lambda h: h + 1, 4, 2))
    assert sizes(nn.Linear(512, 512), 64, 512) == [64 - 8 * k for k in range(8)]
