"""The selection of cases of a large grid has every pair, or triple, of values, and few cases."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from tests.helpers.covering import chosen, combinations, split


def grid(*sizes):
    return [dict(enumerate(values)) for values in itertools.product(*map(range, sizes))]


def covered(cases, strength):
    return set().union(*(combinations(case, strength) for case in cases))


@pytest.mark.parametrize(
    ("sizes", "strength", "most"),
    [
        ((3,), 2, 3),
        ((4, 5), 2, 20),
        ((6, 3, 2), 2, 18),
        ((48, 3, 2, 2), 2, 150),
        ((6, 3, 2), 3, 36),
        ((8, 4, 3, 2), 3, 110),
        ((2,) * 8, 2, 12),
    ],
)
def test_every_combination_is_in_one_of_the_chosen_cases(sizes, strength, most):
    cases = grid(*sizes)
    kept = chosen(cases, strength)
    assert kept == sorted(set(kept)) and len(kept) <= most
    assert covered([cases[i] for i in kept], strength) == covered(cases, strength)


def test_cases_that_the_test_itself_leaves_out_are_not_asked_for():
    cases = [case for case in grid(4, 3, 3) if case[0] != case[1]]
    assert covered([cases[i] for i in chosen(cases, 2)], 2) == covered(cases, 2)


def test_only_tests_with_the_mark_are_thinned_and_each_device_by_itself():
    values = [object() for _ in range(3)]

    def item(name, marks, device, case):
        parameters = {str(k): values[v] for k, v in case.items()}
        return SimpleNamespace(
            nodeid=f"{name}[{device}-{case}]",
            get_closest_marker=marks.get,
            callspec=SimpleNamespace(params={"device": device, **parameters}),
        )

    devices = ("cpu", "cuda")
    marked = [
        item("a", {"covering": SimpleNamespace(args=(2,))}, device, case)
        for case in grid(3, 2, 2)
        for device in devices
    ]
    others = [item("b", {}, "cpu", case) for case in grid(3, 2, 2)]
    kept, left_out = split([*marked, *others])
    assert [t for t in kept if t.nodeid.startswith("b")] == others
    for device in devices:
        assert len([t for t in kept if t.nodeid.startswith(f"a[{device}")]) == 6
    assert len(kept) + len(left_out) == len(marked) + len(others)
