"""Runs in a graph of torch.compile in one piece: the same results and gradients, and what splits a graph."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.ops import opaque
from adaptcomp_ext.ops._plain import TELLS_EXPORT
from tests.helpers.steps import Step

D, M = 8, 5
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(not TELLS_EXPORT, reason="this torch splits the graph at a run"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
    gc.collect()
    assert not opaque._kept  # no autograd graph outlives its run


class Pairs(nn.Module):
    """A state of several tensors in a dictionary, and an input that may be None."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, state, x, mask=None):
        h = torch.tanh(self.linear(state["h"] + x))
        if mask is not None:
            h = h * mask
        return {"h": h, "count": state["count"] + 1}


class Still(ac.Policy):
    def decide(self, view):
        return ac.Decision(view.readout[:, 0] > 0)


class Model(nn.Module):
    """A loop between two layers; everything in its result goes into the model's."""

    def __init__(self, policy, step=None, **options):
        super().__init__()
        self.before = nn.Linear(D, D)
        self.halt = ac.AdaptiveHalt(Step(D) if step is None else step, policy, max_steps=M, **options)

    def forward(self, x):
        r = self.halt(self.before(x), x)
        y = r.output.sum(-1) * 2 + r.state.sum(-1) + r.cost + r.steps + r.status
        if r.trace is not None:
            weights = 1 if r.trace.weights is None else r.trace.weights
            y = y + (r.trace.outputs.sum(-1) * weights * r.trace.step).sum()
        return y if r.log_prob is None else y + r.log_prob


MODELS = {
    "act": lambda: Model(ac.ACT(nn.Linear(D, 1))),
    "cell": lambda: Model(ac.ACT(nn.Linear(D, 1)), ac.cells.GRU(D, D)),
    "fixed": lambda: Model(ac.FixedSteps(3)),
    "confidence": lambda: Model(ac.Confidence(0.3), readout=nn.Linear(D, 4)),
    "convergence": lambda: Model(ac.Convergence(0.1)),
    "custom": lambda: Model(Still()),
    "pondernet": lambda: Model(ac.PonderNet(nn.Linear(D, 1))),
    "pondernet, evaluation": lambda: Model(ac.PonderNet(nn.Linear(D, 1))).eval(),
    "bernoulli": lambda: Model(ac.Bernoulli(nn.Linear(D, 1), seed=3)),
    "any of": lambda: Model(ac.AnyOf(ac.Convergence(0.1), ac.Bernoulli(nn.Linear(D, 1), seed=3))),
    "q halt": lambda: Model(ac.QHalt(nn.Linear(D, 2))).eval(),
    "trace": lambda: Model(ac.Confidence(0.9, "margin"), keep_trace=True),
    "stages": lambda: Model(ac.Confidence(0.3), nn.ModuleList([Step(D) for _ in range(M)])),
}


def test_a_parameter_that_no_result_depends_on_keeps_no_gradient():
    model = MODELS["pondernet, evaluation"]()
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(4, D)).sum().backward()
    assert model.halt.policy.head.weight.grad is None and model.before.weight.grad is not None


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
    zeros = [torch.zeros_like(t) for t in (x, *model.parameters())]
    return [y, *(z if g is None else g for g, z in zip(found, zeros, strict=True))]


@pytest.mark.promise("compile")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_one_operator_of_a_graph(name, backend):
    model = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (9, 5, 1):
        x = torch.randn(batch, D)
        for got, want in zip(gradients(compiled, x), gradients(model, x), strict=True):
            torch.testing.assert_close(got, want)
    torch.compiler.reset()  # torch makes eight graphs of a function at most
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.promise("compile")
@pytest.mark.parametrize("name", ["act", "cell", "pondernet"])
def test_inductor(name):
    model = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(9, D)
    for got, want in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.promise("compile")
def test_a_training_in_a_compiled_model_is_the_same():
    model, x = MODELS["act"](), torch.randn(32, D)
    twin = copy.deepcopy(model)
    for each, call in ((model, torch.compile(model, fullgraph=True, backend="aot_eager")), (twin, twin)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_dictionaries_none_and_sample_ids():
    halt = ac.AdaptiveHalt(
        Pairs(), ac.PonderNet(nn.Linear(D, 1)), max_steps=M, readout=lambda state: state["h"]
    ).eval()
    halt.policy.head = Head()
    state = {"h": torch.randn(6, D), "count": torch.zeros(6, dtype=torch.int64)}
    x, mask = torch.randn(6, D), torch.rand(6, D)
    ids = torch.arange(6) + 40

    def call(h, count, x, mask, ids):
        return halt({"h": h, "count": count}, x, mask, sample_ids=ids)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for given in (None, mask):
        got, want = (run(state["h"], state["count"], x, given, ids) for run in (compiled, call))
        assert torch.equal(got.steps, want.steps) and torch.equal(got.state["count"], want.state["count"])
        torch.testing.assert_close(got.state["h"], want.state["h"])
        torch.testing.assert_close(got.output, want.output)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 1)

    def forward(self, state):
        return self.linear(state["h"])


@pytest.mark.promise("compile")
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_descent_is_one_operator_of_a_graph(gradient, closed):
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2 * D, D)

        def forward(self, y, x):
            return self.linear(torch.cat([y, x], -1)).square().sum(-1) + y.square().sum(-1)

    energy = ac.MLPEnergy(D, D, 16) if closed else Energy()
    options = {"step_size": 0.05, "max_steps": 8, "gradient": gradient, "keep_trace": gradient == "unrolled"}
    descend = ac.EnergyDescent(energy, **options)

    class Descent(nn.Module):
        def __init__(self):
            super().__init__()
            self.descend, self.before = descend, nn.Linear(D, D)

        def forward(self, x):
            r = self.descend(self.before(x), x)
            y = r.y.sum(-1) + r.energy + r.steps + r.status
            return y if r.trace is None else y + (r.trace.outputs.sum(-1) * r.trace.weights).sum()

    model = Descent()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (7, 4):
        x = torch.randn(batch, D)
        for got, want in zip(gradients(compiled, x), gradients(model, x), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.promise("compile")
def test_autocast_acts_within_the_operator():
    model, x = MODELS["act"](), torch.randn(9, D)
    seen = []
    model.halt.step.linear.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = call(x)
        seen.clear()
        got = compiled(x)
    assert set(seen[-M:]) == {torch.bfloat16}
    torch.testing.assert_close(got, want)


@pytest.mark.promise("compile")
def test_other_parameters_by_a_functional_call_within_the_graph():
    model, x = MODELS["act"](), torch.randn(9, D)
    other = {name: p.detach() + 0.1 for name, p in model.named_parameters()}

    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(other, x), call(other, x))
    wanted = {name: p.clone().requires_grad_() for name, p in other.items()}
    found = torch.autograd.grad(compiled(wanted, x).sum(), list(wanted.values()))
    expected = torch.autograd.grad(call(wanted, x).sum(), list(wanted.values()))
    torch.testing.assert_close(found, expected)


def test_dropout_draws_anew_in_each_of_two_equal_calls():
    halt = ac.AdaptiveHalt(nn.Dropout(0.5), ac.FixedSteps(1), max_steps=1)
    first, second = torch.compile(
        lambda x: (halt(x).output, halt(x).output), fullgraph=True, backend="aot_eager"
    )(torch.ones(64, D))
    assert not torch.equal(first, second)


def test_results_may_be_written_to_while_the_backward_pass_waits():
    """What the compiled graph does to a result in place does not reach the autograd graph of the run."""
    model = MODELS["cell"]()

    def call(x):
        result = model.halt(model.before(x), x)
        state = result.state
        state.mul_(3)
        return state + result.output

    def twin(x):
        result = model.halt(model.before(x), x)
        return result.state * 3 + result.output

    compiled, x = torch.compile(call, fullgraph=True, backend="aot_eager"), torch.randn(6, D)
    found = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(twin(x).sum(), list(model.parameters())))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_itself(copied):
    model, x = MODELS["act"](), torch.randn(4, D)
    other = copied(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
        torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(x), other(x))
        assert other.halt._number != model.halt._number


def test_a_mode_that_changes_compiles_anew():
    model, x = MODELS["pondernet"](), torch.randn(4, D)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for training in (True, False, True):
            model.train(training)
            torch.testing.assert_close(compiled(x), model(x))
        model.eval()
        for policy in (ac.FixedSteps(4), ac.Confidence(0.2)):
            model.halt.policy = policy
            torch.testing.assert_close(compiled(x), model(x))
        model.halt.keep_trace = True
        torch.testing.assert_close(compiled(x), model(x))
        model.halt.readout = nn.Linear(D, 3)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_second_derivative_is_refused():
    halt = ac.AdaptiveHalt(Step(D), ac.FixedSteps(2), max_steps=M)
    compiled = torch.compile(lambda h, x: halt(h, x).output, fullgraph=True, backend="eager")
    h, x = torch.randn(3, D, requires_grad=True), torch.randn(3, D)
    (g,) = torch.autograd.grad(compiled(h, x).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g.sum(), h)


# --- what splits a graph ------------------------------------------------------------------------------------
def outside():
    weight = torch.randn(D, D, requires_grad=True)
    return ac.AdaptiveHalt(lambda h: torch.tanh(h @ weight), ac.FixedSteps(2), max_steps=M)


class Shrinking(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size - 1)

    def forward(self, h):
        return self.linear(h)


def shrinking():
    stages = nn.ModuleList([Shrinking(D - i) for i in range(3)])
    return ac.AdaptiveHalt(stages, ac.FixedSteps(2), max_steps=3, readout=lambda h: h[:, :2])


def reading():
    def step(h):
        return h * 2 if bool((h > 100).any()) else h + 1

    return ac.AdaptiveHalt(step, ac.FixedSteps(2), max_steps=M, check_rows=False)


SPLIT = {"a parameter outside": outside, "stages of other shapes": shrinking, "a step that reads": reading}


@pytest.mark.promise("compile")
@pytest.mark.filterwarnings("ignore:AdaptiveHalt. step is a plain function")
@pytest.mark.parametrize("name", SPLIT)
def test_what_cannot_be_an_operator_splits_the_graph(name):
    halt, x = SPLIT[name](), torch.randn(6, D)

    def call(x):
        return halt(x * 2).output + 1

    with pytest.raises(RuntimeError, match=r"AdaptiveHalt does not support torch\.compile\(fullgraph=True\)"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), call(x))


def test_a_result_of_another_form_than_the_graph_was_made_for():
    halt, x = ac.AdaptiveHalt(Step(D), Still(), max_steps=M), torch.randn(6, D)
    compiled = torch.compile(lambda x: halt(x, x).output, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        halt.policy.decide = lambda view: ac.Decision(view.row >= 0, log_prob=torch.zeros(len(view.row)))
        with pytest.raises(RuntimeError, match="expected results of the form for which torch"):
            compiled(x)
