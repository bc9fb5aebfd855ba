"""Timing calls that have to be compared: interleaved, warmed up, without garbage collection.

`torch.utils.benchmark` times one call to its end before the next one, so that what slows the machine for a
while slows one of them; here they take turns, round after round.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

__all__ = ["clock", "interleave", "median_ms", "ratio", "ratios_over", "summary"]

Call = Callable[[], Any]
Times = Mapping[str, list[float]]

_SHORT = 20.0  # milliseconds; the state of the caches at the start of a shorter call still shows in its time


def clock(device: torch.device) -> Callable[[Call], float]:
    """Return a function that gives the milliseconds of one call; on CUDA by events around it."""

    def on_host(call: Call) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e6

    if device.type != "cuda":
        return on_host
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_device(call: Call) -> float:
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return on_device


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def interleave(
    calls: Mapping[str, Call],
    measure: Callable[[Call], float],
    seconds: float,
    few: int = 9,
    fewest: int = 7,
    most: int = 200,
    block: float = 0.0,
) -> dict[str, list[float]]:
    """Time all calls in turn, in rounds, so that drift and other programs slow all of them alike.

    The order is drawn anew for each round, and a short call is made once more, untimed, right before it is
    timed, as a program that keeps calling the same model would find the caches. Warming up takes at least two
    rounds and at most a tenth of ``seconds``, the time for all rounds; there are at least ``few`` rounds, or
    ``fewest`` where ``few`` would take over twice the time, and at most ``most``.

    A call shorter than ``block`` milliseconds is made as often in a row as fits into this time, and counts
    with its mean: the steady state of a program that does little else.

    Returns the milliseconds of each name, one entry for each round; the same index is the same round for all.
    """
    names = list(calls)
    latest = dict.fromkeys(names, math.inf)

    def sample(name: str) -> float:
        if latest[name] < _SHORT:
            calls[name]()
        count = max(1, int(block / latest[name])) if latest[name] > 0 else 1
        latest[name] = measure(partial(_repeat, calls[name], count)) / count
        return latest[name]

    start = time.perf_counter()
    warm = 0
    while warm < 2 or (warm < 20 and time.perf_counter() - start < 0.1 * seconds):
        begin = time.perf_counter()
        for name in names:
            sample(name)
        per_round = time.perf_counter() - begin
        warm += 1
    least = few if few * per_round <= 2 * seconds else fewest
    rounds = max(least, min(most, int(seconds / per_round)))

    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                times[name].append(sample(name))
    finally:
        if was_enabled:
            gc.enable()
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Return median, quartiles, minimum and number of the rounds."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "min": min(values), "repeats": len(values)}


def ratio(times: Times, over: str, under: str) -> float:
    """Return the median over the rounds of the ratio within a round: what slows a whole round cancels."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def ratios_over(times: Times, under: str, *without: str) -> dict[str, float]:
    """Return ``"NAME/UNDER"`` of every other name but those that are to be left out."""
    return {f"{name}/{under}": ratio(times, name, under) for name in times if name not in (under, *without)}


def median_ms(
    calls: Mapping[str, Call], device: torch.device, seconds: float, block: float = 0.0
) -> dict[str, float]:
    """Return the median time of each call; the calls take turns."""
    times = interleave(calls, clock(device), seconds, few=5, fewest=5, block=block)
    return {name: summary(values)["median"] for name, values in times.items()}
