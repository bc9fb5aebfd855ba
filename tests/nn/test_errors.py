"""Bad input: a TypeError or ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.ops import _checks
from tests.helpers.halting import DIM, MODES, POLICIES, Head, make, make_policy, mode

H = torch.randn(5, DIM)
IDENTITY = ac.FixedSteps(2)
NOT_TENSORS = [3, 1.5, "h", object(), [], {}, [1.0], (H, 3)]


def halt(step=lambda h, *_: h, policy=IDENTITY, max_steps=3, **options):
    return ac.AdaptiveHalt(step, policy, max_steps, **options)


# --- the constructor ----------------------------------------------------------------------------------------
BAD_OPTIONS = [
    ({"step": 3}, TypeError, "step: expected a callable.*got int 3"),
    ({"step": None}, TypeError, "step: expected a callable.*got NoneType"),
    ({"step": nn.ModuleList()}, ValueError, "step: .*at least one layer.*empty"),
    ({"step": nn.GRUCell(4, 4)}, TypeError, "step: .*GRUCell.*takes the input first.*cells.GRU.from_torch"),
    (
        {"step": nn.LSTMCell(4, 4)},
        TypeError,
        "step: .*LSTMCell.*takes the input first.*cells.LSTM.from_torch",
    ),
    ({"step": nn.ModuleList([nn.Identity(), nn.RNNCell(4, 4)])}, TypeError, "step: .*RNNCell.*input first"),
    ({"policy": "act"}, TypeError, "policy: expected an adaptcomp_ext.Policy, got str 'act'"),
    ({"policy": ac.ACT}, TypeError, "policy: expected an adaptcomp_ext.Policy"),
    ({"readout": nn.GRUCell(4, 4)}, TypeError, "readout: .*readout.state.*GRUCell.*which is a step"),
    ({"readout": 1}, TypeError, "readout: expected a callable or None, got int 1"),
    ({"compact": "yes"}, ValueError, "compact: expected one of True, False, 'auto', got 'yes'"),
    ({"compact": None}, TypeError, 'compact: expected True, False or "auto", got NoneType'),
    ({"compact": 0}, TypeError, "compact: .*got int 0"),
    ({"compact": 1.0}, TypeError, "compact: .*got float 1.0"),
    ({"max_steps": 0}, ValueError, "max_steps: expected an int >= 1, got 0"),
    ({"max_steps": -3}, ValueError, "max_steps: expected an int >= 1, got -3"),
    ({"max_steps": True}, TypeError, "max_steps: expected an int, got bool True"),
    ({"max_steps": 4.0}, TypeError, "max_steps: expected an int, got float 4.0"),
    ({"max_steps": torch.tensor(4)}, TypeError, "max_steps: expected an int"),
    ({"min_steps": 0}, ValueError, "min_steps: expected an int >= 1, got 0"),
    ({"min_steps": False}, TypeError, "min_steps: expected an int, got bool False"),
    ({"min_steps": 2.5}, TypeError, "min_steps: expected an int, got float 2.5"),
    ({"min_steps": 4}, ValueError, "min_steps: expected at most max_steps = 3, got 4"),
    (
        {"min_steps": 3, "step": nn.ModuleList([nn.Identity()] * 2)},
        ValueError,
        "min_steps: .*at most max_steps = 2, got 3",
    ),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS, ids=[str(i) for i in range(len(BAD_OPTIONS))]
)
def test_constructor(options, error, message):
    with pytest.raises(error, match=message):
        halt(**options)


HEAD = Head()
BAD_POLICIES = [
    (lambda: ac.ACT(3), TypeError, "head: expected a callable.*got int 3"),
    (lambda: ac.PonderNet(None), TypeError, "head: expected a callable.*got NoneType"),
    (lambda: ac.ACT(HEAD, 0.0), ValueError, r"threshold: expected a number in \(0, 1\], got 0.0"),
    (lambda: ac.ACT(HEAD, 1.01), ValueError, r"threshold: expected a number in \(0, 1\], got 1.01"),
    (lambda: ac.ACT(HEAD, float("nan")), ValueError, r"threshold: .*got nan"),
    (lambda: ac.ACT(HEAD, float("inf")), ValueError, r"threshold: .*got inf"),
    (lambda: ac.ACT(HEAD, "0.5"), TypeError, "threshold: expected a number, got str"),
    (lambda: ac.ACT(HEAD, True), TypeError, "threshold: expected a number, got bool"),
    (lambda: ac.ACT(HEAD, torch.tensor(0.5)), TypeError, "threshold: expected a number, got a tensor"),
    (lambda: ac.Confidence(-0.5), ValueError, r"threshold: .*got -0.5"),
    (lambda: ac.Confidence(float("nan")), ValueError, r"threshold: .*got nan"),
    (lambda: ac.Confidence(None), TypeError, "threshold: expected a number, got NoneType"),
    (
        lambda: ac.Confidence(0.5, "variance"),
        ValueError,
        "measure: expected one of 'max_prob', 'margin', 'entropy', got 'variance'",
    ),
    (lambda: ac.Confidence(0.5, 0), ValueError, "measure: expected one of .*, got 0"),
    (lambda: ac.Convergence(-1e-3), ValueError, "tol: .*got -0.001"),
    (lambda: ac.Convergence(float("nan")), ValueError, "tol: .*got nan"),
    (lambda: ac.Convergence("small"), TypeError, "tol: .*got str"),
    (
        lambda: ac.Convergence(1e-3, "max"),
        ValueError,
        "norm: expected one of 'relative', 'absolute', 'kl', got 'max'",
    ),
    (lambda: ac.Convergence(1e-3, patience=0), ValueError, "patience: expected an int >= 1, got 0"),
    (lambda: ac.PonderNet(HEAD, "geometric"), ValueError, "prior: .*'geometric'"),
    (lambda: ac.PonderNet(HEAD, 0.0), ValueError, "prior: .*got 0.0"),
    (lambda: ac.PonderNet(HEAD, 1.0), ValueError, "prior: .*got 1.0"),
    (lambda: ac.PonderNet(HEAD, None), TypeError, "prior: .*got NoneType"),
    (lambda: ac.PonderNet(HEAD, epsilon=-0.1), ValueError, "epsilon: .*got -0.1"),
    (lambda: ac.PonderNet(HEAD, epsilon=1.0), ValueError, "epsilon: .*got 1.0"),
    (lambda: ac.PonderNet(HEAD, seed=-1), ValueError, "seed: expected an int >= 0, got -1"),
    (lambda: ac.PonderNet(HEAD, seed=1.0), TypeError, "seed: expected an int, got float"),
    (lambda: ac.FixedSteps(0), ValueError, "n: expected an int >= 1, got 0"),
    (lambda: ac.FixedSteps(True), TypeError, "n: expected an int, got bool True"),
    (lambda: ac.FixedSteps(2.0), TypeError, "n: expected an int, got float 2.0"),
    (lambda: ac.FixedSteps([1, 2]), TypeError, "n: expected an int, got list"),
    (
        lambda: ac.FixedSteps(torch.tensor([1.0])),
        TypeError,
        "n: .*int64 tensor of shape .*got a tensor of shape .1., torch.float32",
    ),
    (lambda: ac.FixedSteps(torch.tensor([[1]])), TypeError, r"n: .*got a tensor of shape \[1, 1\]"),
    (lambda: ac.FixedSteps(torch.tensor([1], dtype=torch.int32)), TypeError, "n: .*torch.int32"),
    (
        lambda: ac.FixedSteps(torch.tensor([2, 0])),
        ValueError,
        "n: expected at least 1 step for every row, got 0",
    ),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("build", "error", "message"), BAD_POLICIES, ids=[str(i) for i in range(len(BAD_POLICIES))]
)
def test_policy_options(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_seed_has_room_for_63_bits():
    ac.AdaptiveHalt(lambda h: h, ac.PonderNet(HEAD, seed=2**63 - 1).eval(), 2)(H)
    for seed in (2**63, 2**64):
        with pytest.raises(ValueError, match=r"seed: expected an int < 2\*\*63, got"):
            ac.PonderNet(HEAD, seed=seed)


# --- the arguments of a call --------------------------------------------------------------------------------
@pytest.mark.promise("bad input")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(
    "bad", NOT_TENSORS, ids=[type(bad).__name__ + str(i) for i, bad in enumerate(NOT_TENSORS)]
)
def test_state_and_inputs_that_are_no_tensors(bad, how):
    with mode(how):
        with pytest.raises(TypeError, match=r"state.*expected a Tensor"):
            halt()(bad)
        with pytest.raises(TypeError, match=r"inputs\[1\].*expected a Tensor"):
            halt()(H, H, bad)


@pytest.mark.parametrize("nothing", [None, (None, None), {"h": None}])
def test_a_state_needs_a_tensor(nothing):
    with pytest.raises(TypeError, match=r"state: expected a Tensor or a pytree of Tensors, got no tensor"):
        halt()(nothing)


BAD_TENSORS = [
    (torch.tensor(1.0), ValueError, "batch dimension"),
    (torch.zeros(5, 2, dtype=torch.complex64), TypeError, "real dtype, got torch.complex64"),
    (torch.zeros(5, 2).to_sparse(), TypeError, "dense tensor, got layout torch.sparse_coo"),
    (torch.zeros(5, 2, device="meta"), ValueError, "meta"),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(("bad", "error", "message"), BAD_TENSORS, ids=[m for _, _, m in BAD_TENSORS])
def test_tensors_of_a_wrong_kind(bad, error, message, how):
    with mode(how):
        with pytest.raises(error, match=f"state: .*{message}"):
            halt()(bad)
        with pytest.raises(error, match=rf"state \(leaf 1\): .*{message}"):
            halt()((H, bad))
        with pytest.raises(error, match=rf"inputs\[0\]: .*{message}"):
            halt()(H, bad)


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("how", MODES)
def test_batch_sizes_that_differ(how):
    with mode(how):
        with pytest.raises(
            ValueError, match=r"state \(leaf 1\): expected 5 rows like the state, got shape \[4, 4\]"
        ):
            halt()((H, H[:4]))
        with pytest.raises(ValueError, match=r"inputs\[1\]: expected 5 rows like the state, got shape \[6\]"):
            halt()(H, H, torch.zeros(6))
        with pytest.raises(ValueError, match="sample_ids: expected 5 rows"):
            halt()(H, sample_ids=torch.arange(4))


def test_devices_that_differ():
    meta = torch.zeros(5, DIM, device="meta")
    for arguments in ((meta, H), (H, meta), ((H, meta),), (H, {"a": [H, meta]})):
        with pytest.raises(ValueError, match="meta"):
            halt()(*arguments)


@pytest.mark.parametrize(
    "ids", [torch.zeros(5), torch.zeros(5, dtype=torch.int32), torch.zeros(5, 1, dtype=torch.int64), [0] * 5]
)
def test_sample_ids(ids):
    with pytest.raises(TypeError, match=r"sample_ids: expected int64 of shape \[B\], got"):
        halt()(H, sample_ids=ids)


def test_fixed_steps_for_another_batch():
    with pytest.raises(ValueError, match=r"n: expected shape \[5\].*got \[4\]"):
        halt(policy=ac.FixedSteps(torch.ones(4, dtype=torch.int64)))(H)
    with pytest.raises(ValueError, match=r"n: .*meta"):
        halt(policy=ac.FixedSteps(torch.ones(5, dtype=torch.int64)).to("meta"))(H)


@pytest.mark.promise("before")
def test_nothing_runs_before_the_arguments_are_checked():
    calls = []
    model = halt(lambda h, *_: calls.append(1) or h)
    for bad in ((H, H[:2]), (H, 3), ((H, H[:1]),)):
        with pytest.raises((TypeError, ValueError)):
            model(*bad)
    with pytest.raises(ValueError):
        halt(lambda h: calls.append(1) or h, ac.FixedSteps(torch.ones(2, dtype=torch.int64)))(H)
    assert not calls


@pytest.mark.promise("bad input")
def test_cuda_tensors_need_a_build_with_cuda(monkeypatch):
    monkeypatch.setattr(_checks, "HAS_CUDA", False)
    with pytest.raises(RuntimeError, match=r"state is on cuda:0.*built without CUDA"):
        _checks.check_device("state", torch.device("cuda:0"))
    monkeypatch.setattr(_checks, "HAS_CUDA", True)
    _checks.check_device("state", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="state: expected a CPU or CUDA tensor, got one on mps"):
        _checks.check_device("state", torch.device("mps"))


def test_cells_are_no_heads_and_no_energies():
    for cell in (nn.GRUCell(4, 4), nn.LSTMCell(4, 4), nn.RNNCell(4, 4)):
        name = type(cell).__name__
        for policy in (ac.ACT, ac.PonderNet):
            with pytest.raises(TypeError, match=rf"^head: .*head\(state\).*{name}.*which is a step"):
                policy(cell)
        with pytest.raises(TypeError, match=rf"^energy: .*energy\(y, \*context\).*{name}.*which is a step"):
            ac.EnergyDescent(cell)


@pytest.mark.promise("step's result")
@pytest.mark.parametrize("policy", [ac.ACT, ac.PonderNet])
@pytest.mark.parametrize("backend", ["kernels", "no_grad", "reference"])
@pytest.mark.parametrize(
    ("state", "came"),
    [((torch.zeros(5, 4),) * 2, "a tuple of 2 Tensors"), ({"h": torch.zeros(5, 4)}, "h")],
    ids=["tuple", "dict"],
)
def test_a_head_for_one_tensor_says_what_it_is_called_with(policy, backend, state, came):
    with {"kernels": torch.enable_grad, "no_grad": torch.no_grad, "reference": ac.reference_kernels}[
        backend
    ]():
        head = (
            rf"^head: expected a callable that takes the state, here .*{came}.*one logit per row.*got Linear"
        )
        with pytest.raises(TypeError, match=rf"(?s){head}.*raised TypeError: linear\(\)"):
            ac.AdaptiveHalt(lambda s: s, policy(nn.Linear(4, 1)))(state)
        with pytest.raises(
            TypeError, match=r"(?s)^readout: expected .*one Tensor.*got Linear.*raised TypeError"
        ):
            ac.AdaptiveHalt(lambda s: s, ac.FixedSteps(2), readout=nn.Linear(4, 1))(state)
    own = ac.AdaptiveHalt(lambda s: s, policy(lambda s: len(s) + None))
    with pytest.raises(TypeError, match=r"^unsupported operand"):
        own(torch.zeros(5, 4))


@pytest.mark.parametrize(
    "wrong",
    [lambda h: h[:-1], lambda h: (h, h), lambda h: {"h": h}, lambda h: h - h.mean(0)],
    ids=["fewer rows", "tuple", "dict", "mixed rows"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_wrong_state_raises_value_error_before_a_second_step(wrong, grad):
    calls = []

    def step(h):
        calls.append(len(h))
        return wrong(h)

    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"^step: expected .*got"):
        ac.AdaptiveHalt(step, ac.FixedSteps(3))(torch.randn(5, 4))
    assert len(calls) <= 1


# --- what the step returns ----------------------------------------------------------------------------------
BAD_STEPS = [
    (lambda h: None, TypeError, "step: .*"),
    (lambda h: 1.0, TypeError, "step: expected Tensors in the state, got float 1.0"),
    (lambda h: (h, h), TypeError, "step: expected a state with the structure"),
    (lambda h: [h], TypeError, "step: expected a state with the structure"),
    (lambda h: h[:-1], ValueError, r"step: .*keep the state's shape \[5, 4\], got \[4, 4\]"),
    (lambda h: h[:1], ValueError, r"step: .*got \[1, 4\]"),
    (lambda h: torch.cat([h, h]), ValueError, r"step: .*got \[10, 4\]"),
    (lambda h: h[:, :2], ValueError, r"step: .*got \[5, 2\]"),
    (lambda h: h[:, None], ValueError, r"step: .*got \[5, 1, 4\]"),
    (lambda h: h.sum(), ValueError, r"step: .*got \[\]"),
    (lambda h: h.double(), TypeError, "step: .*keep the state's dtype torch.float32, got torch.float64"),
    (lambda h: h.long(), TypeError, "step: .*keep the state's dtype torch.float32, got torch.int64"),
    (lambda h: h.to("meta"), ValueError, "step: .*keep the state on cpu, got meta"),
    (
        lambda h: h.to_sparse(),
        TypeError,
        "step: expected dense tensors in the state, got layout torch.sparse_coo",
    ),
]


@pytest.mark.promise("step's result")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("step", "error", "message"), BAD_STEPS, ids=[str(i) for i in range(len(BAD_STEPS))])
def test_step_that_changes_the_state(step, error, message, late, how):
    """The fault comes at the first step or at a later one."""
    calls = []

    def wrong(h):
        calls.append(1)
        return step(h) if not late or len(calls) == 2 else h * 1

    with mode(how), pytest.raises(error, match=message):
        halt(wrong)(H)


@pytest.mark.promise("step's result")
@pytest.mark.parametrize("how", MODES)
def test_step_that_changes_a_nested_state(how):
    with mode(how):
        with pytest.raises(TypeError, match="step: expected a state with the structure"):
            halt(lambda s: {"a": s["a"]})({"a": H, "b": H})
        with pytest.raises(TypeError, match="step: expected a state with the structure"):
            halt(lambda s: {"a": s["a"], "c": s["b"]})({"a": H, "b": H})
        with pytest.raises(TypeError, match=r"step: .*dtype torch.int64, got torch.float32"):
            halt(lambda s: (s[0], s[1].float()))((H, torch.arange(5)))


# --- heads and readouts -------------------------------------------------------------------------------------
BAD_HEADS = [
    (lambda h: None, TypeError, "head: expected it to return a Tensor, got NoneType"),
    (lambda h: h, ValueError, r"head: expected one logit per row, shape \[5\] or \[5, 1\], got \[5, 4\]"),
    (lambda h: h[:, :2], ValueError, r"head: .*got \[5, 2\]"),
    (lambda h: h[:, :0], ValueError, r"head: .*got \[5, 0\]"),
    (lambda h: h[:3, 0], ValueError, r"head: .*got \[3\]"),
    (lambda h: h.sum(), ValueError, r"head: .*got \[\]"),
    (lambda h: h[:, 0].long(), TypeError, "head: expected floating-point logits, got torch.int64"),
    (lambda h: h[:, 0] > 0, TypeError, "head: expected floating-point logits, got torch.bool"),
    (
        lambda h: h[:, 0].to(torch.complex64),
        TypeError,
        "head: expected floating-point logits, got torch.complex64",
    ),
    (lambda h: h[:, 0].to("meta"), ValueError, "head: .*on cpu.*meta"),
    (lambda h: h[:, 0].to_sparse(), TypeError, "head: expected dense logits, got layout torch.sparse_coo"),
]


@pytest.mark.promise("step's result")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["act", "ponder", "ponder_eval"])
@pytest.mark.parametrize(("head", "error", "message"), BAD_HEADS, ids=[str(i) for i in range(len(BAD_HEADS))])
def test_heads(head, error, message, name, how):
    policy = ac.ACT(head) if name == "act" else ac.PonderNet(head).train(name == "ponder")
    with mode(how), pytest.raises(error, match=message):
        halt(lambda h: h * 1, policy)(H)


BAD_READOUTS = [
    (lambda h: None, TypeError, "readout: expected it to return a Tensor, got NoneType"),
    (lambda h: (h, h), TypeError, "readout: expected it to return a Tensor, got tuple"),
    (lambda h: h[:2], ValueError, r"readout: expected 5 rows, got shape \[2, 4\]"),
    (lambda h: h.sum(), ValueError, r"readout: expected 5 rows, got shape \[\]"),
    (lambda h: h.to("meta"), ValueError, "readout: .*on cpu.*meta"),
    (lambda h: h.to_sparse(), TypeError, "readout: expected a dense tensor, got layout torch.sparse_coo"),
]


@pytest.mark.promise("step's result")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("readout", "error", "message"), BAD_READOUTS, ids=[str(i) for i in range(len(BAD_READOUTS))]
)
def test_readouts(readout, error, message, name, how):
    step, policy, h, x = make(name, 5)
    with mode(how), pytest.raises(error, match=message):
        ac.AdaptiveHalt(step, policy, 3, readout=readout)(h, x)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["act", "ponder", "fixed_int", "weighted_budget"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:, :2], lambda t: t.double(), lambda t: t[:, :, None]],
    ids=["narrow", "dtype", "dim"],
)
def test_readout_that_changes_between_steps(change, name, how):
    calls = []

    def readout(h):
        calls.append(1)
        return change(h) if len(calls) == 2 else h * 1

    step, policy, h, x = make(name, 5)
    with mode(how), pytest.raises(ValueError, match=r"readout: expected .*as at the first step, got"):
        ac.AdaptiveHalt(step, policy, 3, min_steps=3, readout=readout)(h, x)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["act", "ponder", "weighted_budget"])
def test_weighted_policies_want_floating_point_to_add_up(name, how):
    policy = make_policy(name, 5)
    with mode(how):
        with pytest.raises(TypeError, match=r"readout: .*torch.int64"):
            ac.AdaptiveHalt(lambda s: s, policy, 3)((torch.arange(5), H))
        with pytest.raises(TypeError, match=r"readout: .*torch.int64"):
            ac.AdaptiveHalt(lambda s: s, policy, 3, readout=lambda h: h.long())(H)


@pytest.mark.parametrize("how", MODES)
def test_confidence_wants_class_logits(how):
    with mode(how):
        for bad in (H[:, 0], H[:, :1], H[:, :, None], H[:, :0]):
            with pytest.raises(
                ValueError, match=r"readout: Confidence expects class logits of shape \[n, C\] with C >= 2"
            ):
                halt(policy=ac.Confidence(0.5))(bad)
        with pytest.raises(TypeError, match=r"readout: expected float32, .*torch.int64"):
            halt(policy=ac.Confidence(0.5))(torch.zeros(5, 3, dtype=torch.int64))


# --- what a user's own policy decides -----------------------------------------------------------------------
NO = torch.zeros(5, dtype=torch.bool)
BAD_DECISIONS = [
    (NO, TypeError, "decide: expected it to return a Decision"),
    (ac.Decision(None), TypeError, "Decision.halt: expected a bool Tensor, got NoneType"),
    (ac.Decision(NO.float()), TypeError, "Decision.halt: expected a bool Tensor.*torch.float32"),
    (ac.Decision(NO.long()), TypeError, "Decision.halt: expected a bool Tensor.*torch.int64"),
    (ac.Decision(NO[:3]), ValueError, r"Decision.halt: expected shape \[5\].*got a tensor of shape \[3\]"),
    (ac.Decision(NO[:, None]), ValueError, r"Decision.halt: .*\[5, 1\]"),
    (ac.Decision(NO.any()), ValueError, r"Decision.halt: .*shape \[\]"),
    (ac.Decision(NO.to("meta")), ValueError, "Decision.halt: .*meta"),
    (ac.Decision(NO, weight=H[:3, 0]), ValueError, r"Decision.weight: .*\[3\]"),
    (ac.Decision(NO, cost=H[:, :1]), ValueError, r"Decision.cost: .*\[5, 1\]"),
    (ac.Decision(NO, cost=NO), TypeError, "Decision.cost: expected a floating-point Tensor"),
    (
        ac.Decision(NO, log_prob=1.0),
        TypeError,
        "Decision.log_prob: expected a floating-point Tensor, got float",
    ),
    (ac.Decision(NO, carry=(H[:3],)), ValueError, r"Decision.carry\[0\]: expected 5 rows"),
    (ac.Decision(NO, carry=(H, 3)), TypeError, r"Decision.carry\[1\]: expected a Tensor, got int"),
]


class Fixed(ac.Policy):
    """A policy whose decisions change their form."""

    def __init__(self, *decisions, weighted=False):
        super().__init__()
        self.decisions = decisions
        self._weighted = weighted

    @property
    def weighted(self):
        return self._weighted

    def decide(self, view):
        return self.decisions[min(view.step, len(self.decisions)) - 1]


@pytest.mark.promise("step's result")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(
    ("decision", "error", "message"), BAD_DECISIONS, ids=[str(i) for i in range(len(BAD_DECISIONS))]
)
def test_decisions(decision, error, message, how):
    with mode(how), pytest.raises(error, match=message):
        halt(lambda h: h * 1, Fixed(decision))(H)


@pytest.mark.promise("step's result")
def test_decisions_that_change_between_steps():
    some = ac.Decision(NO, cost=H[:, 0])
    for decisions in (
        (some, ac.Decision(NO)),
        (ac.Decision(NO), some),
        (some, ac.Decision(NO, log_prob=H[:, 0])),
    ):
        with pytest.raises(ValueError, match=r"decide: .*same fields"):
            halt(lambda h: h * 1, Fixed(*decisions))(H)
    with pytest.raises(ValueError, match="decide: expected a weight"):
        halt(lambda h: h * 1, Fixed(ac.Decision(NO), weighted=True))(H)


# --- after an error -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [*MODES, "inference"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_that_raises_leaves_nothing_broken(name, how, device):
    step, policy, h, x = make(name, 9, device=device)
    raises = [3]
    calls = []

    def fragile(h, x):
        calls.append(1)
        if len(calls) in raises:
            raise KeyError("from the step")
        return step(h, x)

    for compact in (True, False, "auto"):
        model = ac.AdaptiveHalt(fragile, policy, 6, min_steps=4, compact=compact)
        with mode(how):
            calls.clear()
            expected = (raises.clear(), model(h, x))[1]
            before = [t.clone() for t in (h, x, *step.parameters(), *policy.buffers(), *policy.parameters())]
            calls.clear()
            raises.append(3)
            with pytest.raises(KeyError, match="from the step"):
                model(h, x)
            raises.clear()
            again = model(h, x)
        assert torch.equal(again.output, expected.output) and torch.equal(again.steps, expected.steps)
        for a, b in zip(
            before, (h, x, *step.parameters(), *policy.buffers(), *policy.parameters()), strict=True
        ):
            assert torch.equal(a, b)


def test_a_recurrent_cell_with_the_state_first_is_a_step():
    class Cell(nn.LSTMCell):
        def forward(self, state, x):
            return super().forward(x, state)

    torch.manual_seed(0)
    cell, state, x = Cell(3, 4), (torch.zeros(2, 4), torch.zeros(2, 4)), torch.randn(2, 3)
    result = ac.AdaptiveHalt(cell, ac.FixedSteps(2), 2)(state, x)
    expected = cell(cell(state, x), x)
    torch.testing.assert_close(result.output, expected[0])
