"""The targets of Q-halting against the formula of the hierarchical reasoning model."""

from __future__ import annotations

import math

import pytest
import torch

import adaptcomp_ext as ac


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.promise("formula")
def test_formula(device):
    q = torch.tensor([[0.0, 1.0], [2.0, 3.0], [-1.0, 0.5], [1.0, 1.0]], device=device, requires_grad=True)
    following = torch.tensor([[1.0, 2.0], [3.0, 2.0], [-2.0, 4.0], [0.0, math.nan]], device=device)
    right = torch.tensor([True, False, True, False], device=device)
    last = torch.tensor([False, False, True, False], device=device)
    targets = ac.ops.q_halt_targets(q, right, following, last)
    want = [[1, sigmoid(2)], [0, sigmoid(3)], [1, sigmoid(-2)], [0, sigmoid(1)]]  # the last has no following
    torch.testing.assert_close(targets, torch.tensor(want, device=device))
    assert not targets.requires_grad
    own = ac.ops.q_halt_targets(q, right)
    torch.testing.assert_close(own, torch.stack([right.float(), torch.sigmoid(q[:, 1])], 1).detach())
    # A target that is the estimate itself has no gradient.
    loss = torch.nn.functional.binary_cross_entropy_with_logits(q, own, reduction="sum")
    (g,) = torch.autograd.grad(loss, q)
    assert not g[:, 1].any() and bool(g[:, 0].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_one_logit_and_dtypes(dtype, device):
    right = torch.tensor([True, False], device=device)
    for shape in ((2,), (2, 1)):
        targets = ac.ops.q_halt_targets(torch.zeros(shape, dtype=dtype, device=device), right)
        assert targets.shape == shape and targets.dtype == dtype and targets.view(-1).tolist() == [1.0, 0.0]
    q = torch.zeros(2, 2, dtype=dtype, device=device)
    assert ac.ops.q_halt_targets(q, right, q.double()).dtype == dtype
    assert ac.ops.q_halt_targets(q[:0], right[:0], q[:0]).shape == (0, 2)


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 3)}, ValueError, r"logits: expected shape \[n, 2\]"),
        ({"logits": torch.zeros(())}, ValueError, r"logits: expected shape \[n, 2\]"),
        ({"logits": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "logits: expected float32"),
        ({"right": torch.zeros(3)}, TypeError, "right: expected a bool Tensor"),
        ({"right": torch.zeros(2, dtype=torch.bool)}, ValueError, r"right: expected shape \[3\]"),
        ({"last": torch.zeros(3)}, TypeError, "last: expected a bool Tensor"),
        ({"following": torch.zeros(3)}, ValueError, r"following: expected shape \[3, 2\]"),
        ({"following": [1.0]}, TypeError, "following: expected a Tensor"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.zeros(3, 2), "right": torch.zeros(3, dtype=torch.bool), **change}
    with pytest.raises(error, match=message):
        ac.ops.q_halt_targets(**arguments)
