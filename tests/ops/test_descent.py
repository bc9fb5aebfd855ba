"""The ops of a descent: the update against the reference in every size and dtype, its gradient, noise."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from adaptcomp_ext.ops import descent
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.reference import DescentRule
from tests.helpers.tensors import (
    FLOATS,
    LAYOUTS,
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    generator,
    laid_out,
    values,
)

ROWS = (0, 1, 2, 33, 257)
WIDTHS = (1, 3, 4, 15, 16, 17, 64, 257, 1030)
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.7},
    "clip": {"clip": 2.5},
    "clamp": {"clamp": (-0.6, 0.9)},
    "one bound": {"clamp": (-math.inf, 0.2)},
    "all": {"momentum": 0.9, "clip": 1.5, "clamp": (-1.0, 1.0)},
}


def rule_of(options):
    low, high = options.get("clamp", (-math.inf, math.inf))
    return DescentRule(
        1, momentum=options.get("momentum", 0.0), clip=options.get("clip", 0.0), low=low, high=high
    )


def block(rows, width, dtype, device, options, per_row=True, noise=True, seed=0):
    wide = compute_dtype(dtype)
    y, gradient = (values((rows, width), dtype, device, seed + i) for i in range(2))
    size = (
        values((rows,), wide, device, seed + 2).abs() + 0.05
        if per_row
        else torch.tensor(0.3, dtype=wide, device=device)
    )
    velocity = values((rows, width), wide, device, seed + 3) if "momentum" in options else None
    shaken = values((rows, width), wide, device, seed + 4) * 0.1 if noise else None
    return y, gradient, size, velocity, shaken


def update(y, gradient, size, velocity, noise, options):
    return ac.ops.descent_update(y, gradient, size, velocity=velocity, noise=noise, **options)


@pytest.mark.promise("formula", "own memory")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_the_reference_in_every_size(device, poison, dtype, name):
    options = OPTIONS[name]
    for rows in ROWS:
        for width in WIDTHS:
            tensors = block(rows, width, dtype, device, options, per_row=rows % 2 == 0, noise=width % 2 == 0)
            with Unchanged(*(t for t in tensors if t is not None)):
                got = update(*tensors, options)
            same = ac.reference.descent_update(*tensors, rule_of(options))
            exact = ac.reference.descent_update(
                *(None if t is None else t.double() for t in tensors), rule_of(options)
            )
            for g, s, e in zip(got, same, exact, strict=True):
                assert g.dtype == s.dtype
                assert_as_good_as_torch(g, s, e, rounding=6.0, scale=1.0)
    poison.check()


@pytest.mark.sanitizer
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_small_cases(device, rows):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = block(rows, 17, dtype, device, OPTIONS["all"])
        assert update(*tensors, OPTIONS["all"]).point.shape == (rows, 17)
    assert descent.normals(
        DescentRule(1), torch.arange(rows, device=device), 2, torch.zeros(rows, 3, device=device)
    ).shape == (
        rows,
        3,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout):
    y, gradient, size, velocity, noise = block(9, 12, torch.float32, device, OPTIONS["all"])
    strange = [laid_out(layout, 9, 12, torch.float32, device, seed=s) for s in range(4)]
    got = update(strange[0], strange[1], size, strange[2], strange[3], OPTIONS["all"])
    want = update(
        *(t.contiguous() for t in strange[:2]), size, *(t.contiguous() for t in strange[2:]), OPTIONS["all"]
    )
    for g, w in zip(got, want, strict=True):
        assert_bitwise(g, w)
    sizes = torch.rand(18, device=device)[::2]
    for g, w in zip(
        update(y, gradient, sizes, velocity, noise, {}),
        update(y, gradient, sizes.contiguous(), velocity, noise, {}),
        strict=True,
    ):
        assert_bitwise(g, w)


def test_rows_of_more_dimensions_are_flattened(device):
    y, gradient, size, velocity, noise = block(5, 24, torch.float32, device, OPTIONS["all"])
    got = update(
        *(t.view(5, 2, 3, 4) for t in (y, gradient)),
        size,
        *(t.view(5, 2, 3, 4) for t in (velocity, noise)),
        OPTIONS["all"],
    )
    for g, w in zip(got, update(y, gradient, size, velocity, noise, OPTIONS["all"]), strict=True):
        assert_bitwise(g, w.view(5, 2, 3, 4))
    point = ac.ops.descent_update(
        torch.ones(3, device=device), torch.ones(3, device=device), torch.tensor(0.25, device=device)
    ).point
    assert point.tolist() == [0.75] * 3


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(device, name, threads):
    options = OPTIONS[name]
    for count in (1, 3):
        threads(count)
        y, gradient, size, velocity, noise = block(300, 129, torch.float32, device, options)
        together = update(y, gradient, size, velocity, noise, options)
        order = torch.randperm(300, generator=generator(3)).to(device)
        shuffled = update(
            *(None if t is None else t[order] for t in (y, gradient, size, velocity, noise)), options
        )
        for g, w in zip(shuffled, together, strict=True):
            assert_bitwise(g, w[order])
        for i in (0, 1, 150, 299):
            alone = update(
                *(None if t is None else t[i : i + 1] for t in (y, gradient, size, velocity, noise)), options
            )
            for g, w in zip(alone, together, strict=True):
                assert_bitwise(g, w[i : i + 1])


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_differentiable_twice(device, check, name):
    options = OPTIONS[name]
    for per_row in (True, False):
        tensors = block(5, 3, torch.float64, device, options, per_row=per_row)
        names = [
            n
            for n, t in zip(("y", "gradient", "size", "velocity", "noise"), tensors, strict=True)
            if t is not None
        ]
        leaves = [t.requires_grad_() for t in tensors if t is not None]

        def run(*given, names=names):
            named = dict(zip(names, given, strict=True))
            return tuple(
                update(*(named.get(n) for n in ("y", "gradient", "size", "velocity", "noise")), options)
            )

        assert check(run, leaves)


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_match_autograd_through_the_reference(device, dtype, name):
    options = OPTIONS[name]
    tensors = block(33, 17, dtype, device, options)
    upstream = (
        values((33, 17), torch.float32, device, seed=9),
        values((33, 17), torch.float32, device, seed=10),
    )
    found = []
    for run, double in ((update, False), (None, False), (None, True)):
        leaves = [
            None if t is None else (t.double() if double else t).detach().requires_grad_() for t in tensors
        ]
        point, after = (
            run(*leaves, options) if run else ac.reference.descent_update(*leaves, rule_of(options))
        )
        loss = (point * upstream[0].to(point.dtype)).sum() + (after * upstream[1].to(after.dtype)).sum()
        found.append(torch.autograd.grad(loss, [t for t in leaves if t is not None]))
    for got, same, exact in zip(*found, strict=True):
        assert_as_good_as_torch(got, same, exact, rounding=8.0, scale=4.0, computed_in=torch.float32)


def test_clipping_survives_gradients_of_any_finite_size(device):
    y, size = torch.zeros(3, 4, device=device), torch.tensor(1.0, device=device)
    gradient = torch.tensor([3e38, 1e30, 1e-30], device=device)[:, None].expand(3, 4)
    point = ac.ops.descent_update(y, gradient, size, clip=2.0).point
    torch.testing.assert_close(point[:2], torch.full((2, 4), -1.0, device=device))
    assert_bitwise(point[2], -gradient[2].contiguous())


def test_a_nan_row_shows_and_harms_no_neighbour(device):
    tensors = list(block(9, 5, torch.float32, device, OPTIONS["all"]))
    clean = update(*tensors, OPTIONS["all"]).point
    tensors[1] = tensors[1].clone()
    tensors[1][4, 2] = math.nan
    got = update(*tensors, OPTIONS["all"]).point
    others = torch.arange(9, device=device) != 4
    assert bool(got[4].isnan().any())
    assert_bitwise(got[others], clean[others])


@pytest.mark.promise("compile")
@pytest.mark.parametrize("name", ["plain", "all"])
def test_compiles_whole(device, name):
    torch._dynamo.reset()
    options = OPTIONS[name]
    compiled = torch.compile(
        lambda *tensors: tuple(update(*tensors, options)), fullgraph=True, backend="aot_eager"
    )
    for rows in (5, 9):
        tensors = block(rows, 3, torch.float32, device, options)
        got, want = [], []
        for run, into in ((compiled, got), (lambda *t: tuple(update(*t, options)), want)):
            leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            point, _ = run(*leaves)
            into += [point, *torch.autograd.grad(point.square().sum(), [t for t in leaves if t is not None])]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    torch._dynamo.reset()


# --- noise --------------------------------------------------------------------------------------------------
M32 = 2**32 - 1


def philox(c, k):
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & M32, p0 >> 32 ^ c[3] ^ k[1], p0 & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return c


def by_hand(seed, sample, step, element):
    """Compute an element of the noise by Philox 4x32-10 in Python integers, and Box and Muller in doubles."""
    word = philox([sample & M32, sample >> 32 & M32, step & M32, element // 4 + 1], [seed & M32, seed >> 32])
    half, second = element % 4 // 2, element % 2
    radius = math.sqrt(-2 * math.log((word[2 * half] + 1) / 2**32))
    angle = 2 * math.pi * word[2 * half + 1] / 2**32
    return radius * (math.sin(angle) if second else math.cos(angle))


def normals(seed, samples, step, elements, dtype, device):
    like = torch.zeros(len(samples), elements, dtype=dtype, device=device)
    return descent.normals(
        DescentRule(1, seed=seed), torch.tensor(samples, device=device, dtype=torch.int64), step, like
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_noise_by_hand(device, dtype):
    chosen = random.Random(0)
    for elements in (1, 4, 5, 11):
        seed, step = chosen.randrange(2**63), chosen.randrange(1, 2**20)
        samples = [0, 1, 2**40 + 7, chosen.randrange(2**63)]
        want = torch.tensor(
            [[by_hand(seed, s, step, e) for e in range(elements)] for s in samples],
            dtype=dtype,
            device=device,
        )
        torch.testing.assert_close(normals(seed, samples, step, elements, dtype, device), want)
        with ac.reference_kernels():
            torch.testing.assert_close(normals(seed, samples, step, elements, dtype, device), want)


def test_noise_is_standard_normal_and_never_the_same(device):
    parts = [
        normals(seed, list(range(50)), step, 40, torch.float64, device)
        for seed in (0, 1)
        for step in (1, 2, 3)
    ]
    x = torch.cat(parts).flatten()
    assert x.unique().numel() == x.numel()
    n = x.numel()
    assert abs(x.mean().item()) < 4 / math.sqrt(n)
    assert abs(x.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean().item() - 3) < 4 * math.sqrt(96 / n)


# --- errors -------------------------------------------------------------------------------------------------
Y = torch.zeros(4, 3)
A = torch.tensor(0.1)
BAD = [
    ((1.0, Y, A), {}, TypeError, "y: expected a Tensor"),
    ((Y.long(), Y, A), {}, TypeError, "y: expected float32"),
    ((torch.tensor(1.0), torch.tensor(1.0), A), {}, ValueError, "y: expected a batch dimension"),
    ((Y, None, A), {}, TypeError, "gradient: expected a Tensor"),
    ((Y, Y[:3], A), {}, ValueError, r"gradient: expected 4 rows.*\[3, 3\]"),
    ((Y, Y[:, :2], A), {}, ValueError, r"gradient: expected the shape of y, \[4, 3\], got \[4, 2\]"),
    ((Y, Y.double(), A), {}, TypeError, "gradient: expected torch.float32, got torch.float64"),
    ((Y, Y, 0.1), {}, TypeError, "step_size: expected a Tensor, got float 0.1"),
    ((Y, Y, A.double()), {}, TypeError, "step_size: expected torch.float32"),
    ((Y, Y, torch.ones(3)), {}, ValueError, r"step_size: expected shape \[\] or \[4\], got \[3\]"),
    ((Y, Y, A), {"velocity": Y.double()}, TypeError, "velocity: expected torch.float32"),
    (
        (Y.half(), Y.half(), A),
        {"velocity": Y.half()},
        TypeError,
        "velocity: expected torch.float32, got torch.float16",
    ),
    ((Y, Y, A), {"noise": Y[:, :1]}, ValueError, "noise: expected the shape of y"),
    ((Y, Y, A), {"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\), got 1.0"),
    ((Y, Y, A), {"momentum": "much"}, TypeError, "momentum: expected a number, got str"),
    ((Y, Y, A), {"clip": 0.0}, ValueError, r"clip: expected a number in \(0, inf\), got 0.0"),
    ((Y, Y, A), {"clip": math.nan}, ValueError, "clip: .*got nan"),
    ((Y, Y, A), {"clamp": (1.0, 1.0)}, ValueError, "clamp: expected low < high"),
    ((Y, Y, A), {"clamp": 1.0}, TypeError, "clamp: expected None or a pair"),
    ((Y, Y, A), {"clamp": (None, 1.0)}, TypeError, "clamp: expected a pair of numbers"),
    ((Y, Y, A), {"clamp": (math.nan, 1.0)}, ValueError, "clamp: expected low < high"),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))]
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ac.ops.descent_update(*arguments, **options)
