"""A dense halting loop in plain PyTorch, obviously correct and slow, and small steps and heads for tests.

Every row runs all the steps; afterwards the formulas of the papers say which of them count. Nothing here uses
the package's own reference. The arithmetic of `Cell` and `Head` is element-wise and exact in IEEE operations,
so that a row comes out with the same bits wherever it stands in a block."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

HALTED, MAX_STEPS, NONFINITE = 1, 2, 3
COMPACT = [True, False, "auto"]
POLICIES = [
    "act",
    "ponder",
    "ponder_eval",
    "max_prob",
    "margin",
    "entropy",
    "relative",
    "absolute",
    "kl",
    "fixed_int",
    "fixed_tensor",
    "bernoulli",
    "budget",
    "weighted_budget",
]
BUILT_IN = [name for name in POLICIES if "budget" not in name]
WITH_HEAD = ["act", "ponder", "ponder_eval"]
SAMPLED = ["ponder_eval", "bernoulli", "q_halt"]  # depend on the samples' numbers
DIM = 4


# --- steps and heads ----------------------------------------------------------------------------------------
class Cell(nn.Module):
    """h ← z / (1 + |z|) with z = a h + c reversed(h) + x."""

    def __init__(self, dtype=torch.float32, device="cpu", seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(DIM, generator=g, dtype=torch.float64).to(dtype).to(device))
        self.c = nn.Parameter(torch.randn(DIM, generator=g, dtype=torch.float64).to(dtype).to(device))

    def forward(self, h, x):
        z = h * self.a + h.flip(1) * self.c + x
        return z / (1 + z.abs())


class Head(nn.Module):
    """One exact logit per row, different enough between rows that they halt at different steps."""

    def __init__(self, dtype=torch.float32, device="cpu", bias=-1.0, wide=False):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([2.0, -1.5], dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.tensor(bias, dtype=dtype, device=device))
        self.wide = wide  # [n, 1] instead of [n]

    def forward(self, state):
        h = first(state)
        z = h[:, 0] * self.k[0] + h[:, 1] * self.k[1] + self.bias
        return z[:, None] if self.wide else z


class Values(Head):
    """Two logits per row, of halting and of going on."""

    def forward(self, state):
        q = first(state)
        return torch.stack([super().forward(state).view(-1), q[:, 2] * self.k[1] - self.bias], dim=1)


class Through(nn.Module):
    """A head whose logits pass through `change`."""

    def __init__(self, head, change):
        super().__init__()
        self.head = head
        self.change = change

    def forward(self, state):
        return self.change(self.head(state), state)


class Budget(ac.Policy):
    """A custom policy that spends a budget at every step, with cost, log-probability and carry."""

    def __init__(self, head, limit=1.6, weighted=False):
        super().__init__()
        self.head = head
        self.limit = limit
        self._weighted = weighted

    @property
    def weighted(self):
        return self._weighted

    def begin(self, run):
        spent = torch.zeros(run.batch, dtype=run.scalar, device=run.device)
        return spent, torch.zeros(run.batch, 2, dtype=torch.int64, device=run.device)

    def decide(self, view):
        spent, count = view.carry
        price = 0.2 + (first(view.state) - first(view.previous)).abs().amax(dim=1).to(spent.dtype)
        taken = torch.as_tensor(view.step).view(-1, 1) - 1  # in a batcher each row has its own number
        assert bool(((count == taken) | (view.row < 0)[:, None]).all())
        z = self.head(view.state).view(-1)
        return ac.Decision(
            halt=spent + price >= self.limit,
            weight=price * 0.5 if self._weighted else None,
            cost=price * 3,
            log_prob=z * 0.25,
            carry=(spent + price, count + 1),
        )


def first(state):
    while not isinstance(state, Tensor):
        state = state[0] if isinstance(state, (tuple, list)) else state["h"]
    return state


def scaled(state):
    """A readout that is not the state."""
    return first(state)[:, :3] * 4 - 0.5


# --- pytrees ------------------------------------------------------------------------------------------------
class Tree(nn.Module):
    """Run `cell` on a state that holds h, an int64 count and a tensor of another shape."""

    def __init__(self, cell, form):
        super().__init__()
        self.cell = cell
        self.form = form

    def forward(self, state, *inputs):
        if self.form == "tensor":
            return self.cell(state, *inputs)
        if self.form == "tuple":
            h, count, c = state
            h = self.cell(h, inputs[0])
            return h, count + 1, c * 0.5 + h[:, :1, None]
        h, (count, rest) = state["h"], state["rest"]
        h = self.cell(h, inputs[0]["x"]["y"] + inputs[0]["scale"][:, None])
        return {"h": h, "rest": [count + 1, {"c": rest["c"] * 0.5 + h[:, :1, None]}]}


def tree_arguments(form, h, x):
    """Return state and inputs in a form, made of the [B, DIM] tensors h and x."""
    rows = h.shape[0]
    count = torch.arange(rows, device=h.device)
    c = (torch.arange(rows * 6, device=h.device) * 0.01).to(h.dtype).view(rows, 2, 3)
    if form == "tensor":
        return h, (x,)
    if form == "tuple":
        return (h, count, c), (x,)
    return {"h": h, "rest": [count, {"c": c}]}, ({"x": {"y": x}, "scale": x.detach()[:, 0] * 0.0},)


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


# --- policies -----------------------------------------------------------------------------------------------
def make_policy(name, batch, dtype=torch.float32, device="cpu", threshold=None, wide=False, **options):
    if name == "act":
        return ac.ACT(Head(dtype, device, wide=wide), threshold=threshold or 0.9)
    if name.startswith("ponder"):
        return ac.PonderNet(Head(dtype, device, wide=wide), **options).train(name == "ponder")
    if name in ("max_prob", "margin", "entropy"):
        return ac.Confidence(threshold or {"max_prob": 0.42, "margin": 0.1, "entropy": 0.06}[name], name)
    if name in ("relative", "absolute", "kl"):
        return ac.Convergence(
            {"relative": 0.3, "absolute": 0.2, "kl": 0.01}[name],
            name,
            patience=2 if name == "absolute" else 1,
        )
    if name == "stable":
        return ac.StablePrediction(patience=2)
    if name == "fixed_int":
        return ac.FixedSteps(3)
    if name == "fixed_tensor":
        return ac.FixedSteps(torch.arange(batch, device=device) * 5 % 7 + 1)
    if name == "bernoulli":
        return ac.Bernoulli(Head(dtype, device, wide=wide), seed=3)
    if name == "q_halt":
        return ac.QHalt(Values(dtype, device, bias=1.0), exploration=0.5, seed=2**35 + 3)
    return Budget(Head(dtype, device, wide=wide), weighted=name == "weighted_budget")


def make(
    name, batch=7, form="tensor", dtype=torch.float32, device="cpu", seed=0, requires_grad=False, **options
):
    """Return step, policy, h and x of a problem whose rows halt at different steps."""
    g = torch.Generator().manual_seed(seed + 1)
    h = (
        torch.randn(batch, DIM, generator=g, dtype=torch.float64)
        .to(dtype)
        .to(device)
        .requires_grad_(requires_grad)
    )
    x = (
        torch.randn(batch, DIM, generator=g, dtype=torch.float64)
        .to(dtype)
        .to(device)
        .requires_grad_(requires_grad)
    )
    return Tree(Cell(dtype, device, seed), form), make_policy(name, batch, dtype, device, **options), h, x


# --- the dense loop -----------------------------------------------------------------------------------------
class Dense(NamedTuple):
    output: Tensor
    state: Any
    steps: Tensor
    cost: Tensor
    status: Tensor
    trace: tuple[Tensor, Tensor, Tensor, Tensor] | None
    log_prob: Tensor | None


def first_true(mask, otherwise):
    """Return the first step, counted from 1, at which each row of mask [M, B] is true."""
    steps = torch.arange(1, mask.shape[0] + 1, device=mask.device)[:, None].expand_as(mask)
    return torch.where(mask, steps, otherwise).amin(dim=0)


def held_for(still, patience):
    """Return [M, B] whether a row has stood still for so many steps, from [M - 1, B] whether in each."""
    still = torch.cat([still.new_zeros(1, *still.shape[1:]), still])
    held = still.clone()
    for back in range(1, patience):
        held[back:] &= still[:-back]
        held[:back] = False
    return held


def last_of(stack, steps):
    """Return the entries [B, ...] of stack [M, B, ...] at each row's last step."""
    return stack[steps - 1, torch.arange(stack.shape[1], device=stack.device)]


def dense(step, policy, state, *inputs, max_steps, min_steps=1, readout=None, sample_ids=None):
    """The result that AdaptiveHalt has to return."""
    layer = (lambda n: step[n]) if isinstance(step, nn.ModuleList) else (lambda n: step)
    if isinstance(step, nn.ModuleList):
        max_steps = min(max_steps, len(step))
    states, reads = [state], []
    for n in range(max_steps):
        states.append(layer(n)(states[-1], *inputs))
        reads.append(readout(states[-1]) if readout else leaves(states[-1])[0])
    batch, device = reads[0].shape[0], reads[0].device
    scalar = torch.float64 if any(t.dtype == torch.float64 for t in leaves(state)) else torch.float32
    read = torch.stack(reads)  # [M, B, ...]
    numbers = torch.arange(1, max_steps + 1, device=device)[:, None]
    allowed = numbers >= min_steps
    suspect = [torch.stack(ts) for ts in zip(*(leaves(s) for s in states[1:]), strict=True)] + [read]
    weights = cost = log_prob = None
    forced = torch.zeros(batch, dtype=torch.bool, device=device)

    def upto(n):
        return numbers <= n

    if isinstance(policy, (ac.ACT, ac.PonderNet)):
        logits = torch.stack([policy.head(s).reshape(batch) for s in states[1:]])
        suspect.append(logits)
        hazard = torch.where(allowed, torch.sigmoid(logits.to(scalar)), 0.0)
    if isinstance(policy, ac.ACT):
        reached = hazard.cumsum(0) >= policy.threshold
        steps = first_true(reached, max_steps)
        before = torch.where(numbers < steps, hazard, 0.0)
        remainder = 1 - before.sum(0)
        weights = torch.where(numbers == steps, remainder, before)
        cost = steps + remainder
        halted = reached.any(0)
    elif isinstance(policy, ac.PonderNet) and policy.training:
        survival = torch.cumprod(1 - hazard, 0)
        steps = first_true(survival < policy.epsilon, max_steps)
        previous = torch.cat([torch.ones_like(survival[:1]), survival[:-1]])
        weights = torch.where(numbers == steps, previous, hazard * previous) * upto(steps)
        q = 0.0 if policy.prior == "uniform" else math.log1p(-policy.prior)
        prior = torch.log_softmax((numbers - min_steps)[min_steps - 1 :].to(scalar) * q, dim=0)
        prior = torch.cat([prior.new_zeros(min_steps - 1, 1), prior])
        log = torch.where(weights > 0, weights, 1.0).log()
        cost = (weights * (log - prior)).sum(0)
        halted = torch.ones_like(forced)
    elif isinstance(policy, ac.PonderNet):
        draws = draws_of(policy.seed, sample_ids, batch, range(1, max_steps + 1)).to(scalar).to(device)
        halt = (draws < hazard) & allowed
        steps, halted = first_true(halt, max_steps), halt.any(0)
    elif isinstance(policy, ac.Bernoulli):
        logits = torch.stack([policy.head(s).reshape(batch) for s in states[1:]])
        suspect.append(logits)
        draws = draws_of(policy.seed, sample_ids, batch, range(1, max_steps + 1)).to(device)
        wide, chooses = logits.to(scalar), allowed & (numbers < max_steps)
        halt = (draws < torch.sigmoid(wide)) & chooses
        steps, halted = first_true(halt, max_steps), halt.any(0)
        chosen = torch.where(
            halt, torch.nn.functional.logsigmoid(wide), torch.nn.functional.logsigmoid(-wide)
        )
        log_prob = torch.where(chooses & upto(steps), chosen, 0.0).sum(0)
    elif isinstance(policy, ac.QHalt):
        q = torch.stack([policy.head(s) for s in states[1:]]).detach()
        suspect.append(q)
        explores, at = draws_of(policy.seed, sample_ids, batch, (0, 2**32)).to(device)
        least = torch.where(
            explores < policy.exploration * policy.training * (max_steps > 1),
            2 + (at * (max_steps - 1)).floor(),
            1,
        )
        halt = (q[..., 0] > q[..., 1]) & allowed & (numbers >= least)
        steps, halted = first_true(halt, max_steps), halt.any(0)
    elif isinstance(policy, ac.Confidence):
        p = torch.softmax(read.to(torch.float64), dim=-1)
        if policy.measure == "max_prob":
            sure = p.amax(-1)
        elif policy.measure == "margin":
            ordered = p.sort(dim=-1, descending=True).values
            sure = ordered[..., 0] - ordered[..., 1]
        else:
            sure = 1 + torch.special.xlogy(p, p).sum(-1) / math.log(p.shape[-1])
        halt = (sure >= policy.threshold) & allowed
        steps, halted = first_true(halt, max_steps), halt.any(0)
    elif isinstance(policy, ac.Convergence):
        flat = read.detach().reshape(max_steps, batch, -1).to(scalar)
        change = (flat[1:] - flat[:-1]).norm(dim=2)
        if policy.norm == "kl":
            p = torch.softmax(flat.double(), dim=2)
            change = (p[1:] * (p[1:] / p[:-1]).log()).sum(2)
        still = change <= policy.tol * (flat[1:].norm(dim=2) if policy.norm == "relative" else 1.0)
        halt = held_for(still, policy.patience) & allowed
        steps, halted = first_true(halt, max_steps), halt.any(0)
    elif isinstance(policy, ac.StablePrediction):
        best = read.detach().argmax(dim=-1)
        halt = held_for(best[1:] == best[:-1], policy.patience) & allowed
        steps, halted = first_true(halt, max_steps), halt.any(0)
    elif isinstance(policy, ac.FixedSteps):
        halt = (numbers >= policy.n).expand(max_steps, batch) & allowed
        steps, halted = first_true(halt, max_steps), halt.any(0)
    else:
        moved = [(first(b) - first(a)).abs().amax(1).to(scalar) for a, b in itertools.pairwise(states)]
        price = 0.2 + torch.stack(moved)
        halt = (price.cumsum(0) >= policy.limit) & allowed
        steps, halted = first_true(halt, max_steps), halt.any(0)
        cost = torch.where(upto(steps), price * 3, 0.0).sum(0)
        z = torch.stack([policy.head(s).reshape(batch) for s in states[1:]]).to(scalar)
        log_prob = torch.where(upto(steps), z * 0.25, 0.0).sum(0)
        weights = torch.where(upto(steps), price * 0.5, 0.0) if policy.weighted else None

    bad = torch.zeros(max_steps, batch, dtype=torch.bool, device=device)
    for t in suspect:
        if t.is_floating_point():
            bad = bad | ~t.detach().isfinite().reshape(max_steps, batch, -1).all(-1)
    went_bad = first_true(bad, max_steps + 1)
    broken = went_bad <= steps
    status = torch.where(broken, NONFINITE, torch.where(halted, HALTED, MAX_STEPS)).to(torch.int8)
    steps = torch.where(broken, went_bad, steps)

    if weights is None:
        output = last_of(read, steps)
    else:
        wide = torch.float64 if read.dtype == torch.float64 else torch.float32
        w = weights.view(*weights.shape, *(1 for _ in read.shape[2:])).to(wide)
        counted = (numbers <= steps).view(max_steps, batch, *(1 for _ in read.shape[2:]))
        output = torch.where(counted, w * read.to(wide), 0.0).sum(0).to(read.dtype)
    trace = None
    if isinstance(policy, ac.PonderNet) and policy.training:
        n, row = (numbers <= steps).nonzero(as_tuple=True)  # by step, then by row
        trace = (read[n, row], weights[n, row], row, n + 1)
    flat, structure = torch.utils._pytree.tree_flatten(state)
    last = [last_of(torch.stack([leaves(s)[i] for s in states[1:]]), steps) for i in range(len(flat))]
    state = torch.utils._pytree.tree_unflatten(last, structure)
    return Dense(output, state, steps, steps.to(scalar) if cost is None else cost, status, trace, log_prob)


def draws_of(seed, sample_ids, batch, steps):
    """Return the uniform draws of all rows at these steps, float64 [steps, B]."""
    ids = range(batch) if sample_ids is None else sample_ids.tolist()
    draws = [[philox(seed, i, n) for i in ids] for n in steps]
    return torch.tensor(draws, dtype=torch.float64).view(len(draws), batch)


def philox(seed, sample, step):
    """Philox 4x32-10 in Python integers (Salmon et al. 2011): uniform in [0, 1), 24 bits."""
    return (
        philox4x32([sample & M32, sample >> 32 & M32, step & M32, step >> 32], [seed & M32, seed >> 32])[0]
        >> 8
    ) / 2**24


M32 = 2**32 - 1


def philox4x32(c, k):
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & M32, p0 >> 32 ^ c[3] ^ k[1], p0 & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return c


# --- comparing ----------------------------------------------------------------------------------------------
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(got, want, dtype=None):
    if not want.is_floating_point():
        assert torch.equal(got, want)
        return
    assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, want.dtype, got.shape, want.shape)
    tolerance = TOLERANCE[dtype or want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)


def check(result, expected, dtype=None):
    """Compare a HaltResult with that of the dense loop."""
    assert torch.equal(result.steps, expected.steps), (result.steps, expected.steps)
    assert result.steps.dtype == torch.int64 and result.status.dtype == torch.int8
    assert torch.equal(result.status, expected.status)
    close(result.output, expected.output)
    assert torch.utils._pytree.tree_structure(result.state) == torch.utils._pytree.tree_structure(
        expected.state
    )
    for got, want in zip(leaves(result.state), leaves(expected.state), strict=True):
        close(got, want)
    close(result.cost, expected.cost, dtype)
    assert (result.log_prob is None) == (expected.log_prob is None)
    if expected.log_prob is not None:
        close(result.log_prob, expected.log_prob, dtype)
    assert (result.trace is None) == (expected.trace is None)
    if expected.trace is not None:
        assert torch.equal(result.trace.row, expected.trace[2]) and torch.equal(
            result.trace.step, expected.trace[3]
        )
        close(result.trace.outputs, expected.trace[0])
        close(result.trace.weights, expected.trace[1].to(result.trace.weights.dtype), dtype)


def identical(a, b):
    """Whether two tensors are bitwise equal, NaNs included."""
    a, b = torch.as_tensor(a).detach().contiguous(), torch.as_tensor(b).detach().contiguous()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() and a.dim() else torch.equal(a, b)
    )


@contextlib.contextmanager
def mode(name):
    """Run in a mode: "grad", "grad_large" (as a large block), "no_grad", "inference" or "reference"."""
    with contextlib.ExitStack() as stack:
        if name == "grad_large":
            stack.enter_context(mock.patch("adaptcomp_ext.nn.halting.fused.SMALL", 0))
        if name == "no_grad":
            stack.enter_context(torch.no_grad())
        if name == "inference":
            stack.enter_context(torch.inference_mode())
        if name == "reference":
            stack.enter_context(ac.reference_kernels())
        yield


MODES = ["grad", "grad_large", "no_grad", "reference"]
WITH_GRADIENTS = ["grad", "grad_large", "reference"]
