"""Sampled halting: one step against the reference and Philox, its log-probability and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from adaptcomp_ext.ops.bernoulli import uniform_draws
from tests.helpers.halting import philox
from tests.helpers.tensors import FLOATS, ROWS, Unchanged, assert_bitwise, values

SEED = 2**35 + 1


def keys(rows, device="cpu"):
    """Return samples, seeds and steps, one for each row."""
    at = torch.arange(rows, device=device)
    return at * 7 + 2**40 * (at % 2), at % 3 + SEED, at % 5 + 1


def check(logits, sample, seed, step):
    out = ac.ops.bernoulli_step(logits, seed=seed, step=step, sample=sample)
    log_prob, halt = ac.reference.bernoulli_step(logits, sample, seed, step)
    assert torch.equal(out.halt, halt) and out.log_prob.dtype == log_prob.dtype
    torch.testing.assert_close(out.log_prob, log_prob, rtol=1e-6, atol=1e-6)


@pytest.mark.sanitizer
@pytest.mark.parametrize("rows", ROWS)
def test_every_size(rows, device):
    logits = values((rows,), torch.float32, device)
    sample, seeds, steps = keys(rows, device)
    with Unchanged(logits, sample, seeds, steps):
        check(logits, None, SEED, 3)
        check(logits, sample, seeds, steps)
    assert torch.equal(
        uniform_draws(seeds, sample, steps), ac.reference.uniform(seeds, sample, steps)
    ) and torch.equal(uniform_draws(SEED, sample, 2**32), ac.reference.uniform(SEED, sample, 2**32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_strides(dtype, device):
    logits = values((40, 2), dtype, device)[:, 1]
    check(logits, None, SEED, 2)


@pytest.mark.promise("formula")
def test_formula(device):
    """The draws are those of Philox in Python integers; the log-probability is that of the action."""
    logits = values((50,), torch.float64, device)
    sample, seeds, steps = keys(50, device)
    out = ac.ops.bernoulli_step(logits, seed=seeds, step=steps, sample=sample)
    hazard = 1 / (1 + (-logits).exp())
    draws = [philox(*k) for k in zip(seeds.tolist(), sample.tolist(), steps.tolist(), strict=True)]
    halt = torch.tensor(draws, dtype=torch.float64, device=device) < hazard
    assert torch.equal(out.halt, halt) and 0 < int(halt.sum()) < 50
    torch.testing.assert_close(out.log_prob, torch.where(halt, hazard, 1 - hazard).log())


def test_far_logits(device):
    logits = torch.tensor([-torch.inf, -1000.0, 1000.0, torch.nan, torch.inf], device=device).requires_grad_()
    out = ac.ops.bernoulli_step(logits, seed=0, step=1)
    assert out.halt[:3].tolist() == [False, False, True] and out.log_prob[:3].tolist() == [0.0, 0.0, 0.0]
    (g,) = torch.autograd.grad(out.log_prob.sum(), logits)
    assert g.tolist() == [0.0] * 5
    with ac.reference_kernels():
        out = ac.ops.bernoulli_step(logits, seed=0, step=1)
        (g,) = torch.autograd.grad(out.log_prob.sum(), logits)
    assert out.log_prob[:3].tolist() == [0.0, 0.0, 0.0] and g.tolist() == [0.0] * 5


def grad_of(run, logits):
    logits = logits.detach().clone().requires_grad_()
    run(logits).sum().backward()
    return logits.grad


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_match_the_reference(dtype, device):
    def run(logits):
        return ac.ops.bernoulli_step(logits, seed=5, step=2).log_prob

    logits = values((33,), dtype, device)
    got = grad_of(run, logits)
    with ac.reference_kernels():
        want = grad_of(run, logits)
    tolerance = 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.promise("gradient", "second derivative")
def test_finite_differences():
    logits = values((9,), torch.float64, "cpu").requires_grad_()

    def run(logits):
        return ac.ops.bernoulli_step(logits, seed=5, step=2).log_prob

    assert gradcheck(run, logits) and gradgradcheck(run, logits)


@pytest.mark.promise("row alone", "seed")
def test_a_row_has_the_same_bits_wherever_it_stands(device):
    logits = values((70,), torch.float32, device)
    sample = torch.arange(70, device=device)
    whole = ac.ops.bernoulli_step(logits, seed=4, step=3, sample=sample)
    for i in (0, 16, 33, 69):
        alone = ac.ops.bernoulli_step(logits[i : i + 1], seed=4, step=3, sample=sample[i : i + 1])
        assert_bitwise(alone.log_prob, whole.log_prob[i : i + 1])
        assert torch.equal(alone.halt, whole.halt[i : i + 1])


def test_compiles_and_has_fake_tensors():
    def run(logits, sample):
        return ac.ops.bernoulli_step(logits, seed=4, step=3, sample=sample)

    logits, sample = values((6,), torch.float32, "cpu"), torch.arange(6)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, sample), run(logits, sample), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(torch.ops.adaptcomp.bernoulli_step.default, (logits, sample, None, None, 4, 3))
    torch.library.opcheck(torch.ops.adaptcomp.uniform_draws.default, (sample, None, None, 4, 3))
    grad = (logits, logits > 0, logits)
    torch.library.opcheck(torch.ops.adaptcomp.bernoulli_step_backward.default, grad)


Z = torch.zeros(3)


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((Z[:, None],), {}), ValueError, "logits: expected shape"),
        (((Z.long(),), {}), TypeError, "logits: expected float32"),
        (((Z,), {"seed": -1}), ValueError, "seed: expected an int >= 0"),
        (((Z,), {"seed": 0.5}), TypeError, "seed: expected an int"),
        (((Z,), {"step": 0}), ValueError, "step: expected an int >= 1"),
        (((Z,), {"step": torch.ones(2, dtype=torch.int64)}), ValueError, r"step: expected shape \[3\]"),
        (((Z,), {"seed": Z}), TypeError, "seed: expected int64"),
        (((Z,), {"sample": 3}), TypeError, "sample: expected an int64 Tensor"),
        (((Z,), {"sample": Z}), TypeError, "sample: expected int64"),
    ],
)
def test_bad_input(arguments, error, message):
    positional, named = arguments
    with pytest.raises(error, match=message):
        ac.ops.bernoulli_step(*positional, **{"seed": 0, "step": 1, **named})
