"""Tensors whose address is not their data: without memory, with lazy values, on other devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.halting import MODES, mode
from tests.helpers.processes import run_cases

N = torch.tensor([1, 4, 2, 3, 3, 4])


# --- a policy's own tensor ----------------------------------------------------------------------------------
@pytest.mark.parametrize("how", MODES)
def test_numbers_of_steps_assigned_later_count_whatever_their_strides(how):
    policy = ac.FixedSteps(torch.ones(6, dtype=torch.int64))
    halt = ac.AdaptiveHalt(lambda h: h + 1, policy, max_steps=16)
    with mode(how):
        policy.n = torch.stack([N, N * 0 + 9], 1)[:, 0]
        assert torch.equal(halt(torch.zeros(6, 1)).steps, N)
        policy.n = torch.tensor(2).expand(6)
        assert halt(torch.zeros(6, 1)).steps.tolist() == [2] * 6
        plain = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(3), max_steps=16)
        plain.policy.n = N
        assert torch.equal(plain(torch.zeros(6, 1)).steps, N)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (
            N.int(),
            TypeError,
            "FixedSteps n: expected an int, or an int64 tensor of shape \\[B\\], got .*int32",
        ),
        (N.float(), TypeError, "FixedSteps n: .*float32"),
        (N.half(), TypeError, "FixedSteps n: .*float16"),
        (N[:, None], TypeError, "FixedSteps n: .*\\[6, 1\\]"),
        (torch.tensor(3), TypeError, "FixedSteps n: .*shape \\[\\]"),
        (N[:5], ValueError, "FixedSteps n: expected shape \\[6\\] for this batch, got \\[5\\]"),
        (N - 1, ValueError, "FixedSteps n: expected at least 1 step for every row, got 0"),
        (N.to("meta"), ValueError, "FixedSteps n: expected a tensor on cpu, got one on meta"),
    ],
    ids=["int32", "float32", "float16", "matrix", "scalar", "short", "zero", "meta"],
)
def test_numbers_of_steps_that_do_not_fit_are_refused_however_they_got_there(how, n, error, message):
    policy = ac.FixedSteps(N.clone())
    halt = ac.AdaptiveHalt(lambda h: h + 1, policy, max_steps=16)
    with mode(how):
        with pytest.raises(error, match=message):
            torch.func.functional_call(halt, {"policy.n": n}, (torch.zeros(6, 1),))
        policy.n = n
        with pytest.raises(error, match=message):
            halt(torch.zeros(6, 1))
        policy.n = N.clone()
        if n.shape == N.shape:
            halt.load_state_dict({"policy.n": n}, assign=True)
            with pytest.raises(error, match=message):
                halt(torch.zeros(6, 1))


def test_numbers_of_steps_stay_integers_when_a_model_changes_its_dtype():
    halt = ac.AdaptiveHalt(nn.Identity(), ac.FixedSteps(N.clone()), max_steps=6)
    for changed in (halt.half(), halt.bfloat16(), halt.to(torch.float64)):
        assert torch.equal(changed(torch.zeros(6, 1)).steps, N)


def test_a_long_expanded_number_of_steps_is_not_read_past_its_end():
    rows = 5_000_000
    said = run_cases(
        f"steps: (setattr(p, 'n', torch.tensor(2).expand({rows})), halt(h).steps.bincount().tolist())[1]",
        f"""
        h = torch.zeros({rows}, 1)
        p = ac.FixedSteps(torch.ones({rows}, dtype=torch.int64))
        halt = ac.AdaptiveHalt(lambda h: h + 1, p, max_steps=4)
        torch.set_grad_enabled(False)
        """,
    )
    assert said["steps"] == f"[0, 0, {rows}]"


# --- lazy values --------------------------------------------------------------------------------------------
def negated(h):
    """Return −h, whose negation torch leaves pending."""
    out = torch.complex(h, h).conj().imag
    return out


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("rows", [1, 3])
def test_values_that_torch_negates_lazily(how, rows):
    x = torch.full((rows, 1), -2.0)
    assert negated(x).is_neg() and (rows > 1 or negated(x).is_contiguous())
    with mode(how):
        halt = ac.AdaptiveHalt(lambda h, x: h + x, ac.FixedSteps(1), max_steps=5, readout=negated)
        assert halt(torch.zeros(rows, 1), x).output.tolist() == [[2.0]] * rows
        halt = ac.AdaptiveHalt(lambda h, x: negated(h + x), ac.FixedSteps(1), max_steps=5)
        assert halt(torch.zeros(rows, 1), x).output.tolist() == [[2.0]] * rows
        halt = ac.AdaptiveHalt(lambda h, x: h + x, ac.FixedSteps(2), max_steps=5)
        assert halt(negated(x), negated(x)).output.tolist() == [[6.0]] * rows
        halt = ac.AdaptiveHalt(lambda h, x: h + x, ac.ACT(lambda h: negated(h)[:, 0]), max_steps=5)
        result = halt(torch.zeros(rows, 1), x)  # h = sigmoid(2), sigmoid(4): the second step is the last
        assert result.steps.tolist() == [2] * rows
        torch.testing.assert_close(
            result.output,
            -2 * torch.sigmoid(torch.tensor(2.0))
            - 4 * torch.sigmoid(-torch.tensor(2.0))
            + torch.zeros(rows, 1),
        )


# --- devices ------------------------------------------------------------------------------------------------
DEFAULTS = """
    w = nn.Parameter(torch.ones(3))
    x, h0, n = torch.randn(6, 3), torch.zeros(6, 3), torch.tensor([1, 4, 2, 3, 3, 4])
    head = nn.Linear(3, 1)
    def halt(policy, **options):
        w.grad = None
        module = ac.AdaptiveHalt(lambda h, x: h * w + x, policy, max_steps=6, **options)
        r = module(h0, x)
        r.output.sum().backward()
        return r
    def steps(policy, **options):
        return halt(policy, **options).steps.tolist()
    def check(r):
        return r.output.device.type, bool((r.output == x * n[:, None]).all()), w.grad.device.type
    mask = n > 2
    policies = {
        "fixed": lambda: ac.FixedSteps(n), "act": lambda: ac.ACT(head), "ponder": lambda: ac.PonderNet(head),
        "sampled": lambda: ac.PonderNet(head).eval(),
        "conf": lambda: ac.Confidence(0.9), "conv": lambda: ac.Convergence(0.4),
    }
    wanted = {k: str([steps(p()), steps(p(), compact=False)]) for k, p in policies.items()}
"""


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_default_device_other_than_the_states(device):
    """Nothing is allocated on the default device."""
    said = run_cases(
        """
        fixed: check(halt(ac.FixedSteps(n)))
        masked: check(halt(ac.FixedSteps(n), compact=False))
        inference: torch.no_grad()(ac.AdaptiveHalt(torch.add, ac.FixedSteps(n), 6))(h0, x).steps.tolist()
        reference: ac.AdaptiveHalt(torch.add, ac.FixedSteps(n), 6)(h0, x).steps.tolist()
        all: [k for k, p in policies.items() if str([steps(p()), steps(p(), compact=False)]) != wanted[k]]
        compact: [t.tolist() for t in ac.ops.compact(mask, n)[0]]
        padded: ac.ops.compact_padded(mask, n)[2].item()
        route: ac.route(mask, lambda a: a * 2, n, otherwise=n).tolist()
        act: ac.ops.act_step(x[:, 0], n * 0.0, step=1, max_steps=3).halt.device.type
        """,
        DEFAULTS + f'    torch.set_default_device("{device}")\n',
    )
    assert said["fixed"] == said["masked"] == "('cpu', True, 'cpu')"
    assert said["inference"] == said["reference"] == str(N.tolist())
    assert said["all"] == "[]"
    assert said["compact"] == "[[4, 3, 3, 4]]" and said["padded"] == "4"
    assert said["route"] == "[1, 8, 2, 6, 6, 8]" and said["act"] == "cpu"


# --- no memory ----------------------------------------------------------------------------------------------
STRANGE = """
    import functools
    from torch._subclasses.fake_tensor import FakeTensorMode
    x, n = torch.randn(6, 3), torch.tensor([1, 2, 3, 2, 1, 3])
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    def released(t):
        t = t.detach().clone()
        t.untyped_storage().resize_(0)
        return t
    KINDS = {
        "fake": lambda t: fakes.from_tensor(t.detach()),
        "released": released,
        "quantized": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.quint8),
        "nested": lambda t: torch.nested.nested_tensor(list(t.detach())),
        "jagged": lambda t: torch.nested.nested_tensor(
            list(t.detach().view(len(t), -1)), layout=torch.jagged
        ),
        "lazy": lambda t: nn.UninitializedParameter(),
        "functional": lambda t: torch._to_functional_tensor(t.detach()),
        "meta": lambda t: t.detach().to("meta"),
        "coo": lambda t: t.detach().to_sparse(),
        "csr": lambda t: t.detach().view(len(t), -1).to_sparse_csr(),
        "mkldnn": lambda t: t.detach().float().to_mkldnn(),
        "scalar": lambda t: t.sum(),
        "list": lambda t: t.tolist(),
        "numpy": lambda t: t.detach().numpy(),
    }
    def make(t):
        return KINDS[kind](t)
    class Own(ac.Policy):
        def __init__(self, **fields):
            super().__init__()
            self.fields = fields
        @property
        def weighted(self):
            return "weight" in self.fields
        def begin(self, run):
            return (make(torch.zeros(run.batch)),) if "begin" in self.fields else ()
        def decide(self, view):
            zero = torch.zeros(view.row.shape[0])
            fields = {"halt": zero > 1} | {k: f(zero) for k, f in self.fields.items() if k != "begin"}
            return ac.Decision(**fields)
    def halt(state, x, policy=None, step=lambda h, x: h + 1, **options):
        act = ac.ACT(lambda h: torch.zeros(len(h)))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for p in [policy] if policy else [ac.FixedSteps(n), act, ac.Convergence(0.1)]:
                    try:
                        said = ac.AdaptiveHalt(step, p, 4, **options)(state, x).output.tolist()
                    except (TypeError, ValueError) as error:
                        said = str(error)
                    if "expected" not in said:
                        return f"{type(p).__name__} {grad}: {said}"
        return "refused: " + said
    def assigned():
        policy = ac.FixedSteps(n.clone())
        policy.n = make(n)
        return halt(x, x, policy)
    def decision(**fields):
        return halt(x, x, Own(**fields))
"""
PLACES = {
    "state": "halt(make(x), x)",
    "inputs[0]": "halt(x, make(x))",
    "step": "halt(x, x, step=lambda h, x: make(h))",
    "readout": "halt(x, x, readout=make)",
    "head": "halt(x, x, ac.ACT(lambda h: make(h[:, 0])))",
    "head of a distribution": "halt(x, x, ac.PonderNet(lambda h: make(h[:, 0])))",
    "head of a sample": "halt(x, x, ac.PonderNet(lambda h: make(h[:, 0])).eval())",
    "FixedSteps n": "assigned()",
    "Decision.halt": "decision(halt=lambda z: make(z > 1))",
    "Decision.weight": "decision(weight=make)",
    "Decision.cost": "decision(cost=make)",
    "Decision.logits": "decision(logits=make)",
    "otherwise": "ac.route(n > 1, torch.tanh, x, otherwise=make(x))",
    "tensors[0]": "ac.route(n > 1, torch.tanh, make(x), otherwise=x)",
    "branch": "ac.route(n > 1, lambda a: make(a), x, otherwise=x)",
    "mask": "ac.route(make(n > 1), torch.tanh, x, otherwise=x)",
}
KINDS = [
    "fake",
    "released",
    "quantized",
    "nested",
    "jagged",
    "lazy",
    "functional",
    "meta",
    "coo",
    "csr",
    "mkldnn",
    "scalar",
]
KINDS += ["list", "numpy"]
SERVED = {
    ("functional", name) for name in ("state", "inputs[0]", "otherwise", "tensors[0]", "branch", "mask")
}
"""torch's own functionalization unwraps these before a kernel gets them, or the step has made one."""
SERVED |= {("mkldnn", "step")}
"""The head, which is the user's, reads it first."""


def test_what_is_no_dense_tensor_with_data_is_refused_by_name_wherever_it_comes_from():
    """None of these ends the process, in training or inference, under any policy."""
    cases = [
        f"{kind} {place}: globals().update(kind={kind!r}) or {call}"
        for kind in KINDS
        for place, call in PLACES.items()
    ]
    for where, message in run_cases("\n".join(cases), STRANGE).items():
        kind, name = where.split(" ", 1)
        if (kind, name) in SERVED:
            continue
        assert message.startswith(("refused: ", "TypeError: ", "ValueError: ")), (kind, name, message)
        if kind != "functional":  # which torch's operators hand on, until it gets to a kernel
            assert name.split(" of ")[0].replace("FixedSteps ", "") in message, (kind, name, message)


def test_released_storage_is_refused():
    x = torch.randn(6, 3)
    x.untyped_storage().resize_(0)
    halt = ac.AdaptiveHalt(lambda h, x: h, ac.FixedSteps(2), max_steps=3)
    with torch.no_grad(), pytest.raises(TypeError, match="whose storage was released"):
        halt(x, torch.zeros(6, 1))
    with pytest.raises(TypeError, match=r"tensors: .* whose storage was released"):
        ac.ops.compact(N > 2, x)
    assert ac.ops.compact(torch.zeros(0, dtype=torch.bool), torch.zeros(0, 3))[0][0].shape == (0, 3)


def test_learned_state_as_a_parameter():
    state = nn.Parameter(torch.zeros(6, 2))
    result = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(N), max_steps=6)(state)
    assert result.output[:, 0].tolist() == N.tolist()
    result.output.sum().backward()
    assert state.grad.tolist() == [[1.0, 1.0]] * 6


@pytest.mark.parametrize("how", ["grad", "no_grad"])
def test_a_decision_in_a_dtype_that_no_kernel_reads_is_refused(how):
    """The check for NaN would not read it."""

    class Own(ac.Policy):
        def decide(self, view):
            z = torch.zeros(view.row.shape[0])
            return ac.Decision(halt=z > 1, logits=z.to(torch.float8_e4m3fn))

    with (
        mode(how),
        pytest.raises(TypeError, match=r"Decision.logits: expected a floating-point Tensor, got .*float8"),
    ):
        ac.AdaptiveHalt(lambda h: h, Own(), max_steps=2)(torch.zeros(3, 1))


def test_an_interrupt_in_the_middle_of_the_boundary_is_not_swallowed():
    class Interrupt(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") == "is_neg":
                raise KeyboardInterrupt
            return function(*args, **(kwargs or {}))

    halt = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(2), max_steps=3)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt), Interrupt():
            halt(torch.zeros(3, 1))
        assert halt(torch.zeros(3, 1)).steps.tolist() == [2] * 3


def test_the_raw_operators_refuse_what_they_would_read_wrongly():
    raw, x, z, n = torch.ops.adaptcomp, torch.randn(6, 3), torch.randn(6), torch.arange(6)
    for call, error, message in (
        (
            lambda: raw.act_step(z, n, 1, 1, 3, 0.9),
            TypeError,
            "accumulated: expected torch.float32, got torch.int64",
        ),
        (lambda: raw.act_step(z, z[:3], 1, 1, 3, 0.9), ValueError, "accumulated: expected 6 elements, got 3"),
        (
            lambda: raw.pondernet_step(z, z[:3], 1, 1, 3, -1.0, -1.0),
            ValueError,
            "log_survival: expected 6 elements, got 3",
        ),
        (lambda: raw.gather_rows([x], n.int()), TypeError, "index: expected torch.int64, got torch.int32"),
        (lambda: raw.gather_rows([x.sum()], n), ValueError, "expected a batch dimension first"),
        (lambda: raw.gather_rows([x], n[0]), ValueError, "expected a batch dimension first"),
        (lambda: raw.compact_index(z), TypeError, "keep: expected torch.bool, got torch.float32"),
        (
            lambda: raw.descent_normals(z, 3, 0, 1, False),
            TypeError,
            "sample: expected torch.int64, got torch.float32",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
