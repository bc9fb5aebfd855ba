"""Which cases of a large grid run: so many that every pair of values of two parameters is among them.

Most faults show with one value of one parameter, or where two values meet. A test with the mark
``covering(2)`` runs in a selection of its cases that has all pairs, with ``covering(3)`` in one that has all
triples, and with ``--full`` in all of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Mapping, Sequence

import pytest

Case = Mapping[str, Hashable]
"""The value of each parameter, or what stands for it."""


def combinations(case: Case, strength: int) -> set[tuple[tuple[str, Hashable], ...]]:
    """Return the values of every `strength` parameters of a case; of all where there are no more."""
    return set(itertools.combinations(case.items(), min(strength, len(case))))


def chosen(cases: Sequence[Case], strength: int) -> list[int]:
    """Return the numbers of few cases that have all combinations: always the case with most new ones.

    How many are new in a case can only fall, so that an older number is an upper bound.
    """
    found = [combinations(case, strength) for case in cases]
    heap = [(-len(found[i]), i) for i in range(len(cases))]
    heapq.heapify(heap)
    covered: set[tuple[tuple[str, Hashable], ...]] = set()
    result = []
    while heap:
        bound, i = heapq.heappop(heap)
        new = found[i] - covered
        if len(new) == -bound:
            result.append(i)
            covered |= new
        elif new:
            heapq.heappush(heap, (-len(new), i))
    return sorted(result)


def split(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests that run and those that are left out, both in their order.

    Each device has a selection of its own, because a machine may have only one.
    """
    grids: dict[tuple[str, Hashable], list[int]] = {}
    for i, item in enumerate(items):
        if item.get_closest_marker("covering") is not None:
            function, device = item.nodeid.partition("[")[0], item.callspec.params.get("device")
            grids.setdefault((function, device), []).append(i)
    left_out: set[int] = set()
    for grid in grids.values():
        (strength,) = items[grid[0]].get_closest_marker("covering").args
        # The cases share the values, which need not be hashable.
        cases = [{name: id(value) for name, value in items[i].callspec.params.items()} for i in grid]
        left_out.update(set(grid) - {grid[k] for k in chosen(cases, strength)})
    return [t for i, t in enumerate(items) if i not in left_out], [items[i] for i in sorted(left_out)]
