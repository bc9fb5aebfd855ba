"""Whole runs of a cell in one kernel call on each device, against the plain PyTorch reference.

In tests/cuda_host the CUDA kernels, compiled for the host, run these tests, so that the problems are small.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import adaptcomp_ext as ac
from adaptcomp_ext.ops._backend import EMULATED
from tests.helpers.tensors import assert_bitwise, generator, values
from tests.nn.test_recurrence import OF_THE_HOST, PAIRS, arguments, make, pick
from tests.nn.test_recurrence_training import loss_of

ON_EVERY_DEVICE = [(cell, policy) for cell, policy in PAIRS if policy not in OF_THE_HOST]
SIZES = ((5, 3, 21), (18, 4, 6))
BITWISE = [("gru", "act, readout"), ("lstm", "fixed"), ("mlp gelu", "confidence")]


def problem(cell, policy, device, dim=5, inner=3, rows=21, dtype=torch.float64, **options):
    halt = make(cell, policy, dim, inner, dtype, **options)
    given = arguments(halt, rows, dim, inner, dtype)
    return halt.to(device), pytree.tree_map(lambda t: t.to(device), given)


def by_kernel(halt, given):
    assert halt.plan(*given).way == "kernel", halt.plan(*given)
    return halt(*given)


def with_gradients(halt, given, function):
    """The result and the gradients in the arguments and the parameters."""
    given = [pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), g) for g in given]
    result = function(halt, given)
    wanted = [*pytree.tree_leaves(given), *halt.parameters()]
    return result, torch.autograd.grad(loss_of(result), wanted, allow_unused=True)


def same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.promise("formula", "own memory")
@pytest.mark.covering(2)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "policy"), ON_EVERY_DEVICE)
def test_equals_the_reference(device, poison, cell, policy, dtype, size):
    halt, given = problem(cell, policy, device, *size, dtype)
    with torch.no_grad():
        got = by_kernel(halt, given)
        poison.check()
        with ac.reference_kernels():
            want = halt(*given)
    same(pytree.tree_leaves(got[:5]), pytree.tree_leaves(want[:5]), 2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.promise("gradient", "own memory")
@pytest.mark.covering(2)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "policy"), ON_EVERY_DEVICE)
def test_gradients_equal_the_references(device, poison, cell, policy, dtype, size):
    halt, given = problem(cell, policy, device, *size, dtype)
    _, got = with_gradients(halt, given, by_kernel)
    poison.check()
    with ac.reference_kernels():
        _, want = with_gradients(halt, given, lambda halt, given: halt(*given))
    same(got, want, 3e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.promise("row alone")
@pytest.mark.parametrize(("cell", "policy"), BITWISE)
def test_a_row_and_its_gradient_have_the_same_bits_alone_and_in_any_batch(device, cell, policy):
    """The products included. More rows than slots: those whose row has ended take another."""
    rows = 45 if device == "cpu" else 9000
    halt, given = problem(cell, policy, device, 9, 6, rows, torch.float32, max_steps=9)
    count = len(pytree.tree_leaves(given))
    factor = values((rows, 1), torch.float32, seed=9).to(device)

    def of(chosen):
        own = [pytree.tree_map(lambda t: t.clone().requires_grad_(), g) for g in pick(given, chosen)]
        result = by_kernel(halt, own)
        loss = (result.output * factor[chosen]).sum() + 0 * result.cost.sum()
        return [
            t.detach()
            for t in (
                *pytree.tree_leaves(result[:5]),
                *torch.autograd.grad(loss, pytree.tree_leaves(own)),
            )
        ]

    whole = of(list(range(rows)))
    shuffled = torch.randperm(rows, generator=generator(3)).tolist()
    for chosen in ([7], shuffled[:13], shuffled):
        for a, b in zip(of(chosen), whole, strict=True):
            assert_bitwise(a, b[chosen])
    assert len(whole) > count


@pytest.mark.parametrize(("cell", "policy"), BITWISE)
def test_the_sums_over_rows_are_the_same_in_every_call(device, cell, policy):
    halt, given = problem(cell, policy, device, 9, 6, 45 if device == "cpu" else 9000, torch.float32)
    _, first = with_gradients(halt, given, by_kernel)
    _, second = with_gradients(halt, given, by_kernel)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or assert_bitwise(a, b) is None


@pytest.mark.sanitizer
@pytest.mark.promise("gradient")
@pytest.mark.parametrize(("cell", "policy"), [("gru", "act, readout"), ("lstm", "fixed"), ("mlp", "act")])
def test_sums_over_more_steps_than_are_held_at_once(device, cell, policy):
    """The factors of the outer products are added in groups of rows."""
    halt, given = problem(cell, policy, device, 4, 3, 60, max_steps=12, min_steps=6)
    _, got = with_gradients(halt, given, by_kernel)
    with ac.reference_kernels():
        _, want = with_gradients(halt, given, lambda halt, given: halt(*given))
    same(got, want, 1e-10)


@pytest.mark.promise("not finite")
@pytest.mark.parametrize(("cell", "policy"), [*BITWISE, ("gru", "convergence"), ("mlp", "ponder")])
def test_a_row_that_is_not_finite_ends_alone_and_passes_nothing_back(device, cell, policy):
    halt, given = problem(cell, policy, device, dtype=torch.float32)
    expected, _ = with_gradients(halt, given, by_kernel)
    pytree.tree_leaves(given)[0][4, 2] = torch.nan
    given[1][11, 0] = torch.nan
    got, grads = with_gradients(halt, given, by_kernel)
    keep = torch.tensor([r not in (4, 11) for r in range(21)])
    for a, b in zip(pytree.tree_leaves(got[:5]), pytree.tree_leaves(expected[:5]), strict=True):
        assert_bitwise(a[keep].detach(), b[keep].detach())
    assert got.status[[4, 11]].tolist() == [ac.Status.NONFINITE] * 2
    count = len(pytree.tree_leaves(given))
    for g in grads[:count]:
        assert not bool(g[[4, 11]].any())
    for g in grads:
        assert g is None or bool(torch.isfinite(g).all())


@pytest.mark.promise("formula")
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_many_classes(device, measure):
    """Beyond 64 classes a warp computes the confidence."""
    halt, given = problem("gru", "confidence", device, 6)
    halt.readout = nn.Linear(6, 70, dtype=torch.float64).to(device)
    halt.policy = ac.Confidence({"max_prob": 0.03, "margin": 0.005, "entropy": 0.02}[measure], measure)
    with torch.no_grad():
        got = by_kernel(halt, given)
        with ac.reference_kernels():
            want = halt(*given)
    assert len(got.steps.unique()) > 1
    same(pytree.tree_leaves(got[:5]), pytree.tree_leaves(want[:5]), 1e-12)


@pytest.mark.promise("second derivative")
def test_second_derivatives_go_through_the_reference(device):
    halt, given = problem("gru", "act, readout", device, 3, 2, 4, max_steps=3)
    own = [g.requires_grad_() for g in given]
    loss = loss_of(by_kernel(halt, own))
    (first,) = torch.autograd.grad(loss, own[0], retain_graph=True)
    (again,) = torch.autograd.grad(loss, own[0], create_graph=True)
    torch.testing.assert_close(again, first, rtol=1e-10, atol=1e-12)
    (second,) = torch.autograd.grad(again.square().sum(), own[0])
    assert bool(second.any())


@pytest.mark.parametrize("gradients", [False, True])
def test_what_does_not_fit_on_a_device_goes_through_the_loop(device, gradients):
    """Two rows of the hidden layer are longer than a block's shared memory."""
    halt = ac.AdaptiveHalt(ac.cells.MLP(4, 0, 40_000, "tanh"), ac.FixedSteps(2), max_steps=3).to(device)
    state = values((3, 4), torch.float32).to(device)
    with torch.set_grad_enabled(gradients):
        plan, result = halt.plan(state), halt(state)
    if device == "cpu" and not EMULATED:
        assert plan.way == "kernel"
    else:
        assert plan.way == "loop" and "does not fit" in plan.why
    assert result.steps.tolist() == [2, 2, 2]


@pytest.mark.promise("memory")
@pytest.mark.parametrize("max_steps", [10**9, 2**62])
def test_steps_whose_states_do_not_fit_on_a_device_go_through_the_loop(device, max_steps):
    """On CUDA a slot has room for all steps while its row is walked back; without gradients it needs none."""
    halt, given = problem("gru", "fixed", device, max_steps=max_steps)
    with torch.no_grad():
        assert halt.plan(*given).way == "kernel"
    on_host = device == "cpu" and not EMULATED
    assert (halt.plan(*given).way == "kernel") is on_host
    result = halt(*given)
    result.output.sum().backward()
    assert result.steps.tolist() == [4] * 21 and bool(halt.step.weight_hh.grad.any())


@pytest.mark.parametrize("gradients", [False, True])
def test_an_empty_batch_and_a_single_row(device, gradients):
    halt, given = problem("lstm", "fixed", device, rows=1)
    with torch.set_grad_enabled(gradients):
        assert by_kernel(halt, given).steps.tolist() == [4]
        assert halt(*pick(given, slice(0, 0))).output.shape == (0, 5)


@pytest.mark.promise("no wait", "graphs")
@pytest.mark.cuda
@pytest.mark.parametrize(("cell", "policy"), BITWISE)
def test_capture_and_replay(cell, policy):
    """A graph holds all steps: with new data, whose rows halt elsewhere, its replay equals an eager call."""
    if not (ac.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip("no CUDA device, or a build without CUDA")
    halt, given = problem(cell, policy, "cuda", 9, 6, 300, torch.float32)
    given = [pytree.tree_map(lambda t: t.requires_grad_(), g) for g in given]
    leaves = [*pytree.tree_leaves(given), *halt.parameters()]

    def call():
        result = by_kernel(halt, given)
        grads = torch.autograd.grad(result.output.sum(), leaves, allow_unused=True)
        return [*pytree.tree_leaves(result[:5]), *(g for g in grads if g is not None)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(3):
        with torch.no_grad():
            for t in pytree.tree_leaves(given):
                t.copy_((seed + 0.3) * torch.randn(t.shape, generator=generator(seed)))
        graph.replay()
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        for a, b in zip(captured, eager, strict=True):
            assert_bitwise(a.detach(), b.detach())
