"""The ops and route under torch's transforms and tracers: right, or a message that names the way out."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import adaptcomp_ext as ac

torch.manual_seed(0)
X = torch.randn(6, 3, dtype=torch.float64)
OTHER = torch.randn(6, 3, dtype=torch.float64)
MASK = torch.tensor([True, False, True, True, False, False])
INDEX = torch.tensor([0, 2, 3])
A = torch.tensor(0.1, dtype=torch.float64)

# Of a tensor [6, 3], and of the mask or the index that stands for it.
OPS = {
    "compact": lambda x, at: ac.ops.compact(at[0], x)[0][0],
    "compact_padded": lambda x, at: ac.ops.compact_padded(at[0], x)[0][0],
    "scatter_rows": lambda x, at: ac.ops.scatter_rows(x[:3].sin(), at[1], 6)[0],
    "merge_rows": lambda x, at: ac.ops.merge_rows(x[:3].sin(), at[1], x)[0],
    "act_step": lambda x, at: ac.ops.act_step(x[:, 0], x[:, 1].sigmoid(), step=2, max_steps=5).weight,
    "pondernet_step": lambda x, at: (
        ac.ops.pondernet_step(x[:, 0], -x[:, 1].exp(), step=2, max_steps=5, log_prior=-1.0).cost
    ),
    "descent_update": lambda x, at: ac.ops.descent_update(x, x.sin(), at[2]).point,
    "route": lambda x, at: ac.route(at[0], torch.sin, x, otherwise=x * x),
}
AT = (MASK, INDEX, A)
OPS_OF_TENSORS = ["act_step", "pondernet_step", "descent_update"]
RECORDED = [name for name in OPS if name != "route"]


def of(name, at=AT):
    return lambda x: OPS[name](x, at)


def dual(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def jvp(function):
    return torch.autograd.functional.jvp(function, X, torch.ones_like(X))[1]


DIFFERENTIATION = {
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum())(X), lambda f: jacobian(lambda x: f(x).sum(), X)),
    "jvp": (lambda f: torch.func.jvp(f, (X,), (torch.ones_like(X),))[1], jvp),
    "jacrev": (lambda f: torch.func.jacrev(f)(X), lambda f: jacobian(f, X)),
    "jacfwd": (lambda f: torch.func.jacfwd(f)(X), lambda f: jacobian(f, X)),
    "dual numbers": (dual, jvp),
}


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("how", DIFFERENTIATION)
def test_differentiation_is_refused_on_the_kernels_and_right_on_the_reference(how, name, grad):
    transform, ordinary = DIFFERENTIATION[how]
    called = name if name == "route" else f"ops.{name}"
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=rf"^{called} does not support .*reference_kernels\(\)"),
    ):
        transform(of(name))
    want = ordinary(of(name))
    with torch.set_grad_enabled(grad or how in ("grad", "jacrev")), ac.reference_kernels():
        torch.testing.assert_close(transform(of(name)), want)


def test_confidence_only_decides_in_forward_mode_too():
    for run in (
        lambda: jvp(ac.ops.confidence),
        lambda: torch.func.jvp(ac.ops.confidence, (X,), (torch.ones_like(X),))[1],
    ):
        assert not run().any()
    assert dual(ac.ops.confidence) is None
    with ac.reference_kernels():
        assert dual(ac.ops.confidence) is None
    torch.testing.assert_close(torch.vmap(ac.ops.confidence)(X.expand(2, 6, 3))[1], ac.ops.confidence(X))


@pytest.mark.promise("transforms")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPS)
def test_vmap(name):
    batched = torch.stack([X, OTHER])
    want = torch.stack([of(name)(x) for x in batched])
    if name in OPS_OF_TENSORS:
        torch.testing.assert_close(torch.vmap(of(name))(batched), want)
        with pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
            torch.vmap(of(name))(batched.clone().requires_grad_())
    else:
        with pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
            torch.vmap(of(name))(batched)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
        torch.vmap(lambda c: c * of(name)(x))(torch.ones(2))
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda c: c * of(name)(x))(torch.ones(2))[1], of(name)(X))
    with ac.reference_kernels():
        torch.testing.assert_close(torch.vmap(of(name))(batched), want)
        if name in ("compact", "route"):  # a mask for each sample: results of different sizes
            with pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
                torch.vmap(lambda x, mask: OPS[name](x, (mask, INDEX, A)))(batched, MASK.expand(2, 6))


def traced(function, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, arguments, check_trace=False)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, mask, index, step):
        return self.function(x, (mask, index, step))


RECORDERS = {
    "jit.trace": lambda f: traced(lambda x, *at: f(x, at), (X, *AT)),
    "make_fx real": lambda f: make_fx(lambda x, *at: f(x, at), tracing_mode="real")(X, *AT),
    "make_fx symbolic": lambda f: make_fx(lambda x, *at: f(x, at), tracing_mode="symbolic")(X, *AT),
    "make_fx before dispatch": lambda f: make_fx(lambda x, *at: f(x, at), pre_dispatch=True)(X, *AT),
    "export": lambda f: torch.export.export(Model(f), (X, *AT), strict=False).module(),
    "strict export": lambda f: torch.export.export(Model(f), (X, *AT), strict=True).module(),
    "functionalize": lambda f: torch.func.functionalize(lambda x, *at: f(x, at)),
}


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("how", RECORDERS)
def test_what_is_recorded_of_an_op_is_right_for_other_values(how, name):
    recorded = RECORDERS[how](OPS[name])
    at = (torch.tensor([False, True, True, False, True, True]), torch.tensor([1, 4, 5]), A)
    if name == "compact" and how != "jit.trace":
        at = (torch.tensor([False, True, True, False, False, True]), *at[1:])
    # An exported program has the reference's operators, which may round otherwise.
    exact = {} if "export" in how else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(recorded(OTHER, *at), OPS[name](OTHER, at), **exact)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "how", [*(how for how in RECORDERS if how not in ("functionalize", "export")), "fake tensors"]
)
def test_route_is_not_recorded(how, reference):
    """The values of one mask of the batch would decide whether the branch runs."""
    with pytest.raises(RuntimeError) as caught:
        if how == "fake tensors":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                of("route")(mode.from_tensor(X))
        elif reference:
            with ac.reference_kernels():
                RECORDERS[how](OPS["route"])
        else:
            RECORDERS[how](OPS["route"])
    assert "route does not support" in " ".join(str(caught.value).split())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [name for name in RECORDED if name != "compact"])
def test_fake_tensors_have_the_shapes(name, grad):
    with torch.set_grad_enabled(grad), FakeTensorMode() as mode:
        x, *at = (mode.from_tensor(t) for t in (X, *AT))
        got = OPS[name](x.requires_grad_(grad), at)
    want = of(name)(X)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("name", OPS)
def test_batches_of_gradients_are_refused(name):
    with pytest.raises(
        RuntimeError, match=r"^The backward pass of ops\.\w+ does not support batches of gradients"
    ):
        jacobian(of(name), X, vectorize=True)
    with ac.reference_kernels():
        torch.testing.assert_close(jacobian(of(name), X, vectorize=True), jacobian(of(name), X))


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_with_a_tangent_is_refused(name):
    x = X.clone().requires_grad_()
    out = of(name)(x)
    with forward_ad.dual_level():
        slope = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match=r"backward pass of ops\.\w+ does not support forward-mode"):
            torch.autograd.grad(out, x, slope)


class _Names(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", OPS)
def test_a_mode_sees_the_op_that_is_called_straight_without_one(name):
    expected = OPS[name](X, [MASK, INDEX, A])
    with _Names() as names:
        result = OPS[name](X, [MASK, INDEX, A])
    assert torch.equal(result, expected)
    assert any(seen.startswith("adaptcomp.") for seen in names.seen)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in OPS if name != "merge_rows"]
)  # which looks at the order of its index
def test_a_wrapper_of_functionalization_outside_it_goes_through_the_dispatcher(name):
    wrapped = OPS[name](
        torch._to_functional_tensor(X), [torch._to_functional_tensor(t) for t in (MASK, INDEX, A)]
    )
    torch._sync(wrapped)
    assert torch.equal(torch._from_functional_tensor(wrapped), OPS[name](X, [MASK, INDEX, A]))


def test_a_tangent_that_only_the_branch_brings_is_noticed():
    weight = torch.tensor(2.0, dtype=torch.float64)
    with forward_ad.dual_level():
        given = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(
            RuntimeError,
            match=r"route does not support forward-mode .*branch returned a tensor with a tangent",
        ):
            ac.route(MASK, lambda x: given * x, X, otherwise=X)
        with ac.reference_kernels():
            got = forward_ad.unpack_dual(ac.route(MASK, lambda x: given * x, X, otherwise=X)).tangent
    torch.testing.assert_close(got, torch.where(MASK[:, None], X, 0))
