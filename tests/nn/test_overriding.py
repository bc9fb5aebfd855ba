"""An overridden method of a policy is used on every path."""

import contextlib

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.fusing import fused_decision
from adaptcomp_ext.nn.halting.policy import Run
from adaptcomp_ext.ops import halting

B, M = 6, 5
RUN = Run(B, torch.device("cpu"), 1, M, None, torch.float32)


class Head(nn.Linear):
    def forward(self, state):
        return super().forward(state[:, :2])


def eager():
    head = Head(2, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 9.0)
    return head


def late(cls):
    """A subclass that halts at step 4 only."""

    class Late(cls):
        def decide(self, view):
            decision = super().decide(view)
            return decision._replace(halt=torch.full_like(decision.halt, view.step >= 4))

    return Late


MAKE = {
    "ACT": lambda cls=ac.ACT: cls(eager()),
    "Confidence": lambda cls=ac.Confidence: cls(0.1),
    "PonderNet": lambda cls=ac.PonderNet: cls(eager()).eval(),
    "FixedSteps": lambda cls=ac.FixedSteps: cls(1),
    "Convergence": lambda cls=ac.Convergence: cls(1e9),
}
FIRST = {"Convergence": 2}


@contextlib.contextmanager
def path(how):
    with contextlib.ExitStack() as stack:
        if how == "inference":
            stack.enter_context(torch.no_grad())
        if how == "reference":
            stack.enter_context(ac.reference_kernels())
        yield


def run(policy, how):
    width = 20_000 if how == "training, large" else 2
    readout = (lambda s: s[:, :2]) if isinstance(policy, ac.Confidence) else None
    halt = ac.AdaptiveHalt(
        lambda h: h + 1, policy, M, readout=readout, compact=False if how == "masked" else "auto"
    )
    with path(how):
        return halt(torch.zeros(B, width, requires_grad=how.startswith("training")))


PATHS = ["inference", "training", "training, large", "masked", "reference"]


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("name", MAKE)
def test_a_subclass_decides(name, how):
    make = MAKE[name]
    assert run(make(), how).steps.tolist() == [FIRST.get(name, 1)] * B
    result = run(make(late(getattr(ac, name))), how)
    assert result.steps.tolist() == [4] * B
    assert result.status.tolist() == [ac.Status.HALTED] * B


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("name", MAKE)
def test_a_method_assigned_to_a_policy_decides(name, how):
    policy = MAKE[name]()
    decide = policy.decide
    policy.decide = lambda view: decide(view)._replace(
        halt=torch.full_like(view.row, view.step >= 3, dtype=torch.bool)
    )
    assert run(policy, how).steps.tolist() == [3] * B
    del policy.decide
    assert run(policy, how).steps.tolist() == [FIRST.get(name, 1)] * B


def test_a_method_assigned_to_a_class_decides():
    class Mine(ac.ACT):
        pass

    class Both(ac.FixedSteps):
        def decide(self, view):
            return super().decide(view)

        def fuse(self):
            return super().fuse()

    for cls, make in ((Mine, MAKE["ACT"]), (Both, MAKE["FixedSteps"])):
        policy = make(cls)
        assert run(policy, "inference").steps.tolist() == [1] * B
        before = cls.decide
        cls.decide = lambda self, view, before=before: before(self, view)._replace(
            halt=torch.full_like(view.row, view.step >= 4, dtype=torch.bool)
        )
        assert run(policy, "inference").steps.tolist() == [4] * B


def test_a_mixin_before_the_policy_decides():
    class Mixin:
        def decide(self, view):
            return ac.Decision(torch.full_like(view.row, view.step >= 2, dtype=torch.bool))

    class Mixed(Mixin, ac.Confidence):
        pass

    class Behind(ac.Confidence, Mixin):
        pass

    assert run(Mixed(0.1), "inference").steps.tolist() == [2] * B
    assert run(Behind(0.1), "inference").steps.tolist() == [1] * B
    assert fused_decision(Behind(0.1), RUN) is not None


@pytest.mark.parametrize("how", PATHS)
def test_properties_and_checks_of_a_subclass_hold(how):
    class Last(ac.ACT):
        """Return the last state instead of the weighted sum."""

        weighted = False

    class Falling(ac.Confidence):
        """A threshold that falls from step to step."""

        asked = 0

        @property
        def threshold(self):
            self.asked += 1
            return 1.0 if self.asked < 3 else 0.0

        @threshold.setter
        def threshold(self, value):
            pass

    class Picky(ac.FixedSteps):
        def check_readout(self, readout):
            raise ValueError("not this readout")

    assert (
        run(Last(lambda s: torch.full_like(s[:, 0], -1.0)), how).output[:, 0].tolist() == [4.0] * B
    )  # 4 * 0.27 > 0.99
    assert run(Falling(0.5), how).steps.tolist() == [3] * B
    with pytest.raises(ValueError, match="not this readout"):
        run(Picky(1), how)


def test_a_prior_of_a_subclass_is_the_prior():
    class Flat(ac.PonderNet):
        def log_prior(self, run, step):
            return -torch.tensor(float(run.max_steps)).log().item()

    head = Head(2, 1)
    flat, uniform = Flat(head), ac.PonderNet(head, prior="uniform")
    torch.testing.assert_close(run(flat, "training").cost, run(uniform, "training").cost)


@pytest.mark.parametrize("name", [name for name in MAKE if name != "Convergence"])
def test_a_subclass_that_overrides_nothing_is_fused(name):
    plain = getattr(ac, name)
    sub = type(
        "Sub",
        (plain,),
        {"__init__": lambda self, *a: plain.__init__(self, *a), "extra_repr": lambda self: "", "extra": 3},
    )
    assert fused_decision(MAKE[name](sub), RUN) is not None
    assert fused_decision(MAKE[name](late(plain)), RUN) is None


def test_a_class_that_defines_both_is_fused():
    class Two(ac.Policy):
        def decide(self, view):
            raise AssertionError("the kernel knows")

        def fuse(self):
            return halting.Fused(halting.FIXED_STEPS, parameter=2)

    class Three(Two):
        def decide(self, view):
            return ac.Decision(torch.full_like(view.row, view.step >= 3, dtype=torch.bool))

    for how in ("inference", "training", "training, large"):
        assert run(Two(), how).steps.tolist() == [2] * B
        assert run(Three(), how).steps.tolist() == [3] * B


def test_hooks_of_a_head_run():
    policy = MAKE["ACT"]()
    policy.head.register_forward_hook(lambda module, given, out: out - 18.0)
    assert run(policy, "inference").steps.tolist() == [M] * B


# --- begin --------------------------------------------------------------------------------------------------
class Warm(ac.ACT):
    """Half of the halting probability is spent before the first step."""

    def __init__(self, head, carry):
        super().__init__(head)
        self.carry = carry

    def begin(self, run):
        return (self.carry,)


class Fused(Warm):
    """The kernel also starts with half of the halting probability spent."""

    def fuse(self):
        return super().fuse()


CARRIES = {
    "a buffer": torch.full((B,), 0.5),
    "float64": torch.full((B,), 0.5, dtype=torch.float64),
    "expanded": torch.tensor(0.5).expand(B),
    "strided": torch.full((B, 2), 0.5)[:, 1],
    "a parameter": nn.Parameter(torch.full((B,), 0.5)),
}


@pytest.mark.parametrize("cls", [Warm, Fused])
@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("carry", CARRIES.values(), ids=list(CARRIES))
def test_a_carry_is_copied(carry, how, cls):
    result = run(
        cls(lambda s: torch.full_like(s[:, 0], -1.0), carry), how
    )  # 0.27 a step: 2 of them reach 0.99
    assert result.steps.tolist() == [2] * B
    torch.testing.assert_close(
        result.output[:, 0].detach(), torch.full((B,), 0.26894143 * 1 + (0.5 - 0.26894143) * 2)
    )
    assert carry.tolist() == [0.5] * B


@pytest.mark.parametrize("cls", [Warm, Fused])
@pytest.mark.parametrize(
    ("carry", "error"),
    [
        (torch.zeros(B + 1), ValueError),
        (3.0, TypeError),
        (torch.zeros(B, device="meta"), ValueError),
        (torch.zeros(()), ValueError),
    ],
)
def test_a_carry_that_does_not_fit_is_refused(carry, error, cls):
    with pytest.raises(error, match=r"^begin: expected"):
        run(cls(lambda s: s[:, 0], carry), "inference")


@pytest.mark.parametrize("carry", [None, 3, torch.zeros(B)])
def test_a_carry_that_is_no_tuple_is_refused(carry):
    class Wrong(ac.FixedSteps):
        def begin(self, run):
            return carry

    with pytest.raises(TypeError, match=r"^begin: expected it to return a tuple of Tensors, got"):
        run(Wrong(2), "inference")


@pytest.mark.parametrize("carry", [torch.zeros(B, 2), torch.zeros(B, dtype=torch.int64)])
def test_what_the_kernel_carries_is_one_number_a_row(carry):
    with pytest.raises(ValueError, match=r"^begin: expected floating-point numbers of shape \[6\]"):
        run(Fused(lambda s: s[:, 0], carry), "inference")


# --- fuse ---------------------------------------------------------------------------------------------------
F = halting.Fused


@pytest.mark.parametrize(
    "fused",
    [
        *(
            "act",
            3,
            (1, None),
            F(halting.GIVEN),
            F(99),
            F("act"),
            F(halting.ACT, carried=True, has_cost=True),
        ),
        *(
            F(halting.ACT, head=torch.sum),
            F(halting.PONDER_SAMPLE, head=torch.sum, carried=True),
            F(halting.CONFIDENCE, threshold="1"),
        ),
        *(
            F(halting.CONFIDENCE, parameter=7),
            F(halting.FIXED_STEPS, parameter=1.5),
            F(halting.FIXED_STEPS, parameter=2**70),
        ),
        *(
            F(halting.FIXED_STEPS, torch.ones(B)),
            F(halting.FIXED_STEPS, torch.ones(B + 1, dtype=torch.int64)),
        ),
        *(
            F(halting.FIXED_STEPS, head=torch.sum),
            F(halting.CONFIDENCE, torch.ones(B)),
            F(halting.FIXED_STEPS, [1] * B),
        ),
    ],
)
def test_a_fuse_that_the_kernel_cannot_read_is_refused(fused):
    class Wrong(ac.Policy):
        def fuse(self):
            return fused

    for how in ("inference", "training"):
        with pytest.raises((TypeError, ValueError), match=r"^fuse: ?.*expected"):
            run(Wrong(), how)
    policy = MAKE["ACT"]()
    policy.fuse = lambda: fused
    with pytest.raises((TypeError, ValueError), match=r"^fuse: ?.*expected"):
        run(policy, "inference")


def test_a_budget_for_the_kernel_may_lie_anywhere():
    class Mine(ac.Policy):
        def fuse(self):
            return F(
                halting.FIXED_STEPS, torch.stack([torch.arange(B) % 3 + 1, torch.zeros(B)], 1).long()[:, 0]
            )

    assert run(Mine(), "inference").steps.tolist() == [1, 2, 3, 1, 2, 3]
