"""Subclasses of torch.Tensor: plain rows without a __torch_dispatch__, and a TypeError by name with one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from tests.helpers.halting import MODES, close, leaves, make_policy, mode
from tests.helpers.processes import run_cases


class Image(Tensor):
    """A subclass as in imaging libraries: every result keeps the class."""


class Bounded(Tensor):
    """A subclass with its own arithmetic: all results are clamped to [-0.5, 0.5]."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(out, Tensor) and out.is_floating_point():
            with torch._C.DisableTorchFunctionSubclass():
                return out.as_subclass(Tensor).clamp(-0.5, 0.5).as_subclass(cls)
        return out


class Untouched(Tensor):
    """A subclass whose results are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Wrapped(Tensor):
    """A wrapper with a __torch_dispatch__, as libraries for quantisation and distribution use it."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, cls, function(*args, **kwargs))


PLACES = ("state", "input", "step", "readout", "head")


def run(kind, place, name, compact="auto"):
    """Run with a tensor of class `kind` at a place; return the result and its gradients."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(4, 4, generator=g).requires_grad_()
    x = torch.randn(6, 4, generator=g).requires_grad_()
    state = torch.zeros(6, 4)
    policy = make_policy(name, 6)

    def dress(t, where):
        return t.as_subclass(kind) if where == place else t

    if place == "head" and isinstance(getattr(policy, "head", None), nn.Module):
        inner = policy.head
        del policy.head
        policy.head = lambda h: dress(inner(h), "head")
    halt = ac.AdaptiveHalt(
        lambda h, x: dress(torch.tanh(h @ w + x), "step"),
        policy,
        max_steps=5,
        readout=(lambda h: dress(h * 2, "readout")) if place == "readout" else None,
        compact=compact,
    )
    result = halt(dress(state, "state"), dress(x, "input"))
    gradients = (
        torch.autograd.grad(result.output.sum() + result.cost.sum(), (w, x))
        if torch.is_grad_enabled()
        else ()
    )
    return result, gradients


NAMES = ["act", "ponder", "ponder_eval", "max_prob", "relative", "fixed_tensor", "weighted_budget"]


@pytest.mark.promise("subclasses")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [Image, Untouched])
def test_a_subclass_gives_the_values_of_plain_tensors(how, name, place, kind):
    with mode(how):
        for compact in ("auto", True, False):
            want, g_want = run(Tensor, place, name, compact)
            got, g_got = run(kind, place, name, compact)
            for a, b in zip(leaves(got), leaves(want), strict=True):
                if a is not None:
                    close(a.as_subclass(Tensor), b)
            for a, b in zip(g_got, g_want, strict=True):
                close(a.as_subclass(Tensor), b)
            keeps = place in ("step", "readout") or (kind is Image and place in ("state", "input"))
            assert type(got.output) is (kind if keeps else Tensor)
            assert type(got.state) is (kind if keeps and place != "readout" else Tensor)
            assert {type(t) for t in (got.steps, got.cost, got.status)} == {Tensor}
            if got.trace is not None:
                assert type(got.trace.outputs) is type(got.output) and type(got.trace.weights) is Tensor


@pytest.mark.parametrize("how", MODES)
def test_the_arithmetic_of_a_subclass_counts_at_every_step(how):
    n = torch.tensor([1, 4, 2, 3])
    with mode(how):
        halt = ac.AdaptiveHalt(lambda h, x: h + x, ac.FixedSteps(n), max_steps=4, compact=True)
        x = torch.full((4, 1), 0.2)
        want = (0.2 * n[:, None]).clamp(max=0.5)
        for state, rows in (
            (torch.zeros(4, 1).as_subclass(Bounded), x),
            (torch.zeros(4, 1), x.as_subclass(Bounded)),
        ):
            result = halt(state, rows)
            close(result.output.as_subclass(Tensor), want)
            assert type(result.output) is type(result.state) is Bounded


def test_what_the_users_functions_see():
    seen = []

    def step(state, x):
        h, c = state
        seen.append(("step", type(h), type(c), type(x["a"]), type(x["b"])))
        return (h + x["a"], c + x["b"])

    def readout(state):
        seen.append(("readout", type(state[0]), type(state[1])))
        return state[1]

    state = (torch.zeros(3, 2), torch.zeros(3, 2).as_subclass(Image))
    x = {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}
    for grad in (True, False):
        seen.clear()
        with torch.set_grad_enabled(grad):
            result = ac.AdaptiveHalt(
                step, ac.FixedSteps(torch.tensor([1, 2, 3])), 4, readout=readout, compact=True
            )(state, x)
        assert seen == [("step", Tensor, Image, Tensor, Tensor), ("readout", Tensor, Image)] * 3
        assert type(result.output) is Image and [type(t) for t in result.state] == [Tensor, Image]
        assert result.output.as_subclass(Tensor).tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_attributes_of_the_object_do_not_follow_the_rows():
    x = torch.ones(3, 2).as_subclass(Image)
    x.rate = 25
    halt = ac.AdaptiveHalt(lambda h, x: h * x.rate, ac.FixedSteps(2), 3)
    with pytest.raises(AttributeError, match="rate"):  # at once, not only after the first packing
        halt(torch.ones(3, 2), x)


def test_a_class_of_parameters():
    class Learned(nn.Parameter):
        pass

    state = Learned(torch.zeros(4, 2))
    result = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(2), 3)(state)
    assert type(result.output) is Tensor and result.output.tolist() == [[2.0, 2.0]] * 4
    result.output.sum().backward()
    assert state.grad.tolist() == [[1.0, 1.0]] * 4


@pytest.mark.promise("subclasses")
@pytest.mark.parametrize("how", ["grad", "no_grad", "reference"])
@pytest.mark.parametrize("mask", [[True, False, True], [False] * 3, [True] * 3])
def test_route(how, mask):
    chosen, x, y = (
        torch.tensor(mask),
        torch.randn(3, 2, requires_grad=True),
        torch.randn(3, 2, requires_grad=True),
    )
    with mode(how):
        want = ac.route(chosen, torch.tanh, x, otherwise=y)
        for dressed in ("chosen", "x", "y", "branch"):
            c, a, b = (
                t.as_subclass(Image) if n == dressed else t
                for n, t in (("chosen", chosen), ("x", x), ("y", y))
            )
            seen = []

            def branch(rows, seen=seen, dressed=dressed):
                seen.append(type(rows))
                return torch.tanh(rows).as_subclass(Image if dressed == "branch" else type(rows))

            got = ac.route(c, branch, a, otherwise=b)
            close(got.as_subclass(Tensor), want)
            assert type(got) is (Image if dressed == "y" else Tensor)
            assert set(seen) <= {Image if dressed == "x" else Tensor}
            if torch.is_grad_enabled():
                for g, w in zip(
                    torch.autograd.grad(got.sum(), (x, y), allow_unused=True),
                    torch.autograd.grad(want.sum(), (x, y), allow_unused=True, retain_graph=True),
                    strict=True,
                ):
                    assert (g is None) == (w is None)
                    if g is not None:
                        close(g.as_subclass(Tensor), w)


@pytest.mark.parametrize("grad", [False, True])
def test_ops(grad):
    keep, z = torch.tensor([True, False, True]), torch.randn(3, 2)
    x = z.clone().requires_grad_(grad)
    image = x.as_subclass(Image)
    (rows, plain), index = ac.ops.compact(keep.as_subclass(Image), [image, x])
    assert [type(t) for t in (rows, plain, index)] == [Image, Tensor, Tensor]
    close(rows.as_subclass(Tensor), x[keep])
    (padded,), index, count = ac.ops.compact_padded(keep, image)
    assert [type(t) for t in (padded, index, count)] == [Image, Tensor, Tensor] and int(count) == 2
    (back,) = ac.ops.scatter_rows(rows, index[:2].as_subclass(Image), 3)
    assert type(back) is Image
    close(back.as_subclass(Tensor), torch.where(keep[:, None], x, 0.0))
    (merged,) = ac.ops.merge_rows(rows.as_subclass(Tensor), index[:2], (image * 0).as_subclass(Image))
    assert type(merged) is Image
    close(merged.as_subclass(Tensor), torch.where(keep[:, None], x, 0.0))
    if grad:
        (g,) = torch.autograd.grad(rows.sum() + padded.sum() + merged.sum(), x)
        close(g.as_subclass(Tensor), 3.0 * keep[:, None].float().expand(3, 2))
    logits, spent = image[:, 0], torch.rand(3).as_subclass(Image)
    for call in (
        lambda a, b: ac.ops.act_step(a, b, step=1, max_steps=3),
        lambda a, b: ac.ops.pondernet_step(a, -b, step=1, max_steps=3, log_prior=-1.0),
        lambda a, b: (ac.ops.confidence(torch.stack([a, b], 1)),),
        lambda a, b: ac.ops.descent_update(a[:, None], b[:, None], torch.tensor(0.1)),
    ):
        for got, want in zip(
            call(logits, spent), call(logits.as_subclass(Tensor), spent.as_subclass(Tensor)), strict=True
        ):
            assert type(got) is Tensor and torch.equal(got, want)


@pytest.mark.promise("subclasses")
@pytest.mark.parametrize("how", MODES)
def test_a_wrapper_with_a_dispatch_of_its_own_is_refused_by_name(how):
    x, n = torch.randn(4, 3), torch.tensor([1, 2, 2, 1])
    w = Wrapped(x)
    policy = ac.FixedSteps(n)

    def halt(step=lambda h, x: h + x, policy=policy, **options):
        return ac.AdaptiveHalt(step, policy, 3, **options)

    message = r": expected a tensor with data, got a .*Wrapped, whose __torch_dispatch__"
    with mode(how):
        for name, call in {
            "state": lambda: halt()(w, x),
            r"inputs\[0\]": lambda: halt()(x, w),
            "step": lambda: halt(lambda h, x: Wrapped(h))(x, x),
            "readout": lambda: halt(readout=lambda h: Wrapped(h))(x, x),
            "head": lambda: halt(policy=ac.ACT(lambda h: Wrapped(h[:, 0])))(x, x),
            "sample_ids": lambda: halt()(x, x, sample_ids=Wrapped(n)),
            "mask": lambda: ac.route(Wrapped(n > 1), torch.tanh, x, otherwise=x),
            r"tensors\[0\]": lambda: ac.route(n > 1, torch.tanh, w, otherwise=x),
            "otherwise": lambda: ac.route(n > 1, torch.tanh, x, otherwise=w),
            "branch": lambda: ac.route(n > 1, Wrapped, x, otherwise=x),
            "keep": lambda: ac.ops.compact(Wrapped(n > 1), x),
            "logits": lambda: ac.ops.confidence(w),
            "y0": lambda: ac.EnergyDescent(lambda y: (y * y).sum(1))(w),
        }.items():
            with pytest.raises(TypeError, match=name + message):
                call()
        policy.n = Wrapped(n)
        with pytest.raises(TypeError, match="FixedSteps n" + message):
            halt()(x, x)


def test_tensors_of_torch_with_a_dispatch_and_unfinished_collectives():
    """The test opens a process group, so that it runs in a child process."""
    said = run_cases(
        """
        state: halt(later(x), x)
        input: halt(x, later(x))
        step: halt(x, x, step=lambda h, x: later(torch.tanh(h + x)))
        readout: halt(x, x, readout=later)
        head: halt(x, x, policy=ac.ACT(lambda h: later(h[:, 0])))
        gradient: gradient(later) == gradient(lambda t: t)
        route: route()
        compact: ac.ops.compact(n > 1, later(x))[0][0].equal(x[n > 1])
        n: steps(later(n))
        descent: descend(later(x)).y.equal(descend(x).y)
        dtensor: halt(DTensor.from_local(x, mesh, [Replicate()]), x)
        masked: halt(x, masked_tensor(x, x > 0))
        """,
        """
        import tempfile, torch.distributed
        store = "file://" + tempfile.mktemp()
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        import torch.distributed._functional_collectives as collectives
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate
        from torch.masked import masked_tensor
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (1,))
        x, n = torch.randn(6, 3), torch.tensor([1, 4, 2, 3, 3, 4])
        class Reduce(torch.autograd.Function):
            @staticmethod
            def forward(ctx, t):
                return collectives.all_reduce(t.contiguous(), "max", mesh)
            @staticmethod
            def backward(ctx, g):
                return g
        def later(t):
            out = Reduce.apply(t.int()).bool() if t.dtype == torch.bool else Reduce.apply(t)
            return out
        assert type(later(x)) is collectives.AsyncCollectiveTensor
        def run(state, x, step=lambda h, x: torch.tanh(h + x), policy=None, **options):
            policy = policy or ac.FixedSteps(n)
            return ac.AdaptiveHalt(step, policy, 5, **options)(state, x)
        def halt(state, x, **options):
            policy = ac.ACT(lambda h: h[:, 0]) if "policy" in options else None
            result, plain = run(state, x, **options), run(x, x, policy=policy)
            return type(result.output).__name__, result.output.equal(plain.output)
        def route():
            got = ac.route(later(n > 1), lambda a: later(torch.tanh(a)), later(x), otherwise=later(x))
            return got.equal(ac.route(n > 1, torch.tanh, x, otherwise=x))
        descend = ac.EnergyDescent(lambda y: (y * y).sum(1), max_steps=2)
        def gradient(f):
            z = x.clone().requires_grad_()
            run(torch.zeros(6, 3), z, step=lambda h, x: f(torch.tanh(h + x))).output.square().sum().backward()
            return z.grad.tolist()
        def steps(m):
            policy = ac.FixedSteps(n)
            policy.n = m
            return run(x, x, policy=policy).steps.tolist()
        """,
    )
    for name in ("state", "input", "step", "readout", "head"):
        assert said[name] == "('Tensor', True)", (name, said[name])
    assert said["gradient"] == said["route"] == said["compact"] == said["descent"] == "True"
    assert said["n"] == "[1, 4, 2, 3, 3, 4]"
    assert (
        said["dtensor"].startswith("TypeError: state: expected a tensor with data")
        and "to_local()" in said["dtensor"]
    )
    assert said["masked"].startswith("TypeError: inputs[0]: ") and "MaskedTensor" in said["masked"]


# --- descents: points, contexts, settings and the energy's own tensors are treated as plain tensors ---------
ENERGIES = {
    "function": lambda: lambda y, c: ((y - c) ** 2).sum(1),
    "mlp": lambda: ac.MLPEnergy(3, 3, 8),
    "quadratic": lambda: ac.QuadraticEnergy(torch.diag(torch.arange(1.0, 4.0))),
    "hopfield": lambda: ac.HopfieldEnergy(torch.eye(4, 3), 1.5),
}


def lazily_negated(t):
    return torch._neg_view(-t)


@pytest.mark.promise("subclasses")
@pytest.mark.parametrize(
    "change", [lambda t: t.as_subclass(Image), lazily_negated], ids=["subclass", "negated"]
)
@pytest.mark.parametrize("gradient", ["unrolled", "stepwise", "implicit", "detached"])
@pytest.mark.parametrize("name", ENERGIES)
def test_descents(name, gradient, change):
    torch.manual_seed(0)
    energy = ENERGIES[name]()
    y, c, size, ids = torch.randn(5, 3), torch.randn(5, 3), torch.full((5,), 0.1), torch.arange(5) * 3
    context = () if name == "hopfield" else (c,)

    def descend(y, *context, size=size, ids=ids, energy=energy, noise=None):
        noise = torch.tensor(0.1) if noise is None else noise
        through = gradient == "unrolled" and torch.is_grad_enabled()
        y = y.clone().requires_grad_() if through else y
        run = ac.EnergyDescent(energy, step_size=size, max_steps=3, tol=0.0, gradient=gradient, noise=noise)
        out = run(y, *context, sample_ids=ids).y
        assert type(out) is Tensor
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), y) if through else ())]

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            want = descend(y, *context)
            found = {
                "y0": descend(change(y), *context),
                "context": descend(y, *map(change, context)),
                "step_size": descend(y, *context, size=change(size)),
                "noise": descend(y, *context, noise=change(torch.tensor(0.1))),
            }
            if change is not lazily_negated:
                found["sample_ids"] = descend(y, *context, ids=change(ids))
            for tensor, _ in [
                *getattr(energy, "named_parameters", list)(),
                *getattr(energy, "named_buffers", list)(),
            ]:
                other = ENERGIES[name]()
                other.load_state_dict(energy.state_dict())
                value = change(getattr(other, tensor).detach())
                other._parameters.pop(tensor, None), other._buffers.pop(tensor, None)
                setattr(other, tensor, value)
                found[tensor] = descend(y, *context, energy=other)
            for where, got in found.items():
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a.as_subclass(Tensor), b), where
