"""`compile_step`: the same results, and a bounded number of graphs."""

import copy
import pickle

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting import compiled_step
from tests.helpers.steps import Step

B, D, M = 40, 6, 8
STEPS = torch.arange(B) % M + 1


class Graphs:
    """A backend that runs eagerly and counts the graphs it was given."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, example_inputs):
        self.count += 1
        return module.forward


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    torch.compiler.reset()
    torch.manual_seed(0)
    graphs, compile_ = Graphs(), torch.compile
    monkeypatch.setattr(compiled_step.torch, "compile", lambda step: compile_(step, backend=graphs))
    yield graphs
    torch.compiler.reset()


def twins(step, policy, **options):
    halt = ac.AdaptiveHalt(step, policy, max_steps=M, **options)
    return halt, ac.AdaptiveHalt(step, policy, max_steps=M, compile_step=True, **options)


@pytest.mark.promise("compile")
@pytest.mark.parametrize("compact", [True, "auto"])
@pytest.mark.parametrize("training", [False, True])
def test_three_graphs_at_most_whatever_the_halting_pattern(training, compact, graphs):
    step = Step()
    for n in (STEPS, torch.randint(1, M + 1, (B,)), torch.full((B,), 3), torch.tensor([M] + [1] * (B - 1))):
        halt, compiled = twins(step, ac.FixedSteps(n), compact=compact)
        x = torch.randn(B, D)
        with torch.set_grad_enabled(training):
            got, want = compiled(torch.zeros(B, D), x), halt(torch.zeros(B, D), x)
        torch.testing.assert_close(got.output, want.output)
        assert torch.equal(got.steps, want.steps)
        if training:
            found = torch.autograd.grad(got.output.sum(), list(step.parameters()))
            torch.testing.assert_close(found, torch.autograd.grad(want.output.sum(), list(step.parameters())))
    assert 0 < graphs.count <= 3


def test_a_known_call_runs_the_compiled_step(graphs):
    halt, compiled = twins(Step(), ac.ACT(nn.Linear(D, 1)))
    x = torch.randn(B, D)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x, x).output, halt(x, x).output)
        assert compiled._learned.loops[False] is not None and graphs.count > 0
        count = graphs.count
        compiled.compile_step = False
        compiled.step.linear.weight.data = compiled.step.linear.weight.data.double()  # what a graph guards
        compiled.step.linear.bias.data = compiled.step.linear.bias.data.double()
        compiled.policy.head.double()
        compiled(x.double(), x.double())
    assert graphs.count == count


def test_stages_are_compiled_one_by_one(graphs):
    stages = nn.ModuleList([Step() for _ in range(3)])
    halt, compiled = twins(stages, ac.FixedSteps(STEPS))
    x = torch.randn(B, D)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x).output, halt(x, x).output)
        stages[1] = Step()
        torch.testing.assert_close(compiled(x, x).output, halt(x, x).output)
    assert graphs.count > 0


@pytest.mark.parametrize("listed", [False, True])
def test_a_batcher_runs_the_compiled_step(listed, graphs):
    step = nn.ModuleList([Step() for _ in range(M)]) if listed else Step()
    halt, compiled = twins(step, ac.Confidence(0.25))
    samples = [(torch.randn(D), torch.randn(D)) for _ in range(12)]
    got, want = (list(ac.ContinuousBatcher(h, slots=4).run(samples)) for h in (compiled, halt))
    assert graphs.count > 0
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.output, other.output)
        assert torch.equal(one.steps, other.steps)


def test_copies_and_pickles():
    _, compiled = twins(Step(), ac.FixedSteps(STEPS))
    x = torch.randn(B, D)
    with torch.no_grad():
        want = compiled(x, x).output
        for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            assert other.compile_step
            torch.testing.assert_close(other(x, x).output, want)


def test_compile_step_is_a_bool():
    with pytest.raises(TypeError, match="compile_step: expected a bool, got"):
        ac.AdaptiveHalt(Step(), ac.FixedSteps(1), compile_step="yes")
