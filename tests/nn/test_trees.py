"""States and inputs as pytrees: key orders, None, custom containers; and unlimited numbers of steps."""

import collections
import contextlib
import resource
from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree as pytree

import adaptcomp_ext as ac

N = torch.tensor([1, 3, 2, 4, 2, 1])
B = len(N)
MODES = ["grad", "no_grad", "reference"]


@contextlib.contextmanager
def mode(how):
    with contextlib.ExitStack() as stack:
        if how == "no_grad":
            stack.enter_context(torch.no_grad())
        if how == "reference":
            stack.enter_context(ac.reference_kernels())
        yield


@dataclass
class Cell:
    h: torch.Tensor
    c: torch.Tensor


pytree.register_pytree_node(Cell, lambda cell: ([cell.h, cell.c], None), lambda leaves, _: Cell(*leaves))
Pair = collections.namedtuple("Pair", ["a", "b"])
z = torch.zeros(B, 2)


def default(**items):
    return collections.defaultdict(list, items)


# state, step, readout; "a" counts the steps, "b" stays at zero.
TREES = {
    "same order": ({"a": z, "b": z}, lambda s: {"a": s["a"] + 1, "b": s["b"]}, lambda s: s["a"]),
    "other order": ({"a": z, "b": z}, lambda s: {"b": s["b"], "a": s["a"] + 1}, lambda s: s["a"]),
    "popped and put back": ({"a": z, "b": z}, lambda s: {"a": s.pop("a") + 1, **s}, lambda s: s["a"]),
    "updated": ({"a": z, "b": z}, lambda s: s.update(a=s.pop("a") + 1) or s, lambda s: s["a"]),
    "ordered": (
        collections.OrderedDict(a=z, b=z),
        lambda s: collections.OrderedDict(b=s["b"], a=s["a"] + 1),
        lambda s: s["a"],
    ),
    "default": (default(a=z, b=z), lambda s: default(b=s["b"], a=s["a"] + 1), lambda s: s["a"]),
    "nested": (
        {"x": {"a": z, "b": z}, "y": [z, {"p": z, "q": z}]},
        lambda s: {
            "y": [s["y"][0], {"q": s["y"][1]["q"], "p": s["y"][1]["p"] - 1}],
            "x": {"b": s["x"]["b"], "a": s["x"]["a"] + 1},
        },
        lambda s: s["x"]["a"] + s["y"][0] + s["y"][1]["q"],
    ),
    "named tuple": (
        Pair(z, {"a": z, "b": z}),
        lambda s: Pair(s.a, {"b": s.b["b"], "a": s.b["a"] + 1}),
        lambda s: s.b["a"],
    ),
    "dataclass": (Cell(z, z), lambda s: Cell(s.h + 1, s.c), lambda s: s.h),
    "with None": ((z, None), lambda s: (s[0] + 1, s[1]), lambda s: s[0]),
    "dictionary with None": ({"n": None, "a": z}, lambda s: {"a": s["a"] + 1, "n": s["n"]}, lambda s: s["a"]),
}


@pytest.mark.parametrize("compact", [True, False, "auto"])
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", TREES)
def test_states(name, how, compact):
    state, step, readout = TREES[name]
    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(N), 5, readout=readout, compact=compact)(state)
    assert result.output[:, 0].tolist() == N.tolist()
    assert pytree.tree_structure(result.state) == pytree.tree_structure(state)
    assert readout(result.state)[:, 0].tolist() == N.tolist()


@pytest.mark.parametrize("name", TREES)
def test_results_of_a_branch(name):
    state, step, readout = TREES[name]
    mask = N > 2
    fresh = pytree.tree_map(lambda t: t if t is None else t.clone(), state)
    for chosen in (mask, torch.ones_like(mask), torch.zeros_like(mask)):
        merged = ac.route(chosen, step, fresh, otherwise=state)
        assert readout(merged)[:, 0].tolist() == chosen.long().tolist()
        assert pytree.tree_structure(merged) == pytree.tree_structure(state)
        fresh = pytree.tree_map(lambda t: t if t is None else t.clone(), state)


@pytest.mark.parametrize(
    ("state", "step"),
    [
        ({"a": z, "b": z}, lambda s: {"a": s["a"], "c": s["b"]}),
        ({"a": z, "b": z}, lambda s: {"a": s["a"]}),
        ({"a": z, "b": z}, lambda s: {"a": s["a"], "b": [s["b"]]}),
        ({"a": z, "b": z}, lambda s: {"a": s["a"], "b": None}),
        ({"a": z, "b": z}, lambda s: (s["a"], s["b"])),
        ((z, None), lambda s: (s[0], s[0])),
        ((z, None), lambda s: (None, s[0])),
        ((z, z), lambda s: None),
        (z, lambda s: None),
    ],
)
def test_another_structure_is_refused(state, step):
    for how in MODES:
        with (
            mode(how),
            pytest.raises(TypeError, match=r"(?s)^step: expected a state with the structure .*got"),
        ):
            ac.AdaptiveHalt(step, ac.FixedSteps(3), 4, readout=lambda s: z)(state)
    with pytest.raises((TypeError, ValueError), match=r"(?s)^branch.*: expected .*got"):
        ac.route(N > 2, step, pytree.tree_map(lambda t: t, state), otherwise=state)


# --- None among the inputs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("compact", [True, False, "auto"])
@pytest.mark.parametrize("how", MODES)
def test_none_is_handed_to_the_step(how, compact):
    x = torch.arange(B).float()[:, None].expand(B, 2).contiguous()

    def step(h, mask, data, extra):
        assert mask is None and data["bias"] is None and extra == (None, None)
        return h + data["x"]

    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(N), 5, compact=compact)(
            z, None, {"bias": None, "x": x}, (None, None)
        )
    assert result.output[:, 0].tolist() == (N * torch.arange(B)).tolist()


def test_none_is_handed_to_a_branch():
    def branch(x, mask, both):
        assert mask is None and both[1] is None
        return x + both[0]

    chosen = N > 2
    for mask in (chosen, torch.ones_like(chosen)):
        got = ac.route(mask, branch, z, None, (z + 1, None), otherwise=z)
        assert got[:, 0].tolist() == mask.long().tolist()


# --- containers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compact", [True, "auto"])
@pytest.mark.parametrize("how", ["no_grad", "inference", "grad"])
@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_a_container_that_the_step_kept_stays_as_it_was(kind, how, compact):
    """Neither the containers of inputs and states nor the tensors in them change."""
    make = (lambda a, b: {"a": a, "b": b}) if kind is dict else lambda a, b: kind([a, b])
    kept, copies = [], []

    def step(state, inputs):
        for tree in (state, inputs):
            kept.append(tree)
            copies.append([t.clone() for t in pytree.tree_leaves(tree)])
        a, b = pytree.tree_leaves(state)
        c, d = pytree.tree_leaves(inputs)
        out = make(a + c, b + d)
        kept.append(out)
        copies.append([t.clone() for t in pytree.tree_leaves(out)])
        return out

    x = torch.arange(B).float()[:, None]
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
    with modes[how]():
        first = lambda s: pytree.tree_leaves(s)[0]  # noqa: E731
        result = ac.AdaptiveHalt(step, ac.FixedSteps(N), 5, readout=first, compact=compact)(
            make(x * 0, x * 0), make(x, x * 2)
        )
    assert result.output[:, 0].tolist() == (N * torch.arange(B)).tolist()
    for tree, copy in zip(kept, copies, strict=True):
        for t, was in zip(pytree.tree_leaves(tree), copy, strict=True):
            assert torch.equal(t, was)


@pytest.mark.parametrize("how", MODES)
def test_a_step_may_empty_its_containers(how):
    def step(state, inputs, more):
        return {"h": state.pop("h") + inputs.pop("x") + more.pop()}

    with mode(how):
        x, more = {"x": z + 1}, [z + 1]
        result = ac.AdaptiveHalt(step, ac.FixedSteps(N), 5)({"h": z}, x, more)
    assert result.output[:, 0].tolist() == (2 * N).tolist()
    assert list(x) == ["x"] and len(more) == 1


# --- numbers of steps ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", MODES)
def test_a_bound_that_is_never_reached_costs_nothing(how):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for policy in (
        ac.FixedSteps(N),
        ac.ACT(lambda s: s[:, 0]),
        ac.PonderNet(lambda s: s[:, 0], epsilon=0.5),
        ac.Convergence(10.0),
    ):
        with mode(how):
            result = ac.AdaptiveHalt(lambda h: h + 1, policy, max_steps=10**9)(z)
        assert int(result.steps.max()) < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(1), max_steps=2**63), "max_steps"),
        (lambda: ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(1), min_steps=2**70), "min_steps"),
        (lambda: ac.FixedSteps(2**63), "n"),
        (lambda: ac.PonderNet(torch.sum, seed=2**63), "seed"),
        (lambda: ac.Convergence(0.1, patience=2**64), "patience"),
        (lambda: ac.ops.scatter_rows(z, torch.arange(B), 2**63), "size"),
        (lambda: ac.ops.act_step(z[:, 0], z[:, 0], step=1, max_steps=2**63), "max_steps"),
    ],
)
def test_numbers_beyond_64_bits_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected an int < 2\*\*63, got \d+"):
        make()
    halt = ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(1))
    halt.max_steps = 2**63
    with pytest.raises(ValueError, match=r"^max_steps: expected an int < 2\*\*63"):
        halt(z)
