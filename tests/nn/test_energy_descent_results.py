"""A caller's changes to a result do not reach the backward pass."""

from __future__ import annotations

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.closed_forms import contexts, energy, points


@pytest.mark.parametrize("gradient", ["unrolled", ("truncated", 2), "stepwise", "implicit"], ids=str)
@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "function"])
def test_results_may_be_written_to(device, closed, gradient):
    module = energy("mlp-silu", device=device)
    y0, (x,) = points(9, device=device), contexts("mlp-silu", 9, device=device)
    x.requires_grad_()
    descend = ac.EnergyDescent(
        module if closed else lambda y, x: module(y, x),
        0.3,
        max_steps=12,
        tol=3e-2,
        gradient=gradient,
        keep_trace=True,
    )

    def gradients(write):
        result = descend(y0, x)
        loss = result.y.square().sum() + result.energy.sum() + (result.trace.outputs**3).sum()
        if write:
            result.steps.add_(1000)
            result.status.fill_(ac.Status.NONFINITE)
            result.trace.row.zero_()
            result.trace.step.add_(7)
            result.trace.weights.zero_()
        return torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
