"""Exported programs: the same answers, a loop that ends with the last row, and no need of this package."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.ops._plain import TELLS_EXPORT
from tests.helpers.steps import Step

D, M = 6, 6
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(not TELLS_EXPORT, reason="this torch does not tell an export from a compilation"),
]


class Numbered(Step):
    def forward(self, h, x, *, n):
        return super().forward(h, x) / n


class Model(nn.Module):
    def __init__(self, policy, step=None, **options):
        super().__init__()
        self.encode = nn.Linear(D, D)
        self.halt = ac.AdaptiveHalt(Step() if step is None else step, policy, max_steps=M, **options)

    def forward(self, x):
        r = self.halt(self.encode(x), x)
        results = (r.output, r.state, r.steps, r.cost, r.status)
        return results if r.log_prob is None else (*results, r.log_prob)


def stages():
    return nn.ModuleList([Step() for _ in range(4)])


MODELS = {
    "act": lambda: Model(ac.ACT(nn.Linear(D, 1))),
    "cell": lambda: Model(ac.ACT(nn.Linear(D, 1)), ac.cells.GRU(D, D)),
    "fixed": lambda: Model(ac.FixedSteps(3)),
    "confidence": lambda: Model(ac.Confidence(0.35), readout=nn.Linear(D, 4)),
    "confidence in the state": lambda: Model(ac.Confidence(0.1, "margin")),
    "convergence": lambda: Model(ac.Convergence(0.2)),
    "pondernet": lambda: Model(ac.PonderNet(nn.Linear(D, 1))),
    "q halt": lambda: Model(ac.QHalt(nn.Linear(D, 2))),
    "bernoulli": lambda: Model(ac.Bernoulli(nn.Linear(D, 1), seed=4)),
    "any of": lambda: Model(ac.AnyOf(ac.Convergence(0.1), ac.Confidence(0.3))),
    "lookahead": lambda: Model(ac.Confidence(0.3, lookahead=1)),
    "min_steps": lambda: Model(ac.ACT(nn.Linear(D, 1)), min_steps=3),
    "number": lambda: Model(ac.Confidence(0.3), Numbered()),
    "stages": lambda: Model(ac.Confidence(0.3), stages()),
    "exits": lambda: Model(
        ac.Confidence(0.5), stages(), readout=nn.ModuleList([nn.Linear(D, 3) for _ in range(4)])
    ),
}


def exported(model, rows=7):
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(model, (torch.randn(rows, D),), dynamic_shapes=({0: batch},), strict=False)


def same(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.promise("export")
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_gives_the_same_answers(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    program = exported(model)
    assert "adaptcomp" not in str(program.graph)
    seen = set()
    with torch.no_grad():
        for rows in (7, 3, 64):
            x = torch.randn(rows, D)
            want = model(x)
            seen |= set(want[2].tolist())
            same(program.module()(x), want)
    assert len(seen) > 1 or name == "fixed"


@pytest.mark.promise("export")
def test_a_row_that_is_not_finite_ends_alone():
    torch.manual_seed(0)
    model = Model(ac.FixedSteps(3)).eval()
    program, x = exported(model), torch.randn(5, D)
    x[2] = float("inf")
    with torch.no_grad():
        got, want = program.module()(x), model(x)
    assert want[4].tolist() == [1, 1, 3, 1, 1]
    others = [0, 1, 3, 4]
    same([t[others] for t in got], [t[others] for t in want])
    assert got[4].tolist() == want[4].tolist() and got[2].tolist() == want[2].tolist()


@pytest.mark.promise("export")
def test_masked_classes_in_the_state_are_ordinary():
    """The readout is a tensor of the state, in which −inf masks a class; in the rest it ends the row."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, state):
            h = torch.tanh(self.linear(state[0]))
            return h, (2 * h).masked_fill(torch.arange(D) == 2, -torch.inf)

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.halt = ac.AdaptiveHalt(
                Masked(), ac.Confidence(0.35), max_steps=M, readout=lambda state: state[1]
            )

        def forward(self, h):
            result = self.halt((h, torch.zeros_like(h)))
            return result.output, result.steps, result.status

    torch.manual_seed(0)
    model, h = Only().eval(), torch.randn(9, D)
    program = torch.export.export(model, (h,), strict=False).module()
    with torch.no_grad():
        want = model(h)
        same(program(h), want)
    assert (want[2] != ac.Status.NONFINITE).all()


@pytest.mark.promise("export")
@pytest.mark.parametrize("name", ["loop", "stages"])
def test_the_loop_ends_with_the_last_active_row(name):
    """A third step would look for a row that its table does not have."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(2, D))

        def forward(self, h, x):
            return h + self.table.index_select(0, h[:, 0].long())

    step = Counting() if name == "loop" else nn.ModuleList([Counting() for _ in range(4)])
    halt = ac.AdaptiveHalt(step, ac.FixedSteps(2), max_steps=4)

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.halt = halt

        def forward(self, h):
            return self.halt(h, h).state

    program = torch.export.export(Only(), (torch.zeros(3, D),), strict=False).module()
    assert torch.equal(program(torch.zeros(3, D)), torch.full((3, D), 2.0))
    halt.policy.n = 3
    with pytest.raises((IndexError, RuntimeError)):
        torch.export.export(Only(), (torch.zeros(3, D),), strict=False).module()(torch.zeros(3, D))


@pytest.mark.promise("export")
def test_a_fresh_process_runs_it_without_this_package(tmp_path):
    torch.manual_seed(0)
    model = MODELS["act"]().eval()
    x = torch.randn(64, D)
    with torch.no_grad():
        torch.save([x, *model(x)], tmp_path / "want.pt")
    torch.export.save(exported(model), tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "compiled.pt2"))
    program = """
import sys, torch
sys.modules["adaptcomp_ext"] = None  # an import would raise
folder = sys.argv[1]
x, *want = torch.load(f"{folder}/want.pt")
for run in (torch.export.load(f"{folder}/model.pt2").module(),
            torch._inductor.aoti_load_package(f"{folder}/compiled.pt2")):
    for got, expected in zip(run(x), want, strict=True):
        torch.testing.assert_close(got, expected)
print("the same answers")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert "the same answers" in done.stdout, done.stderr[-2000:]


@pytest.mark.promise("export")
@pytest.mark.parametrize("name", ["act", "convergence", "pondernet"])
def test_onnx_runtime_runs_it(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, path = MODELS[name]().eval(), str(tmp_path / "model.onnx")
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(
        model, (torch.randn(7, D),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    ).save(path)
    session, x = runtime.InferenceSession(path), torch.randn(64, D)
    with torch.no_grad():
        want = model(x)
    same([torch.from_numpy(t) for t in session.run(None, {session.get_inputs()[0].name: x.numpy()})], want)


def test_a_route_is_exported_masked():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Linear(D, 3)

        def forward(self, x):
            return ac.route(x[:, 0] > 0, self.large, x, otherwise=torch.zeros(x.shape[0], 3))

    model = Routed().eval()
    program = exported(model)
    for sign in (1, -1):  # no row, every row, and some
        for x in (torch.randn(5, D), sign * torch.ones(4, D)):
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("options", [{"keep_trace": True}, {}])
def test_a_trace_is_refused(options):
    model = Model(ac.Confidence(0.5) if options else ac.PonderNet(nn.Linear(D, 1)), **options)
    with pytest.raises(RuntimeError, match=r"AdaptiveHalt does not support torch\.export with a trace"):
        exported(model)
    assert "cannot be exported with a trace" in ac.export_notes(model)


def test_notes_name_the_parts():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader = Model(ac.AnyOf(ac.Bernoulli(nn.Linear(D, 1)), ac.Convergence(0.1)), stages())
            self.descend = ac.EnergyDescent(ac.MLPEnergy(D, D, 4))

    notes = ac.export_notes(Both()).splitlines()
    assert [line.partition(":")[0] for line in notes] == ["reader.halt", "descend"]
    assert "masked" in notes[0] and "seed" in notes[0] and "cannot be exported" in notes[1]
    assert ac.export_notes(nn.Linear(2, 2)) == ""
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got"):
        ac.export_notes("model")
