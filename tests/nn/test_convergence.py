"""Convergence and StablePrediction on every path: kernel, general loop, known loop, whole runs, reference."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.known_loop import KnownLoop
from tests.helpers.halting import (
    COMPACT,
    HALTED,
    MAX_STEPS,
    MODES,
    Tree,
    identical,
    make,
    mode,
    tree_arguments,
)

POLICIES = {
    "relative": lambda patience, **o: ac.Convergence(0.3, patience=patience, **o),
    "absolute": lambda patience, **o: ac.Convergence(0.3, "absolute", patience, **o),
    "kl": lambda patience, **o: ac.Convergence(0.02, "kl", patience, **o),
    "stable": lambda patience, **o: ac.StablePrediction(patience, **o),
}


def in_python(policy):
    """The same policy, which no kernel decides."""
    policy = copy.deepcopy(policy)
    policy.fuse = lambda: None
    return policy


@pytest.mark.promise("formula", "compaction")
@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("form", ["tensor", "nested"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_path_decides_the_same(name, form, patience, device):
    step, _, h, x = make("relative", 14, form, device=device)
    state, inputs = tree_arguments(form, h, x)
    results = []
    for policy in (POLICIES[name](patience), in_python(POLICIES[name](patience))):
        for how, compact in itertools.product(MODES, COMPACT):
            halt = ac.AdaptiveHalt(step, policy, 12, compact=compact)
            with mode(how):
                results += [halt(state, *inputs), halt(state, *inputs)]  # the second one may be known
    first = results[0]
    assert len(first.steps.unique()) > 2 and int(first.steps.min()) > patience
    for result in results[1:]:
        assert torch.equal(result.steps, first.steps) and torch.equal(result.status, first.status)
        assert identical(result.output, first.output)


@pytest.mark.promise("before")
@pytest.mark.parametrize("how", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", [*POLICIES, "q_halt"])
def test_a_known_loop_gives_what_a_new_module_gives(name, how, monkeypatch):
    known = []
    run = KnownLoop.run
    monkeypatch.setattr(KnownLoop, "run", lambda *a: known.append(run(*a)) or known[-1])
    step, policy, h, x = make("q_halt", 9)
    policy = policy.eval() if name == "q_halt" else POLICIES[name](2)
    halt = ac.AdaptiveHalt(Tree(step.cell, "tensor"), policy, 8)
    with how():
        for seed in range(3):
            _, _, h, x = make("fixed_int", 9 + seed, seed=seed)
            a, b = halt(h, x), copy.deepcopy(halt)(h, x)
            assert torch.equal(a.steps, b.steps) and identical(a.output, b.output)
    assert [result is not None for result in known] == [True, True]


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_the_same_alone(name, dtype, device):
    step, _, h, x = make("relative", 13, dtype=dtype, device=device)
    halt = ac.AdaptiveHalt(step, POLICIES[name](1), 10)
    with torch.no_grad():
        whole = halt(h, x)
        for i in range(13):
            alone = halt(h[i : i + 1], x[i : i + 1])
            assert int(alone.steps) == int(whole.steps[i]) and identical(alone.output[0], whole.output[i])


class Script(nn.Module):
    """Readouts that are written down: the state is (row, step)."""

    def __init__(self, readouts):
        super().__init__()
        self.readouts = torch.tensor(readouts)

    def forward(self, state):
        return self.readouts.to(state.device)[state[:, 0].long(), state[:, 1].long() - 1]


def scripted(policy, readouts, how, device="cpu", **options):
    rows = torch.arange(float(len(readouts)), device=device)
    state = torch.stack([rows, torch.zeros_like(rows)], 1)
    halt = ac.AdaptiveHalt(
        lambda s: s + s.new_tensor([0.0, 1.0]), policy, len(readouts[0]), readout=Script(readouts), **options
    )
    with mode(how):
        return halt(state)


INF = math.inf


@pytest.mark.promise("formula")
@pytest.mark.parametrize("how", MODES)
def test_stable_predictions(how, device):
    a, b, tie, masked = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-INF, 0.0, -1.0]
    readouts = [
        [a, a, b, b, b, b],  # its prediction changes once
        [a, tie, a, a, a, a],  # of equal logits the first counts
        [masked, b, b, b, b, b],
        [a, b, a, b, a, b],
    ]
    assert scripted(ac.StablePrediction(2), readouts, how, device).steps.tolist() == [5, 3, 3, 6]
    assert scripted(ac.StablePrediction(1), readouts, how, device).steps.tolist() == [2, 2, 2, 6]
    assert scripted(ac.StablePrediction(4), readouts, how, device).steps.tolist() == [6, 5, 5, 6]
    result = scripted(ac.StablePrediction(5), readouts, how, device)
    assert result.status.tolist() == [MAX_STEPS, HALTED, HALTED, MAX_STEPS]


@pytest.mark.parametrize("how", MODES)
def test_answers_of_many_symbols_are_stable_as_a_whole(how, device):
    one = torch.nn.functional.one_hot
    answers = torch.tensor([[[0, 1, 2], [0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 1, 1], [0, 1, 1]]])
    readouts = one(answers, 19).float().tolist()
    assert scripted(ac.StablePrediction(1), readouts, how, device).steps.tolist() == [2, 3]


@pytest.mark.promise("formula")
@pytest.mark.parametrize("how", MODES)
def test_divergences_of_successive_predictions(how, device):
    p, q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    logs = [[math.log(v) + shift for v in probabilities] for probabilities in (p, q) for shift in (0.0, 3.0)]
    readouts = [
        [logs[0], logs[2], logs[2]],
        [logs[0], logs[1], logs[1]],  # another constant is the same prediction
        [[-INF, 0.0, 1.0], [-INF, 5.0, 6.0], [0.0, 0.0, 0.0]],  # a mask that stays
        [[-INF, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]],  # one that goes
    ]
    assert scripted(ac.Convergence(kl * 1.001, "kl"), readouts, how, device).steps.tolist() == [2, 2, 2, 3]
    assert scripted(ac.Convergence(kl * 0.999, "kl"), readouts, how, device).steps.tolist() == [3, 2, 2, 3]


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_masked_classes_are_ordinary(name, how, device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=g).to(device)
    logits[:, 2] = -INF
    halt = ac.AdaptiveHalt(lambda h: h * 0.9, POLICIES[name](1), 8, readout=lambda h: h)
    with mode(how):
        result = halt(logits)
    assert result.status.tolist() == [HALTED] * 6


@pytest.mark.promise("modules")
@pytest.mark.parametrize("name", POLICIES)
def test_copies_show_their_settings(name):
    policy = POLICIES[name](3, lookahead=1)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other.patience == 3 and other.lookahead == 1
        assert "patience=3, lookahead=1" in repr(other)


def test_empty_batches_and_one_step(device):
    for name in POLICIES:
        policy = POLICIES[name](1)
        for rows in (0, 1):
            h = torch.zeros(rows, 3, device=device)
            for steps in (1, 3):
                result = ac.AdaptiveHalt(lambda h: h * 1, policy, steps)(h)
                assert result.steps.tolist() == [min(steps, 2)] * rows


@pytest.mark.promise("bad input")
def test_bad_input():
    def run(policy, h):
        return ac.AdaptiveHalt(lambda h: h * 1, policy, 3)(h)

    for bad in (torch.zeros(3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"readout: StablePrediction expects class logits of shape"):
            run(ac.StablePrediction(), bad)
    for bad in (torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2, 2)):
        with pytest.raises(ValueError, match=r'readout: Convergence expects class logits .* for norm "kl"'):
            run(ac.Convergence(0.1, "kl"), bad)
    with pytest.raises(TypeError, match="readout: expected float32"):
        run(ac.StablePrediction(), torch.zeros(3, 2, dtype=torch.int64))
    for value in (0, 1.5, True, "2"):
        with pytest.raises((TypeError, ValueError), match=r"^patience: expected"):
            ac.StablePrediction(value)


def test_a_whole_run_has_no_divergences_and_no_predictions():
    x, h = torch.randn(5, 3), torch.zeros(5, 4)
    for policy in (ac.Convergence(1e9, "kl"), ac.StablePrediction(1)):
        halt = ac.AdaptiveHalt(ac.cells.GRU(3, 4), policy, 6)
        assert halt.plan(h, x).way == "loop" and int(halt(h, x).steps.min()) == 2
    assert ac.AdaptiveHalt(ac.cells.GRU(3, 4), ac.Convergence(1e9), 6).plan(h, x).way == "kernel"
    torch.manual_seed(0)
    x, h, head = torch.randn(30, 3), torch.zeros(30, 4), nn.Linear(4, 1)
    nn.init.normal_(head.weight, std=5.0)
    halt = ac.AdaptiveHalt(ac.cells.GRU(3, 4), ac.QHalt(head).eval(), 6)
    assert halt.plan(h, x).way == "kernel"
    whole = halt(h, x)
    with ac.reference_kernels():
        assert torch.equal(halt(h, x).steps, whole.steps) and len(whole.steps.unique()) > 1


def test_a_known_whole_run_sees_changed_settings():
    torch.manual_seed(0)
    x, h = torch.randn(5, 3), torch.zeros(5, 4)
    halt = ac.AdaptiveHalt(ac.cells.GRU(3, 4), ac.Convergence(1e9), 6)
    assert halt(h, x).steps.tolist() == halt(h, x).steps.tolist() == [2] * 5
    halt.policy.lookahead = 1
    assert halt(h, x).steps.tolist() == [3] * 5
    halt.policy.lookahead, halt.policy.norm, halt.policy.tol = 0, "kl", 0.0
    assert int(halt(h, x).steps.min()) > 2
    head = nn.Linear(4, 1)
    nn.init.constant_(head.bias, 9.0)
    halt = ac.AdaptiveHalt(ac.cells.GRU(3, 4), ac.QHalt(head, exploration=1.0, seed=0), 6).eval()
    assert halt(h, x).steps.tolist() == halt(h, x).steps.tolist() == [1] * 5
    assert int(halt.train()(h, x).steps.min()) > 1
    assert halt.eval()(h, x).steps.tolist() == [1] * 5


@pytest.mark.promise("formula")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("width", [40, 100, 700])
@pytest.mark.parametrize("name", POLICIES)
def test_wide_readouts(name, width, how, device):
    """The state halves its distance to x, so that the readout moves less and less."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, width, generator=g).to(device)
    x[:, 3] = -INF if name in ("kl", "stable") else 0.0
    gain = (torch.arange(1, 10, device=device) / 10.0)[:, None]
    readout = (lambda z: z) if name in ("kl", "stable") else None

    def step(z, x, gain):
        return torch.where(x == -INF, x, z + gain * (x - z))

    start = torch.where(x == -INF, x, 3.0)
    policy, most = POLICIES[name](1), 12
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, most, readout=readout)(start, x, gain)
    z, last, steps = start, None, [most] * 9
    for n in range(1, most + 1):
        z = step(z, x, gain)
        if last is not None:
            if name == "stable":
                same = z.argmax(1) == last.argmax(1)
            else:
                same = ac.reference.stands_still(z.double(), last.double(), policy.norm, policy.tol)
            steps = [min(s, n) if still else s for s, still in zip(steps, same.tolist(), strict=True)]
        last = z
    assert result.steps.tolist() == steps
