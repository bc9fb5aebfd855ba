"""Confidence: the three measures against the reference, and against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.tensors import (
    FLOATS,
    LAYOUTS,
    ROWS,
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    generator,
    laid_out,
    values,
)

MEASURES = ("max_prob", "margin", "entropy")
CLASSES = (2, 3, 7, 8, 15, 16, 17, 64, 257, 1000)


def check_against_reference(logits, measure):
    with Unchanged(logits):
        got = ac.ops.confidence(logits, measure)
    # max p and the margin are differences of sums near one, and the entropy is one minus a quotient: a few
    # roundings of one.
    exact = ac.reference.confidence(logits.double(), measure)
    same = ac.reference.confidence(logits, measure)
    assert_as_good_as_torch(got + 1, same + 1, exact + 1, rounding=4.0)
    assert bool((got <= 1).all())
    assert bool((got >= -4 * torch.finfo(got.dtype).eps).all())


@pytest.mark.promise("formula", "own memory")
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_the_reference_in_every_size(device, poison, dtype, measure):
    for rows in ROWS:
        check_against_reference(3 * values((rows, 10), dtype, device), measure)
    for classes in CLASSES:
        check_against_reference(3 * values((33, classes), dtype, device), measure)
    poison.check()


@pytest.mark.sanitizer
@pytest.mark.parametrize("measure", MEASURES)
def test_small_cases(device, measure):
    for rows, classes in ((0, 2), (1, 2), (33, 7), (3, 257)):
        for dtype in (torch.float32, torch.bfloat16):
            check_against_reference(values((rows, classes), dtype, device), measure)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(device, layout, measure):
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (2, 8, 17):
            logits = laid_out(layout, 33, classes, dtype, device)
            assert_bitwise(
                ac.ops.confidence(logits, measure),
                ac.ops.confidence(logits.clone(memory_format=torch.contiguous_format), measure),
            )


def test_a_certain_row_has_one_and_an_undecided_row_the_least(device):
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0]], device=device)
    assert [ac.ops.confidence(certain, m).item() for m in MEASURES] == [1, 1, 1]
    undecided = torch.full((1, 4), 7.0, device=device)
    assert [ac.ops.confidence(undecided, m).item() for m in MEASURES] == pytest.approx([0.25, 0, 0], abs=1e-6)


def test_the_measures_are_what_they_are_called(device):
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64, device=device)
    entropy = -sum(x * math.log(x) for x in (0.5, 0.3, 0.2))
    assert ac.ops.confidence(p.log(), "max_prob").item() == pytest.approx(0.5)
    assert ac.ops.confidence(p.log(), "margin").item() == pytest.approx(0.2)
    assert ac.ops.confidence(p.log(), "entropy").item() == pytest.approx(1 - entropy / math.log(3))


@pytest.mark.parametrize("measure", MEASURES)
def test_shifting_or_permuting_the_classes_changes_nothing(device, measure):
    logits = values((9, 8), torch.float64, device)
    expected = ac.ops.confidence(logits, measure)
    torch.testing.assert_close(ac.ops.confidence(logits + 100, measure), expected)
    order = torch.randperm(8, generator=generator(1)).to(device)
    torch.testing.assert_close(ac.ops.confidence(logits[:, order], measure), expected)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_do_not_overflow(device, scale, measure):
    logits = values((33, 5), torch.float32, device).mul(scale)
    assert ac.ops.confidence(logits, measure).tolist() == pytest.approx([1.0] * 33)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_excluded_class_is_minus_infinity(device, measure):
    logits = values((9, 5), torch.float64, device)
    logits[:, 3] = -math.inf
    got = ac.ops.confidence(logits, measure)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, ac.reference.confidence(logits, measure))


@pytest.mark.parametrize("classes", [2, 3, 17, 65, 257])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fill", ["-inf", "least"])
def test_masked_classes_are_as_good_as_none(device, dtype, classes, fill):
    """Row r has r + 1 classes left, one of them certain. `least`: the dtype's smallest number masks."""
    rows = min(classes, 40)
    left = torch.arange(classes, device=device) <= torch.arange(rows, device=device)[:, None]
    left = left[:, torch.randperm(classes, generator=generator(1)).to(device)]
    value = -math.inf if fill == "-inf" else torch.finfo(dtype).min
    logits = (3 * values((rows, classes), dtype, device)).masked_fill(~left, value)
    p = torch.where(left, logits.double(), -math.inf).softmax(1)
    second = torch.where(left.sum(1) > 1, p.topk(2, dim=1).values[:, 1], 0.0)
    entropy = -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(1)
    right = {"max_prob": p.amax(1), "margin": p.amax(1) - second, "entropy": 1 - entropy / math.log(classes)}
    for measure in MEASURES:
        got = ac.ops.confidence(logits, measure)
        torch.testing.assert_close(got.double(), right[measure], rtol=0, atol=2e-6)
        assert got[0].item() == 1  # a single class
        with ac.reference_kernels():
            torch.testing.assert_close(ac.ops.confidence(logits, measure), got, rtol=0, atol=2e-6)
        for threshold in (
            0.25,
            0.5,
            0.9,
            1.0,
        ):  # the halting kernel decides most rows without all the exponentials
            halt = ac.AdaptiveHalt(lambda s: s, ac.Confidence(threshold, measure), max_steps=2)
            assert torch.equal(halt(logits).status == ac.Status.HALTED, got >= threshold)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("at", [0, 3, 16])
def test_a_nan_anywhere_gives_nan_in_its_row_only(device, at, measure):
    logits = values((33, 17), device=device)
    clean = ac.ops.confidence(logits, measure)
    logits[7, at] = math.nan
    got = ac.ops.confidence(logits, measure)
    assert got[7].isnan()
    others = torch.arange(33, device=device) != 7
    assert_bitwise(got[others], clean[others])


@pytest.mark.parametrize("measure", MEASURES)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(device, measure):
    logits = values((257, 17), device=device)
    together = ac.ops.confidence(logits, measure)
    order = torch.randperm(257, generator=generator(3)).to(device)
    assert_bitwise(ac.ops.confidence(logits[order], measure), together[order])
    for i in (0, 1, 100, 256):
        assert_bitwise(ac.ops.confidence(logits[i : i + 1], measure), together[i : i + 1])


def test_it_only_decides_and_has_no_gradient(device):
    logits = values((3, 4), device=device).requires_grad_()
    assert not ac.ops.confidence(logits).requires_grad
    with ac.reference_kernels():
        assert not ac.ops.confidence(logits).requires_grad
