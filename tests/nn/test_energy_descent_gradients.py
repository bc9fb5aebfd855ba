"""The gradient modes of EnergyDescent against finite differences, the reference, and hand-written loops."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from tests.helpers.energies import DIM, NONFINITE, REJECTED, Bowl, Mlp, Wells, options_of, problem

UNROLLED = {
    "plain": {},
    "momentum": {"momentum": 0.6},
    "clip": {"clip": 0.8},
    "clamp": {"clamp": (-0.9, 0.7)},
    "noise": {"noise": 0.05, "clamp": (-0.9, 0.7)},
    "if lower": {"accept": "if_lower", "step_size": 0.6},
    "backtracking": {"accept": "if_lower", "step_size": 1.0, "backtracking": 0.6, "momentum": 0.5},
    "everything": {
        **{
            "accept": "if_lower",
            "step_size": 0.7,
            "backtracking": 0.5,
            "momentum": 0.5,
            "clip": 1.0,
            "clamp": (-1.2, 1.1),
        },
        "noise": 0.02,
    },
}
ALL_MODES = {"unrolled": "unrolled", "truncated": ("truncated", 2), "stepwise": "stepwise"}


class Problem:
    """Return all tensors that can have a gradient: y0, x, step sizes, noise, and the energy's parameters."""

    def __init__(self, name, device="cpu", batch=6, dtype=torch.float64, per_row=True, energy=None, **more):
        options = {"max_steps": 6, "tol": 5e-3, "seed": 3, **UNROLLED[name], **more}
        size = options.pop("step_size", 0.15)
        sigma = options.pop("noise", 0.0)
        self.y0, self.x = problem(batch, dtype, device, requires_grad=True, scale=0.9)
        self.energy = energy or Wells(dtype, device)
        sizes = torch.linspace(0.8, 1.2, batch, dtype=dtype, device=device) * size
        self.size = (sizes if per_row else torch.tensor(size, dtype=dtype, device=device)).requires_grad_()
        self.sigma = torch.tensor(sigma, dtype=dtype, device=device, requires_grad=True) if sigma else None
        self.descend = ac.EnergyDescent(
            self.energy, noise=0.0 if self.sigma is None else self.sigma, **options
        )

    @property
    def leaves(self):
        given = [self.y0, self.x, self.size, *([] if self.sigma is None else [self.sigma])]
        return [*given, *self.energy.parameters()]

    def run(self):
        return self.descend(self.y0, self.x, step_size=self.size)

    def loss(self, result):
        b = torch.arange(1.0, result.energy.shape[0] + 1, dtype=torch.float64, device=result.y.device)
        loss = (result.y.double() ** 3 * b[:, None]).sum() + (result.energy.double() * b).square().sum()
        if result.trace is not None:
            loss = loss + (result.trace.outputs.double().square() * result.trace.step[:, None]).sum()
        return loss

    def gradients(self):
        return grads(self.loss(self.run()), self.leaves)


def grads(loss, leaves, **options):
    found = torch.autograd.grad(loss, leaves, allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def close(got, want, tolerance=1e-9):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=tolerance * (1 + w.abs().max().item()), rtol=tolerance)


# --- unrolled -----------------------------------------------------------------------------------------------
@pytest.mark.promise("gradient")
@pytest.mark.covering(2)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("name", UNROLLED)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_unrolled_against_finite_differences(check, name, per_row):
    p = Problem(name, batch=2, per_row=per_row, max_steps=3, keep_trace=True)
    leaves = p.leaves
    holder = nn.Module()

    def run(y0, x, size, *rest):
        rest = list(rest)
        if p.sigma is not None:
            p.descend.noise = rest.pop(0)
        for n, t in zip(("a", "b", "c"), rest, strict=True):
            holder.__dict__[n] = t
        result = p.descend(y0, x, step_size=size)
        return result.y, result.energy, result.trace.outputs

    del p.descend.energy  # a module, whose place a function may not take
    p.descend.energy = lambda y, x: Wells.forward(holder, y, x)
    assert check(run, leaves)


@pytest.mark.promise("gradient")
@pytest.mark.covering(2)
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", UNROLLED)
def test_gradients_are_those_of_the_reference(device, name, mode, trace):
    p = Problem(name, device, batch=9, gradient=ALL_MODES[mode], keep_trace=trace)
    result = p.run()
    with ac.reference_kernels():
        want = p.run()
    assert torch.equal(result.steps, want.steps)
    assert torch.equal(result.status, want.status)
    close(grads(p.loss(result), p.leaves), grads(p.loss(want), p.leaves))


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", ["plain", "clip", "backtracking", "everything"])
def test_second_derivatives_are_those_of_the_reference(device, name, mode):
    p = Problem(name, device, gradient=ALL_MODES[mode], keep_trace=True, max_steps=5)

    def second():
        first = [g for g in grads(p.loss(p.run()), p.leaves, create_graph=True) if g.requires_grad]
        return grads(sum(g.square().sum() for g in first), p.leaves)

    got = second()
    with ac.reference_kernels():
        want = second()
    close(got, want, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "momentum", "clamp"])
def test_low_precision_gradients_are_close_to_exact_ones(device, name, dtype):
    """The number of steps is fixed, so that all dtypes take the same."""
    exact = Problem(name, device, tol=0.0).gradients()
    got = Problem(name, device, dtype=dtype, tol=0.0).gradients()
    for g, w in zip(got, exact, strict=True):
        assert g.dtype == dtype
        limit = (2e-4 if dtype == torch.float32 else 0.25) * (1 + w.abs().max().item())
        assert (g.double() - w).abs().max().item() < limit


def test_by_hand(device):
    """v ← v − α H v, θ̄ −= α (∂²E/∂θ∂y) v, ᾱ −= ⟨g, v⟩: for E = (k/2) y², y_N = (1 − α k)^N y₀."""
    k = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    y0 = torch.tensor([[1.5], [-2.0]], dtype=torch.float64, device=device, requires_grad=True)
    result = ac.EnergyDescent(lambda y, k: 0.5 * k * y[:, 0] ** 2, alpha, 5, 0.0)(y0, k)
    keep = 1 - alpha * k
    torch.testing.assert_close(result.y[:, 0], keep**5 * y0[:, 0])
    torch.testing.assert_close(result.energy, 0.5 * k * (keep**5 * y0[:, 0]) ** 2)
    got = grads(result.y.sum() + result.energy.sum(), [y0, k, alpha])
    close(
        got, grads((keep**5 * y0[:, 0]).sum() + (0.5 * k * (keep**5 * y0[:, 0]) ** 2).sum(), [y0, k, alpha])
    )


def test_a_learnable_step_size_and_noise_of_the_module(device):
    y0, x = problem(5, torch.float64, device)
    size = nn.Parameter(torch.tensor(0.1, dtype=torch.float64, device=device))
    sigma = nn.Parameter(torch.tensor(0.1, dtype=torch.float64, device=device))
    descend = ac.EnergyDescent(Wells(torch.float64, device), size, 3, 0.0, noise=sigma)
    assert {n for n, _ in descend.named_parameters()} >= {"step_size", "noise"}
    descend(y0, x).energy.sum().backward()
    assert size.grad.abs() > 0
    assert sigma.grad.abs() > 0


def test_a_step_size_on_the_host_for_points_on_a_device(device):
    y0, x = problem(5, torch.float64, device)
    found = []
    for where in ("cpu", device):
        size = torch.tensor(0.1, device=where, requires_grad=True)  # float32 beside float64 points, too
        ac.EnergyDescent(Wells(torch.float64, device), size, 3, 0.0)(y0, x).y.sum().backward()
        assert size.grad.device.type == where
        found.append(size.grad.item())
    assert found[0] == found[1] != 0


def test_each_row_takes_part_from_its_own_last_step_on(device):
    """A row's gradient in a batch is that of the row alone."""
    p = Problem("momentum", device, batch=9, max_steps=20, tol=1e-2)
    result = p.run()
    assert len(result.steps.unique()) > 2
    together = torch.autograd.grad(result.y.square().sum(), [p.y0, p.x, p.size])
    for b in range(9):
        rows = [t.detach()[b : b + 1].requires_grad_() for t in (p.y0, p.x, p.size)]
        alone = p.descend(rows[0], rows[1], step_size=rows[2])
        close(torch.autograd.grad(alone.y.square().sum(), rows), [t[b : b + 1] for t in together], 1e-14)


def test_parameters_in_a_closure_and_what_lies_behind_them(device):
    """The energy is a closure over a leaf, and over a tensor computed from leaves."""
    theta = torch.randn(DIM, dtype=torch.float64, device=device, requires_grad=True)
    other = torch.randn(DIM, dtype=torch.float64, device=device, requires_grad=True)
    y0, x = problem(4, torch.float64, device)

    def loss(run):
        made = other.exp() + 0.5

        def energy(y, x):
            return (made * (y - x * theta) ** 2).sum(1) + (y**4).sum(1) * 0.1

        return run(energy)

    def unrolled(energy):
        y = y0
        for _ in range(3):
            y = y.detach().requires_grad_() if not y.requires_grad else y
            (g,) = torch.autograd.grad(energy(y, x).sum(), y, create_graph=True)
            y = y - 0.05 * g
        return y.square().sum() + energy(y, x).square().sum()

    def descend(energy):
        result = ac.EnergyDescent(energy, 0.05, 3, 0.0)(y0, x)
        return result.y.square().sum() + result.energy.square().sum()

    close(grads(loss(descend), [theta, other]), grads(loss(unrolled), [theta, other]))


def test_context_that_was_computed_from_the_energys_own_parameters(device):
    """The gradient comes once by the context and once by the energy; it must not be passed on twice."""
    theta = torch.randn(DIM, dtype=torch.float64, device=device, requires_grad=True)
    y0, x = problem(4, torch.float64, device)

    def energy(y, c):
        return ((y - c) ** 2 * (1 + theta**2)).sum(1) + (y**4).sum(1) * 0.1

    for mode in ALL_MODES.values():
        descend = ac.EnergyDescent(energy, 0.05, 4, 0.0, gradient=mode)

        def both(descend=descend):
            result = descend(y0 * theta, x * theta)
            first = grads(result.y.square().sum() + result.energy.sum(), [theta], create_graph=True)
            return [first[0].detach(), *grads(first[0].square().sum(), [theta])]

        got = both()
        with ac.reference_kernels():
            close(got, both())


@pytest.mark.promise("memory")
def test_the_memory_of_a_forward_pass_is_its_points_not_its_graphs():
    alive = weakref.WeakSet()
    most = 0

    class Keep(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(DIM, 50) * 0.1)

        def forward(self, y):
            nonlocal most
            h = torch.tanh(y @ self.w)  # saved by its own backward: alive as long as the graph
            alive.add(h)
            most = max(most, len(alive))
            return h.square().sum(1) + y.square().sum(1)

    energy, y0 = Keep(), torch.randn(8, DIM, requires_grad=True)
    for mode, limit in (("unrolled", 3), (("truncated", 3), 3), ("stepwise", None)):
        most = 0
        result = ac.EnergyDescent(energy, 0.01, 20, 0.0, gradient=mode, keep_trace=True)(y0)
        loss = result.y.sum() + result.trace.outputs.sum()
        if limit is None:
            assert most >= 20  # so that the test would notice
        else:
            loss.backward()
            assert most <= limit
        del result, loss
    gc.collect()
    assert len(alive) <= 1


def test_nothing_is_left_when_a_result_is_dropped():
    gc.collect()
    gc.disable()
    try:
        for mode in (*ALL_MODES.values(), "implicit"):
            p = Problem("everything", gradient=mode, keep_trace=True)
            result = p.run()
            seen = [weakref.ref(t) for t in (result.y, result.energy, result.trace.outputs)]
            loss = p.loss(result)
            loss.backward()
            del result, loss
            assert [r() for r in seen] == [None] * 3
    finally:
        gc.enable()


def test_backward_twice_and_partially(device):
    p = Problem("momentum", device)
    result = p.run()
    first = grads(p.loss(result), p.leaves, retain_graph=True)
    close(grads(p.loss(result), p.leaves, retain_graph=True), first, 0)
    (only,) = torch.autograd.grad(p.loss(result), [p.x])
    close([only], [first[1]], 0)


@pytest.mark.parametrize("changed", ["y0", "x", "parameter", "step size"])
def test_what_is_changed_in_place_before_the_backward_pass_is_noticed(changed):
    p = Problem("plain")
    y0, x, size = (t.clone() for t in (p.y0, p.x, p.size))
    result = p.descend(y0, x, step_size=size)
    with torch.no_grad():
        {"y0": y0, "x": x, "parameter": p.energy.a, "step size": size}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.y.sum().backward()


# --- truncated ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("last", [1, 3, 5, 6, 20])
@pytest.mark.parametrize("name", ["plain", "momentum", "backtracking"])
def test_truncated_is_the_end_of_the_descent_alone(device, name, last):
    """A descent that starts k steps before each row's end has the same gradients."""
    p = Problem(name, device, gradient=("truncated", last), max_steps=5, tol=0.0)
    got = grads(p.run().y.pow(3).sum(), p.leaves)
    if last > 5:  # the rows took fewer
        p.descend.gradient = "unrolled"
        close(got, grads(p.run().y.pow(3).sum(), p.leaves), 0)
        assert bool((got[0] != 0).any())
        return
    assert bool((got[0] == 0).all())
    if name != "plain":
        return
    p.descend.gradient = "detached"
    p.descend.max_steps = 5 - last
    start = p.run().y.detach() if last < 5 else p.y0.detach()
    p.descend.gradient, p.descend.max_steps = "unrolled", last
    want = grads(p.descend(start, p.x, step_size=p.size).y.pow(3).sum(), p.leaves)
    close(got[1:], want[1:])


def test_truncated_passes_to_the_start_of_the_rows_that_took_fewer_steps(device):
    p = Problem("plain", device, batch=20, gradient=("truncated", 4), max_steps=12, tol=0.1)
    result = p.run()
    (g,) = torch.autograd.grad(result.y.pow(3).sum(), [p.y0])
    few = result.steps < 4
    assert 0 < int(few.sum()) < 20
    assert bool((g[few] != 0).any(dim=1).all())
    assert bool((g[~few] == 0).all())


# --- stepwise -----------------------------------------------------------------------------------------------
def test_stepwise_against_a_loop_by_hand(device):
    p = Problem("plain", device, gradient="stepwise", keep_trace=True, tol=0.0, max_steps=4)
    result = p.run()
    y, points = p.y0.detach(), []
    for _ in range(4):
        y = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(p.energy(y, p.x).sum(), y, create_graph=True)
        y = y - p.size[:, None] * g
        points.append(y)
    torch.testing.assert_close(result.trace.outputs, torch.cat(points))
    torch.testing.assert_close(result.y, points[-1])
    got = grads(result.trace.outputs.pow(3).sum(), p.leaves, retain_graph=True)
    close(got, grads(torch.cat(points).pow(3).sum(), p.leaves, retain_graph=True))
    assert bool((got[0] == 0).all())
    close(
        grads(result.y.pow(3).sum(), p.leaves, retain_graph=True),
        grads(points[-1].pow(3).sum(), p.leaves, retain_graph=True),
    )
    one = result.trace.step == 2
    close(grads(result.trace.outputs[one].pow(3).sum(), p.leaves), grads(points[1].pow(3).sum(), p.leaves))


def test_stepwise_trains_a_landscape():
    torch.manual_seed(0)
    energy = Mlp(nn.Softplus, hidden=32)
    size = nn.Parameter(torch.tensor(0.3))
    descend = ac.EnergyDescent(energy, size, 4, 0.0, gradient="stepwise", keep_trace=True)
    optimiser = torch.optim.Adam(descend.parameters(), 0.02)
    losses = []
    for _ in range(60):
        x = torch.randn(64, DIM)
        target = torch.stack([x[:, 0] * 0.5, -x[:, 1], x[:, 2] * 0.2, x[:, 3]], 1)
        trace = descend(torch.zeros(64, DIM), x).trace
        loss = (trace.outputs - target[trace.row]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- implicit -----------------------------------------------------------------------------------------------
CONVEX = {
    "quadratic": Bowl,
    "softplus": lambda dtype, device: Mlp(nn.Softplus, dtype=dtype, device=device, seed=3),
}


@pytest.mark.parametrize("clamp", [None, (-0.2, 0.4)], ids=["free", "clamped"])
@pytest.mark.parametrize("name", CONVEX)
def test_implicit_is_unrolled_at_convergence(device, name, clamp):
    y0, x = problem(9, torch.float64, device, requires_grad=True)
    energy = CONVEX[name](dtype=torch.float64, device=device)
    leaves = [x, *energy.parameters()]
    found = []
    for mode in ("unrolled", "implicit"):
        descend = ac.EnergyDescent(
            energy, 0.25, 400, 1e-13, "gradient" if clamp is None else "energy", clamp=clamp, gradient=mode
        )
        result = descend(y0, x)
        found.append(grads(result.y.pow(3).sum() + result.energy.square().sum(), [*leaves, y0]))
    close(found[1][:-1], found[0][:-1], 1e-6)
    assert bool((found[1][-1] == 0).all())
    with ac.reference_kernels():
        result = descend(y0, x)
        close(found[1], grads(result.y.pow(3).sum() + result.energy.square().sum(), [*leaves, y0]))


def test_implicit_without_a_minimum_stops_there(device):
    """At a saddle or without curvature conjugate gradients have no solution, and pass no gradient on."""
    x = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    y0 = torch.randn(3, 2, dtype=torch.float64, device=device)

    def hill(y, x):
        return -(y * y).sum(1) + (x * y).sum(1)

    def flat(y, x):
        return (x * y).sum(1)

    for energy in (hill, flat):
        result = ac.EnergyDescent(energy, 0.1, 3, 0.0, gradient="implicit")(y0, x)
        (g,) = torch.autograd.grad(result.y.sum(), [x])
        assert bool((g == 0).all())


def test_rows_of_an_implicit_gradient_do_not_wait_for_each_other(device):
    """The rows' systems have different condition numbers; each solution is that of the row alone."""
    scale = torch.logspace(0, 3, 8, dtype=torch.float64, device=device)

    def energy(y, x, s):
        stiff = torch.stack([torch.ones_like(s), s], 1)
        return ((y - x) ** 2 * stiff).sum(1) + (y[:, 0] * y[:, 1]) * 0.5

    y0, x = (
        torch.zeros(8, 2, dtype=torch.float64, device=device),
        torch.randn(8, 2, dtype=torch.float64, device=device),
    )
    x.requires_grad_()
    descend = ac.EnergyDescent(energy, 0.4 / scale, 3, 0.0, gradient="implicit")
    (together,) = torch.autograd.grad(descend(y0, x, scale).y.square().sum(), x)
    for b in range(8):
        (alone,) = torch.autograd.grad(
            descend(y0[b : b + 1], x[b : b + 1], scale[b : b + 1], step_size=0.4 / scale[b].item())
            .y.square()
            .sum(),
            x,
        )
        torch.testing.assert_close(alone[b], together[b])


@pytest.mark.promise("second derivative")
def test_implicit_twice_is_refused_by_name(device):
    y0, x = problem(3, torch.float64, device, requires_grad=True)
    result = ac.EnergyDescent(Bowl(device=device), 0.2, 20, gradient="implicit")(y0, x)
    (g,) = torch.autograd.grad(result.y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="implicit"):
        g.sum().backward()


# --- detached, and the energies -----------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [*ALL_MODES.values(), "implicit", "detached"], ids=str)
def test_the_energy_has_a_gradient_in_every_mode(device, mode):
    y0, x = problem(5, torch.float64, device, requires_grad=True)
    energy = Wells(torch.float64, device)
    result = ac.EnergyDescent(energy, 0.1, 5, 0.0, gradient=mode)(y0, x)
    got = grads(result.energy.sum(), [x, *energy.parameters()], retain_graph=True)
    y = result.y if mode != "detached" else result.y.detach()
    close(got, grads(energy(y, x).sum(), [x, *energy.parameters()]))
    if mode == "detached":
        assert not result.y.requires_grad


def test_nothing_requires_grad_where_nothing_was_asked_for(device):
    y0, x = problem(5, torch.float64, device)
    energy = Wells(torch.float64, device).requires_grad_(False)
    for mode in (*ALL_MODES.values(), "implicit", "detached"):
        result = ac.EnergyDescent(energy, 0.1, 5, gradient=mode)(y0, x)
        assert not result.y.requires_grad
        assert not result.energy.requires_grad
    with torch.no_grad():
        result = ac.EnergyDescent(Wells(torch.float64, device), 0.1, 5)(y0, x)
    assert not result.y.requires_grad
    assert not result.energy.requires_grad


def test_a_relu_network_has_no_second_derivatives_and_no_trouble(device):
    energy = Mlp(nn.ReLU, dtype=torch.float64, device=device)
    y0, x = problem(5, torch.float64, device, requires_grad=True)
    for mode in (*ALL_MODES.values(), "implicit"):
        result = ac.EnergyDescent(energy, 0.1, 4, 0.0, gradient=mode)(y0, x)
        got = grads(result.y.square().sum(), [y0, x, *energy.parameters()])
        assert all(bool(g.isfinite().all()) for g in got)
        if mode == "unrolled":
            with ac.reference_kernels():
                result = ac.EnergyDescent(energy, 0.1, 4, 0.0)(y0, x)
                close(got, grads(result.y.square().sum(), [y0, x, *energy.parameters()]))


def test_an_energy_that_is_linear_in_y(device):
    w = torch.randn(DIM, dtype=torch.float64, device=device, requires_grad=True)
    y0 = torch.randn(3, DIM, dtype=torch.float64, device=device, requires_grad=True)
    for mode in (*ALL_MODES.values(), "implicit", "detached"):
        result = ac.EnergyDescent(lambda y: (y * w).sum(1), 0.1, 4, 0.0, gradient=mode)(y0)
        got = grads(result.y.sum() + result.energy.sum() * 0, [y0, w])
        steps = {"unrolled": 4, "stepwise": 1, "implicit": 0, "detached": 0}.get(mode, 2)
        torch.testing.assert_close(got[1], torch.full_like(w, -0.1 * 3 * steps))
    constant = torch.ones(DIM, dtype=torch.float64, device=device)
    result = ac.EnergyDescent(lambda y: (y * constant).sum(1), 0.1, 4, 0.0)(y0)
    (g,) = torch.autograd.grad(result.y.sum(), y0)
    assert bool((g == 1).all())


# --- what was rejected or not finite ------------------------------------------------------------------------
class Barrier(nn.Module):
    """y − x w log y: NaN, with its derivatives, where a row has stepped out of the positive numbers."""

    def __init__(self, device):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64, device=device))

    def forward(self, y, x):
        return (y - x * self.w * y.log()).sum(1)


@pytest.mark.parametrize("mode", [*ALL_MODES.values(), "implicit", "detached"], ids=str)
@pytest.mark.parametrize("accept", ["always", "if_lower"])
def test_a_row_that_breaks_passes_no_nan_back(device, mode, accept):
    y0 = torch.full((6, 2), 1.5, dtype=torch.float64, device=device)
    x = torch.full((6, 2), 0.7, dtype=torch.float64, device=device)
    size = torch.full((6,), 0.2, dtype=torch.float64, device=device)
    y0[0], x[0], size[0] = 5.0, 0.5, 3.0  # breaks at the second step
    size[1] = 4.0  # at the first
    y0[2] = -1.0  # before it starts
    leaves = [t.requires_grad_() for t in (y0, x, size)]
    energy = Barrier(device)
    result = ac.EnergyDescent(energy, 0.1, 6, 0.0, gradient=mode, accept=accept, keep_trace=True)(
        y0, x, step_size=size
    )
    assert result.status[:3].tolist() == [NONFINITE] * 3
    assert result.steps[:3].tolist() == [2, 1, 0]
    loss = result.y.square().sum() + result.energy[[0, 1, 3, 4, 5]].sum() + result.trace.outputs.sum()
    got = grads(loss, [*leaves, energy.w])
    assert all(bool(g.isfinite().all()) for g in got)
    # The rest of the batch is passed what it is passed without them.
    rest = [t.detach()[3:].requires_grad_() for t in leaves]
    result = ac.EnergyDescent(energy, 0.1, 6, 0.0, gradient=mode, accept=accept, keep_trace=True)(
        rest[0], rest[1], step_size=rest[2]
    )
    want = grads(result.y.square().sum() + result.energy.sum() + result.trace.outputs.sum(), rest)
    close([g[3:] for g in got[:3]], want, 1e-12)
    if mode == "unrolled":
        slope = torch.tensor(
            [[1 + 1 - 0.7 / 1.5], [0.0]], dtype=torch.float64, device=device
        )  # of trace and energy
        torch.testing.assert_close(got[0][1:3], 2 * y0.detach()[1:3] + slope)


def test_a_rejected_step_passes_the_gradient_straight_through(device):
    y0 = torch.tensor([[1.0], [0.5]], dtype=torch.float64, device=device, requires_grad=True)
    result = ac.EnergyDescent(lambda y: (y * y).sum(1), 1.5, 6, 0.0, accept="if_lower", keep_trace=True)(y0)
    assert result.status.tolist() == [REJECTED] * 2
    (g,) = torch.autograd.grad(result.y.sum() + 10 * result.trace.outputs.sum(), y0)
    assert g.flatten().tolist() == [11.0] * 2


def test_options_of_the_value_tests_have_gradients_too():
    for name in ("gradient rule", "if lower, momentum", "if lower, noise"):
        y0, x = problem(5, torch.float64, requires_grad=True)
        result = ac.EnergyDescent(Wells(torch.float64), **options_of(name))(y0, x)
        got = grads(result.y.sum(), [y0, x])
        with ac.reference_kernels():
            result = ac.EnergyDescent(Wells(torch.float64), **options_of(name))(y0, x)
            close(got, grads(result.y.sum(), [y0, x]), 1e-9)
    assert math.isfinite(got[0].sum().item())
