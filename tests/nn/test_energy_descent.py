"""EnergyDescent: every option against the definition and the reference, and each row's status."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptcomp_ext as ac
from tests.helpers.energies import (
    DIM,
    HALTED,
    MAX_STEPS,
    NONFINITE,
    OPTIONS,
    REJECTED,
    Bowl,
    Mlp,
    Wells,
    by_hand,
    noise_of,
    options_of,
    problem,
)
from tests.helpers.halting import identical
from tests.helpers.tensors import FLOATS, LAYOUTS, assert_bitwise, laid_out, values

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MODES = ["unrolled", ("truncated", 2), "stepwise", "implicit", "detached"]


def run(name, dtype=torch.float32, device="cpu", batch=40, energy=None, **more):
    y0, x = problem(batch, dtype, device)
    energy = energy or Wells(dtype, device)
    return ac.EnergyDescent(energy, **options_of(name, **more))(y0, x)


def same_bits(a, b, rows=slice(None)):
    for got, want in zip(a[:4], b[:4], strict=True):
        assert identical(got[rows], want[rows] if isinstance(want, torch.Tensor) else want)


# --- against the definition and the reference ---------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_by_hand(device, name):
    options = options_of(name, keep_trace=True)
    result = run(name, torch.float64, device, keep_trace=True)
    y0, x = problem(40, torch.float64)
    energy = Wells(torch.float64)
    eta = noise_of(3, torch.arange(40), options["max_steps"], torch.float64)
    hand = {k: v for k, v in options.items() if k not in ("seed", "keep_trace")}
    rows = [by_hand(energy, y0[b], x[b], eta=eta[:, b], **hand) for b in range(40)]
    assert result.steps.tolist() == [r.steps for r in rows]
    assert result.status.tolist() == [r.status for r in rows]
    torch.testing.assert_close(result.y.cpu(), torch.stack([r.y for r in rows]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        result.energy.cpu().detach(), torch.tensor([r.energy for r in rows], dtype=torch.float64)
    )
    trace = result.trace
    assert trace.step.tolist() == sorted(trace.step.tolist())
    assert trace.outputs.shape[0] == int(result.steps.sum())
    for b, r in enumerate(rows):
        mine = (trace.row == b).nonzero()[:, 0]
        assert trace.step[mine].tolist() == list(range(1, r.steps + 1))
        assert trace.weights[mine].tolist() == [0.0] * (r.steps - 1) + [1.0] * (r.steps > 0)
        if r.steps:
            torch.testing.assert_close(
                trace.outputs[mine].cpu(), torch.stack(r.trace), atol=1e-12, rtol=1e-12
            )
    order = trace.step * 1000 + trace.row
    assert bool((order[1:] > order[:-1]).all())


def test_the_options_meet_every_way_to_end():
    statuses = {int(s) for name in OPTIONS for s in run(name, torch.float64).status}
    assert statuses == {HALTED, MAX_STEPS, NONFINITE, REJECTED}
    assert all(
        len(run(name).steps.unique()) > 2 for name in ("plain", "momentum", "backtracking", "gradient rule")
    )


@pytest.mark.promise("formula")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_and_reference_agree(device, dtype, name):
    got = run(name, dtype, device, keep_trace=True)
    with ac.reference_kernels():
        want = run(name, dtype, device, keep_trace=True)
    assert got.y.dtype == want.y.dtype == dtype
    assert (
        got.energy.dtype == want.energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    )
    # A row whose change of energy comes within rounding of the tolerance may end a step apart, and the clip's
    # norm is added up in another order.
    alike = (got.steps == want.steps) & (got.status == want.status)
    assert int(alike.sum()) >= 36 if dtype in (torch.bfloat16, torch.float16) else bool(alike.all())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.y[alike], want.y[alike], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.energy[alike], want.energy[alike], atol=4 * tolerance, rtol=tolerance)
    if bool(alike.all()):
        assert torch.equal(got.trace.row, want.trace.row)
        assert torch.equal(got.trace.step, want.trace.step)
        assert torch.equal(got.trace.weights, want.trace.weights)
        torch.testing.assert_close(got.trace.outputs, want.trace.outputs, atol=tolerance, rtol=tolerance)


@pytest.mark.promise("with gradients")
@pytest.mark.parametrize("gradient", MODES, ids=str)
@pytest.mark.parametrize("name", ["plain", "backtracking, momentum", "everything"])
def test_every_mode_and_every_grad_mode_has_the_same_bits(device, name, gradient):
    energy = Wells(device=device)
    want = run(name, device=device, energy=energy, gradient="detached")
    trace = run(name, device=device, energy=energy, gradient="detached", keep_trace=True).trace
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            same_bits(run(name, device=device, energy=energy, gradient=gradient), want)
            kept = run(name, device=device, energy=energy, gradient=gradient, keep_trace=True)
            same_bits(kept, want)
            for a, b in zip(kept.trace, trace, strict=True):
                assert identical(a, b)


@pytest.mark.promise("small")
@pytest.mark.sanitizer
@pytest.mark.parametrize("batch", [1, 33])
def test_small_cases(device, batch):
    for dtype in (torch.float32, torch.bfloat16):
        assert run("everything", dtype, device, batch=batch).y.shape == (batch, DIM)


# --- rows ---------------------------------------------------------------------------------------------------
@pytest.mark.promise("row alone")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(device, dtype, name):
    y0, x = problem(40, dtype, device)
    descend = ac.EnergyDescent(Wells(dtype, device), **options_of(name))
    together = descend(y0, x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = descend(y0[order], x[order], sample_ids=order)
    same_bits(shuffled, [t[order] for t in together[:4]])
    for b in (0, 7, 39):
        alone = descend(y0[b : b + 1], x[b : b + 1], sample_ids=torch.tensor([b], device=device))
        same_bits(alone, [t[b : b + 1] for t in together[:4]])


@pytest.mark.promise("threads")
def test_the_number_of_threads_changes_no_bit(threads):
    def energy(y, x):
        return (y * y * x).sum(1)

    y0, x = values((300, 700)), values((300, 700), seed=1).abs() + 0.2
    results = []
    for count in (1, 2, 4, 1):
        threads(count)
        results.append(
            ac.EnergyDescent(
                energy,
                0.2,
                12,
                15.0,
                momentum=0.3,
                clip=9.0,
                noise=1e-3,
                accept="if_lower",
                gradient="detached",
            )(y0, x)
        )
    assert len(results[0].steps.unique()) > 1
    for other in results[1:]:
        same_bits(other, results[0])


@pytest.mark.promise("no work")
def test_only_rows_that_go_on_are_evaluated():
    seen = []

    def energy(y, x):
        seen.append((y.shape[0], x.shape[0]))
        return ((y - x) ** 2).sum(1)

    y0, x = torch.randn(30, 3), torch.randn(30, 3)
    result = ac.EnergyDescent(energy, 0.3, 40, 1e-3, gradient="detached")(y0, x)
    assert len(result.steps.unique()) > 1
    active = [int((result.steps >= k).sum()) for k in range(1, int(result.steps.max()) + 1)]
    assert seen == [(30, 30), *((n, n) for n in active)]


@pytest.mark.promise("seed")
def test_noise_is_keyed_by_seed_sample_and_step(device):
    def energy(y):
        return (y * y).sum(1) * 0

    y0 = torch.zeros(6, 5, device=device)
    descend = ac.EnergyDescent(energy, 1.0, 4, 0.0, noise=1.0, gradient="detached", keep_trace=True)
    result = descend(y0, seed=9)
    eta = torch.stack([ac.reference.normals(9, torch.arange(6), k, 5) for k in range(1, 5)]).float().cumsum(0)
    torch.testing.assert_close(result.trace.outputs.cpu().view(4, 6, 5), eta)
    ids = torch.tensor([3, 3, 0], device=device)
    again = descend(y0[:3], seed=9, sample_ids=ids)
    assert_bitwise(again.y, result.y[ids])
    assert not torch.equal(descend(y0, seed=10).y, result.y)
    descend.seed = 9
    assert_bitwise(descend(y0).y, result.y)


def test_tol_zero_stops_nobody(device):
    def energy(y):
        return (y * y).sum(1)

    result = ac.EnergyDescent(energy, 0.5, 5, 0.0)(torch.ones(3, 2, device=device))  # there after one step
    assert result.steps.tolist() == [5] * 3
    assert result.status.tolist() == [MAX_STEPS] * 3
    for stop in ("energy", "gradient"):
        result = ac.EnergyDescent(energy, 0.5, 5, 1e-9, stop)(torch.ones(3, 2, device=device))
        assert result.steps.tolist() == [2 if stop == "energy" else 1] * 3
        assert result.status.tolist() == [HALTED] * 3


@pytest.mark.promise("small")
def test_one_step(device):
    result = run("plain", device=device, max_steps=1)
    assert set(result.steps.tolist()) == {1}
    assert set(result.status.tolist()) <= {HALTED, MAX_STEPS}


def test_attributes_may_change_between_calls(device):
    y0, x = problem(5, device=device, scale=0.5)
    descend = ac.EnergyDescent(Wells(device=device), 0.1, 3, 0.0)
    assert descend(y0, x).steps.tolist() == [3] * 5
    descend.max_steps, descend.gradient, descend.stop = 7, "detached", "gradient"
    assert descend(y0, x).steps.tolist() == [7] * 5
    descend.tol = 1e3
    assert descend(y0, x).steps.tolist() == [1] * 5


def test_step_sizes_of_the_call_and_of_each_row(device):
    y0, x = problem(6, device=device)
    sizes = torch.tensor([0.01, 0.05, 0.1, 0.15, 0.2, 0.25], device=device)
    descend = ac.EnergyDescent(Wells(device=device), 0.7, 5, 0.0)
    per_row = descend(y0, x, step_size=sizes)
    for b in range(6):
        same_bits(
            descend(y0[b : b + 1], x[b : b + 1], step_size=sizes[b].item()),
            [t[b : b + 1] for t in per_row[:4]],
        )
        same_bits(
            descend(y0[b : b + 1], x[b : b + 1], step_size=sizes[b]), [t[b : b + 1] for t in per_row[:4]]
        )
    host = descend(y0, x, step_size=torch.tensor(0.1))  # without dimensions it may stay on the host
    same_bits(host, descend(y0, x, step_size=0.1))


@pytest.mark.promise("layout")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout):
    y0, x = (laid_out(layout, 9, DIM, torch.float32, device, seed=s) for s in (1, 2))
    descend = ac.EnergyDescent(Wells(device=device), **options_of("everything"))
    before = y0.clone()
    result = descend(y0, x)
    assert result.y.is_contiguous()
    same_bits(result, descend(y0.contiguous(), x.contiguous()))
    assert torch.equal(y0, before)


def test_points_of_more_dimensions_and_of_none(device):
    def energy(y):
        return y.unsqueeze(-1).flatten(1).square().sum(1)

    for shape in ((4, 2, 3, 2), (4,), (4, 1)):
        y0 = torch.randn(shape, device=device)
        result = ac.EnergyDescent(energy, 0.25, 3, 0.0, clip=0.5)(y0)
        flat = ac.EnergyDescent(energy, 0.25, 3, 0.0, clip=0.5)(y0.unsqueeze(-1).flatten(1))
        torch.testing.assert_close(result.y.unsqueeze(-1).flatten(1), flat.y)
    empty = ac.EnergyDescent(lambda y: y.sum(1), 0.25, 3, 0.0)(torch.zeros(3, 0, device=device))
    assert empty.y.shape == (3, 0)
    assert empty.energy.tolist() == [0.0] * 3


@pytest.mark.promise("small")
@pytest.mark.parametrize("gradient", MODES, ids=str)
def test_an_empty_batch(device, gradient):
    energy = Bowl(torch.float32, device)
    y0 = torch.zeros(0, DIM, device=device, requires_grad=True)
    result = ac.EnergyDescent(energy, 0.1, 5, gradient=gradient, keep_trace=True)(
        y0, torch.zeros(0, DIM, device=device)
    )
    assert result.y.shape == (0, DIM)
    assert [t.shape[0] for t in (result.energy, result.steps, result.status, *result.trace)] == [0] * 7
    (result.y.sum() + result.energy.sum()).backward()
    assert energy.k.grad is None or bool((energy.k.grad == 0).all())


def test_context_of_any_dtype(device):
    table = torch.randn(3, DIM, device=device)

    def energy(y, kind, mask):
        return ((y - table[kind]) ** 2 * mask).sum(1)

    kind = torch.arange(20, device=device) % 3
    mask = torch.rand(20, DIM, device=device) > 0.2
    result = ac.EnergyDescent(energy, 0.2, 60, 1e-9)(torch.randn(20, DIM, device=device), kind, mask)
    assert len(result.steps.unique()) > 1
    torch.testing.assert_close(result.y[mask], table[kind][mask], atol=1e-3, rtol=1e-3)


# --- not finite ---------------------------------------------------------------------------------------------
def barrier(y, x):
    """Infinite or NaN where a row steps out of the positive numbers."""
    term = y - x * y.log()
    return term[:, 0] + term[:, 1]


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("accept", ["always", "if_lower"])
def test_a_row_that_breaks_keeps_its_last_finite_point_and_harms_no_neighbour(device, accept):
    y0 = torch.rand(20, 2, device=device) + 1.0
    x = torch.rand(20, 2, device=device) + 0.5
    sizes = torch.full((20,), 0.2, device=device)
    descend = ac.EnergyDescent(barrier, 0.2, 30, 1e-6, accept=accept, keep_trace=True)
    clean = descend(y0, x, step_size=sizes)
    assert NONFINITE not in clean.status.tolist()
    y0, sizes = y0.clone(), sizes.clone()
    x = x.clone()
    x[3], y0[3], sizes[3] = 0.5, 5.0, 3.0  # the second step leads across zero
    y0[5, 1] = -1.0  # broken before it starts
    y0[7, 0] = math.inf
    broken = descend(y0, x, step_size=sizes)
    assert broken.status[[3, 5, 7]].tolist() == [NONFINITE] * 3
    assert broken.steps[[5, 7]].tolist() == [0, 0]
    assert broken.steps[3] == 2
    assert identical(broken.y[[5, 7]], y0[[5, 7]])
    assert bool(broken.energy[5].isnan())
    assert bool(broken.y[3].isfinite().all())
    assert bool(broken.energy[3].isfinite())
    mine = broken.trace.outputs[broken.trace.row == 3]
    assert identical(mine[1], mine[0])
    assert identical(mine[-1], broken.y[3])
    others = [b for b in range(20) if b not in (3, 5, 7)]
    same_bits(broken, clean, rows=others)


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("width", [1, 5, 33, 1100])
def test_a_point_that_is_not_finite_ends_its_row_where_the_energy_does_not_see_it(device, width):
    for at in {0, width // 2, width - 1}:
        y0 = torch.zeros(5, width, device=device)
        y0[3, at] = math.nan
        result = ac.EnergyDescent(lambda y: y.nan_to_num(0.0).sum(1) * 0 + 1, tol=0.0, max_steps=2)(y0)
        assert (result.status == ac.Status.NONFINITE).tolist() == [i == 3 for i in range(5)]


def test_a_nan_energy_is_not_accepted(device):
    def energy(y):
        e = y[:, 0] * y[:, 0]
        return torch.where(e < 0.5, torch.full_like(e, math.nan), e)

    result = ac.EnergyDescent(energy, 0.3, 10, 0.0, accept="if_lower")(torch.ones(2, 1, device=device))
    assert result.status.tolist() == [NONFINITE] * 2
    assert result.energy.tolist() == [1.0] * 2


# --- if_lower -----------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    step_size=st.floats(0.01, 5.0),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    backtracking=st.sampled_from([None, 0.3, 0.9]),
    noise=st.sampled_from([0.0, 0.3]),
    mlp=st.booleans(),
)
def test_if_lower_never_raises_an_energy(seed, step_size, momentum, backtracking, noise, mlp):
    energy = Mlp(seed=seed) if mlp else Wells(seed=seed)
    y0, x = problem(9, seed=seed)
    result = ac.EnergyDescent(
        energy,
        step_size,
        8,
        1e-4,
        accept="if_lower",
        momentum=momentum,
        backtracking=backtracking,
        noise=noise,
        keep_trace=True,
    )(y0, x)
    outputs, _, row, _ = result.trace
    with torch.no_grad():
        for b in range(9):
            points = torch.cat([y0[b : b + 1], outputs[row == b]])
            values = energy(points, x[b].expand(points.shape[0], DIM))
            slack = 1e-5 * (1 + values.abs().max())  # products of another size round differently
            assert bool((values[1:] <= values[:-1] + slack).all())
    assert bool((result.energy <= energy(y0, x) + 1e-5 * (1 + result.energy.abs())).all())


def test_one_rejection_ends_a_row_exactly_when_nothing_would_change(device):
    def energy(y):
        return (y * y).sum(1)

    y0 = torch.ones(2, 1, device=device)

    def steps(**options):
        result = ac.EnergyDescent(energy, 1.1, 6, 1e-9, accept="if_lower", **options)(y0)
        return result.steps[0].item(), result.status[0].item()

    assert steps() == (1, REJECTED)
    assert steps(backtracking=0.5)[1] != REJECTED
    assert steps(noise=1e-9) == (6, MAX_STEPS)
    # The first step has no velocity to drop.
    assert steps(momentum=0.5) == (1, REJECTED)
    y0 = torch.full((2, 1), 1.0, device=device)
    result = ac.EnergyDescent(
        lambda y: y.abs().sum(1), 0.3, 20, 0.0, accept="if_lower", momentum=0.9, keep_trace=True
    )(y0)
    # With velocity it is tried again, without: from where it is, the plain step.
    assert result.status[0].item() == REJECTED
    tries = result.trace.outputs[result.trace.row == 0][:, 0]
    assert bool((tries[1:] == tries[:-1]).any())
