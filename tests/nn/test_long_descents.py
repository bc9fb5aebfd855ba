"""Very long descents: steps that are not taken cost nothing, and Ctrl-C ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.nn.descent import fused
from tests.helpers.closed_forms import OPTIONS, SHORT, contexts, energy, points
from tests.helpers.energies import Wells, problem
from tests.helpers.processes import OUTSIDE

FOR_EVER = 10**9


def outcome(descend, y0, *context):
    y0 = y0.clone().requires_grad_()
    result = descend(y0, *context)
    total = result.y.sin().sum() + result.energy.sum()
    if result.trace is not None:
        total = total + result.trace.outputs.cos().sum()
    own = [p for p in descend.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, [y0, *own], allow_unused=True)
    return [
        result.y,
        result.energy,
        result.steps,
        result.status,
        *(result.trace or ()),
        *(g for g in grads if g is not None),
    ]


@pytest.mark.covering(2)
@pytest.mark.parametrize("gradient", ["unrolled", ("truncated", 2**63 - 1), "stepwise", "implicit"], ids=str)
@pytest.mark.parametrize("kind", [*SHORT, "function"])
@pytest.mark.parametrize("trace", [False, True])
def test_a_bound_that_is_never_met_costs_nothing(kind, gradient, trace):
    if kind == "function":
        module, (y0, x) = Wells(torch.float64), problem(dtype=torch.float64)
        context = [x]
    else:
        module, y0, context = energy(kind), points(7), contexts(kind, 7)

    def run(most):
        descend = ac.EnergyDescent(
            module,
            step_size=0.1,
            max_steps=most,
            tol=1e-3,
            stop="gradient",
            keep_trace=trace,
            gradient=gradient,
        )
        return outcome(descend, y0, *context)

    want = run(1000)
    assert int(want[2].max()) < 900
    tracemalloc.start()
    got = run(FOR_EVER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run(2**63 - 1)[0], want[0])


@pytest.mark.promise("seed")
@pytest.mark.covering(2)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", SHORT)
def test_a_descent_that_runs_twice_has_the_same_bits(monkeypatch, kind, option):
    options = {**OPTIONS[option], "max_steps": 40}
    y0, context = points(9), contexts(kind, 9)
    for gradient in ("unrolled", ("truncated", 3), "stepwise"):
        descend = ac.EnergyDescent(energy(kind), gradient=gradient, keep_trace=True, **options)
        want = outcome(descend, y0, *context)
        with monkeypatch.context() as changed:
            changed.setattr(fused, "RESERVED", 0)
            got = outcome(descend, y0, *context)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


INTERRUPTED = """
import os, signal, sys, threading, time
import torch
import adaptcomp_ext as ac

# A process that a shell has started in the background ignores it, and so would this one.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
ENERGIES = {
    "network": ac.MLPEnergy(16, 0, 64),
    "deep": ac.MLPEnergy(16, 0, (64, 64)),
    "hopfield": ac.HopfieldEnergy(torch.nn.Parameter(torch.randn(64, 16)), 1.0),
    "quadratic": ac.QuadraticEnergy(torch.nn.Parameter(torch.eye(16)), torch.zeros(16)),
}

def interrupt(times):
    for _ in range(times):
        time.sleep(0.2)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

def interrupted(name, work, times=1):
    sent.clear()
    thread = threading.Thread(target=interrupt, args=[times])
    try:
        thread.start()
        work()
        print(name, "ran to its end")
    except KeyboardInterrupt:
        when = "in time" if time.monotonic() - sent[-1] < 1.0 else "late"
        print(name, "interrupted", when, "after", len(sent))
    thread.join()

sent = []
for name, energy in ENERGIES.items():
    y0 = torch.randn(64, 16)
    for_ever = ac.EnergyDescent(energy, step_size=1e-3, max_steps=10**9, tol=0.0)
    with torch.no_grad():
        interrupted(name, lambda: for_ever(y0))
    descend = ac.EnergyDescent(energy, step_size=1e-3, max_steps=2000, tol=0.0)
    y = descend(torch.randn(500, 16, requires_grad=True)).y.sum()
    interrupted(name + " backward", lambda: [y.backward(retain_graph=True) for _ in range(1000)])
    print("goes on", bool(ac.EnergyDescent(energy, max_steps=3)(y0).y.isfinite().all()))

halt = ac.AdaptiveHalt(ac.cells.GRU(16, 16), ac.FixedSteps(10**9), max_steps=10**9)
with torch.no_grad():
    interrupted("recurrence", lambda: halt(torch.zeros(64, 16), torch.randn(64, 16)))

# All rows but one end at once, so that the first thread may have nothing to do but to wait for the second.
lone = torch.zeros(64, 16, dtype=torch.float64)
lone[-1] = 1e4
descend = ac.EnergyDescent(ENERGIES["quadratic"].double(), step_size=1e-9, max_steps=10**9, tol=1e-12)
with torch.no_grad():
    interrupted("lone", lambda: descend(lone))

# A handler that returns lets the descent go on.
handled = []
def handle(*arguments):
    handled.append(1)
    if len(handled) == 2:
        signal.default_int_handler(*arguments)
signal.signal(signal.SIGINT, handle)
with torch.no_grad():
    interrupted("handled", lambda: descend(lone), times=2)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_stops_a_kernel_within_a_second(threads):
    command = [sys.executable, "-c", INTERRUPTED, str(threads)]
    child = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=child, cwd=OUTSIDE)
    expected = []
    for kind in ("network", "deep", "hopfield", "quadratic"):
        expected += [f"{kind}{which} interrupted in time after 1" for which in ("", " backward")] + [
            "goes on True"
        ]
    expected += ["recurrence interrupted in time after 1"]
    expected += ["lone interrupted in time after 1", "handled interrupted in time after 2"]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr
    assert done.returncode == 0
