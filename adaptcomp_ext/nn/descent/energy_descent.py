"""`EnergyDescent`: gradient descent on an energy, row by row, until each row has converged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn import _in_graph as in_graph
from adaptcomp_ext.nn._in_graph import InGraph
from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn._ownership import foreign_parameters, warn
from adaptcomp_ext.nn._scripting import refuse_scripting
from adaptcomp_ext.nn._tree import check_alike, check_tree
from adaptcomp_ext.nn.descent.energies import ClosedFormEnergy
from adaptcomp_ext.nn.descent.fused import run_fused
from adaptcomp_ext.nn.descent.in_graph import known_of
from adaptcomp_ext.nn.descent.loop import descend as run_loop
from adaptcomp_ext.nn.descent.modes import run_kernels, run_reference
from adaptcomp_ext.nn.descent.problem import Ended, Problem, check_mixing
from adaptcomp_ext.nn.descent.settings import (
    Settings,
    check_settings,
    check_step_size,
    on_device,
    outside_inference,
)
from adaptcomp_ext.nn.result import EnergyResult, Trace
from adaptcomp_ext.ops._backend import capturing, contiguous, on_cuda, on_reference
from adaptcomp_ext.ops._checks import check_floating, check_int, describe
from adaptcomp_ext.ops._plain import check_memory, plain, resolved
from adaptcomp_ext.ops._transforms import apart, enter

_WAY = "Pass a module as energy: the one that holds them, or a small nn.Module whose forward calls it."


class EnergyDescent(InGraph):
    """Descend an energy from a starting point, row by row. A row leaves the batch once it has converged.

    From y₀ with m = 0 and s = 1, each step is

        m ← μ m + clip(∇E(y)),   p = clamp(y + σ η − α s m),

    and p becomes y unless the row rejects it; then y stays, m becomes 0, and s is multiplied by
    `backtracking`.

    Parameters
    ----------
    energy : callable or nn.Module
        ``energy(y, *context) -> [n]``: the energy of each row, which depends on that row alone. The backward
        pass evaluates it again: see "The energy of the call" below.
    step_size : float or Tensor
        α > 0: a number, or a tensor without dimensions or [B], for instance a Parameter. Differentiable. A
        tensor that is not a Parameter does not move with the module.
    max_steps : int
        M, the largest number of steps, at least 1. Steps that no row takes cost nothing. This and all
        following settings may be changed between calls, for instance to think longer at test time.
    tol : float
        The tolerance of `stop`. With 0 every row takes `max_steps` steps.
    stop : "energy" or "gradient"
        A row halts after an accepted step that changed its energy by at most `tol` ("energy"), or after a
        step to a point at which the norm of the gradient is at most `tol` ("gradient").
    accept : "always" or "if_lower"
        With "if_lower" a row rejects a point whose energy is higher than its own. Without noise and
        backtracking a rejected step that had no velocity ends its row, because the row would propose the same
        point for ever.
    noise : float or Tensor
        σ ≥ 0, the scale of the normal noise η: a number or a tensor without dimensions. Differentiable. η is
        a function of the seed, the sample id, the step and the element.
    momentum : float
        μ in [0, 1).
    clip : float, optional
        The largest norm of a row's gradient; a longer gradient is scaled down to it.
    clamp : pair of float, optional
        The bounds of every element of y after a step.
    gradient : str or tuple
        The derivative of ``result.y``:

        * ``"unrolled"``: through every step. Only the points are kept. The backward pass evaluates the energy
          once more for each step, and holds the graph of one step at a time.
        * ``("truncated", k)``: through the last k steps of each row, and to y₀ only where a row took fewer
          than k.
        * ``"stepwise"``: through each step on its own, from a point that carries no gradient. The graph of
          every step is kept, for a loss on each of the trace's outputs.
        * ``"implicit"``: the derivative of a minimum as a function of context and parameters, by conjugate
          gradients on the energy's second derivatives. There is none in y₀ and the step size.
        * ``"detached"``: none.

        ``result.energy`` is differentiable in every mode: in parameters and context, and through y where y is
        differentiable.
    keep_trace : bool
        Whether to keep the points after every step.
    backtracking : float, optional
        The factor, in (0, 1), by which a rejected step shortens the next one, with ``accept="if_lower"``.
    seed : int
        The seed of the noise.

    Warns
    -----
    UserWarning
        Once, at the first call that records a graph, if ``energy`` is a plain function that uses parameters
        which are not among `parameters()`, as `AdaptiveHalt` warns of those of a step. Not inside
        `reference_kernels`.

    Notes
    -----
    *Statuses.* HALTED: the stop rule held. MAX_STEPS: the row took `max_steps` steps. REJECTED: the row would
    propose a rejected point for ever (see `accept`). NONFINITE: a point or its energy was not finite; the row
    keeps its last finite point, or y₀ if there is none.

    *Row independence.* A row's result has the same bits alone, in any batch and in any order, as far as
    ``energy`` computes it so; matrix products of a BLAS may not. The first call with an energy raises if the
    energy visibly mixes rows.

    *The energy of the call.* The backward pass evaluates the energy in the state in which the call found it,
    whatever has changed since: parameters (those of `torch.func.functional_call`), buffers, attributes and
    modes of modules, variables of functions, entries of short lists and dicts. Hooks of tensors run once, on
    their whole gradient. A buffer or counter that the evaluations themselves change, as spectral
    normalisation does, has the value that it had at each evaluation. Dropout has its masks where all rows
    take the same number of steps. The backward pass raises RuntimeError where this is impossible: where a
    large tensor was overwritten, where a variable is out of reach, or where an energy changes itself and
    ``accept="if_lower"``. Changes out of reach that alter the energies by less than a thousandth, in float32,
    may pass unnoticed. While the backward pass evaluates an energy that has changed, or whose tensors have
    hooks, other threads must not use it.

    *Gradients* reach y₀, the context, the step size, the noise, and every leaf that the first evaluation of
    the energy reaches: parameters of a module, or tensors in a closure. All modes but "implicit" may be
    differentiated twice. Where an energy has no second derivatives, as in the y of a ReLU network, the
    gradient is zero.

    *On CUDA* the host does not wait for the device while rows descend, with two exceptions: "stepwise" waits
    at every step, and a trace waits once. The backward pass of "unrolled" waits a few times in all, that of
    "implicit" at every iteration. CUDA tensors of step sizes and noise are not checked to be positive.
    "truncated" keeps all points there.

    *In closed form.* `MLPEnergy`, `HopfieldEnergy` and `QuadraticEnergy` are descended in one kernel call and
    differentiated in another, in float32 or float64 throughout: half-precision points are rounded once, at
    the end, and autocast has no effect. The loop for other energies serves a subclass with a ``forward`` of
    its own, an energy with a hook, and rows that are too long for a CUDA block. For a gradient or a trace,
    memory for `max_steps` points of each row is reserved beforehand, whether or not the rows use it: address
    space on the CPU, memory on CUDA. Where that is more than 256 MiB the descent runs twice instead, first to
    find the number of steps, for which the host waits on CUDA. On the CPU Ctrl-C stops a kernel.

    *Not promised:* the energy of a row that was not finite at the start; that ``energy`` sees the rows in
    batch order.

    Examples
    --------
    >>> descend = ac.EnergyDescent(energy, step_size=0.1, max_steps=50, tol=1e-4)
    >>> result = descend(torch.zeros(64, 16), x)
    >>> loss = criterion(result.y, target)
    """

    __prepare_scriptable__ = refuse_scripting

    _walked: bool = False  # whether the graph of a plain function was searched for parameters

    def __init__(
        self,
        energy: Callable[..., Any],
        step_size: float | Tensor = 0.1,
        max_steps: int = 50,
        tol: float = 1e-4,
        stop: str = "energy",
        accept: str = "always",
        noise: float | Tensor = 0.0,
        momentum: float = 0.0,
        clip: float | None = None,
        clamp: tuple[float, float] | None = None,
        gradient: str | tuple[str, int] = "unrolled",
        keep_trace: bool = False,
        backtracking: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.energy = energy
        self.step_size = step_size
        self.max_steps = max_steps
        self.tol = tol
        self.stop = stop
        self.accept = accept
        self.noise = noise
        self.momentum = momentum
        self.clip = clip
        self.clamp = clamp
        self.gradient = gradient
        self.keep_trace = keep_trace
        self.backtracking = backtracking
        self.seed = seed
        self._seen: tuple[Any] | None = None  # the energy whose rows were found not to depend on each other
        self._settings()
        check_step_size("step_size", step_size, None)
        self._enroll()

    # The settings are checked at the first call after an assignment. The result is kept in a list that any
    # assignment replaces: a call in another thread that has checked the settings before writes to a list that
    # is no longer read.
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "_seen":
            self.__dict__["_checked"] = []

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__["_checked"] = []

    def _settings(self) -> Settings:
        """Return the settings, checked."""
        checked: list[Settings] = self.__dict__["_checked"]
        if checked:
            return checked[0]
        settings, lasting = check_settings(self)
        if lasting:
            checked.append(settings)
        return settings

    def forward(
        self,
        y0: Tensor,
        *context: Tensor,
        step_size: float | Tensor | None = None,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
    ) -> EnergyResult:
        """Descend from `y0` until every row has ended.

        Parameters
        ----------
        y0 : Tensor
            The starting points, [B, ...]; float32, float64, bfloat16 or float16. B = 0 works. In half
            precision the points are rounded at every step (not in closed form); step size, norms, velocities
            and energies are float32.
        *context : Tensor
            Per-row context for ``energy``, each [B, ...].
        step_size, seed : optional
            They replace the module's for this call.
        sample_ids : Tensor, optional
            int64 [B]: the key of each row's noise. Default: the row's position in the batch.

        Returns
        -------
        EnergyResult

        Raises
        ------
        TypeError, ValueError
            Before anything runs, if an argument is not as described; later, if ``energy`` does not return one
            differentiable number for each row.
        RuntimeError
            Under a transform or tracer of torch that is not supported: `torch.func`, forward mode, ``vmap``,
            ``jit.trace``, ``export``, ``make_fx``, FakeTensorMode. In the backward pass ("stepwise": at the
            call), if the energy was compiled by a backend of ``torch.compile`` other than "eager", because
            torch has no second derivative of it.
        """
        if torch.compiler.is_compiling():
            return self._run_in_graph(y0, context, step_size, seed, sample_ids)
        return self._run(y0, context, step_size, seed, sample_ids)

    def _run(
        self, y0: Any, context: tuple[Any, ...], step_size: Any, seed: int | None, sample_ids: Tensor | None
    ) -> EnergyResult:
        problem = self._problem(y0, context, step_size, seed, sample_ids)
        if on_reference():
            return run_reference(problem)
        energy, result = problem.energy, None
        if isinstance(energy, ClosedFormEnergy) and not energy.replaced:
            result = run_fused(problem, energy)
        return _handed_out(run_kernels(problem) if result is None else result)

    _run_apart = apart("EnergyDescent", _run)

    def _race(self, y0: Tensor, context: tuple[Tensor, ...], starts: int) -> Ended:
        """Descend without gradients; of every `starts` rows, the first to halt ends the others (`race`)."""
        problem = self._problem(y0, context, None, None, None)
        problem.keep_trace, problem.starts = False, starts
        if on_reference():
            return run_reference(problem)
        energy = problem.energy
        if isinstance(energy, ClosedFormEnergy) and not energy.replaced:
            # One kernel call takes each row to its own end.
            result = run_fused(problem, energy)
            if result is not None:
                return result
        return run_loop(problem, lambda *_: False)[0]

    # Dynamo reads it, so that it has to stay simple.
    def _run_in_graph(
        self, y0: Any, context: tuple[Any, ...], step_size: Any, seed: int | None, sample_ids: Tensor | None
    ) -> EnergyResult:
        found = None
        if seed is None:
            options = {"step_size": step_size, "sample_ids": sample_ids}
            found = in_graph.run(self, (y0, *context), options, known_of, (self.keep_trace,))
        if found is None:
            apart_result: EnergyResult = self._run_apart(y0, context, step_size, seed, sample_ids)
            return apart_result
        (y, energy, steps, status), trace = found[1][:4], found[1][4:]
        return EnergyResult(y, energy, steps, status, Trace(*trace) if found[0][2] else None)

    def _graph_results(self, result: EnergyResult) -> list[Tensor]:
        trace = [t for t in result.trace or () if t is not None]
        return [result.y, result.energy, result.steps, result.status, *trace]

    def _problem(self, y0: Any, context: Any, step_size: Any, seed: int | None, sample_ids: Any) -> Problem:
        given = (y0, *context, self.step_size if step_size is None else step_size, self.noise)
        watch = enter("EnergyDescent", given, reference=())
        settings = self._settings()
        rule = settings.rule if seed is None else settings.rule._replace(seed=check_int("seed", seed, 0))
        batch = _C.ordinary_rows(y0)
        if batch < 0:
            y0 = _checked_start(y0)
            batch = y0.shape[0]
        if y0.is_inference():
            y0 = outside_inference(y0)
        plain_context = []
        for i, value in enumerate(context):
            if _C.ordinary_rows(value) != batch or not y0.is_cpu:
                value = _checked_context(value, i, y0)
            plain_context.append(outside_inference(value) if value.is_inference() else value)
        if step_size is None and settings.step_size is not None:
            size: float | Tensor = settings.step_size
        else:
            size = check_step_size("step_size", self.step_size if step_size is None else step_size, y0)
        if sample_ids is not None:
            if not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64 or sample_ids.ndim != 1:
                raise TypeError(f"sample_ids: expected int64 of shape [B], got {describe(sample_ids)}")
            check_memory("sample_ids", plain("sample_ids", sample_ids))
            sample_ids = contiguous("sample_ids", sample_ids)
            if rule.noisy and torch.is_grad_enabled():
                sample_ids = sample_ids.clone()  # the backward pass draws the noise again
            check_alike("sample_ids", [sample_ids], batch, y0.device)
        return Problem(
            energy=self.energy,
            y0=y0,
            context=plain_context,
            step_size=size,
            sigma=on_device("noise", self.noise, y0) if settings.noise is None else settings.noise,
            rule=rule,
            gradient=settings.gradient,
            last=settings.last,
            keep_trace=self.keep_trace,
            sample_ids=sample_ids,
            check_first=partial(self._check_first, torch.is_grad_enabled()),
            watch=watch,
        )

    def _check_first(self, recording: bool, value: Tensor, point: Tensor, context: Sequence[Tensor]) -> None:
        """Check once for each energy that it does not mix rows, and that its parameters are held here."""
        energy = self.energy
        if (
            (self._seen is None or self._seen[0] is not energy)
            and value.shape[0] > 1
            and not (on_cuda(value.device) and capturing())
        ):
            check_mixing(value, point)
            self._seen = (energy,)
        if recording and not self._walked and not isinstance(energy, nn.Module):
            self.__dict__["_walked"] = True
            names = foreign_parameters("energy", energy, [value], [point, *context], self)
            if names:
                warn("EnergyDescent", "energy", names, _WAY)

    def extra_repr(self) -> str:
        """Show the name of a plain function, the numbers and the modes."""
        size = tuple(self.step_size.shape) if isinstance(self.step_size, Tensor) else self.step_size
        numbers = f"step_size={size}, max_steps={self.max_steps}, tol={self.tol}, stop={self.stop!r}"
        return f"{named(energy=self.energy)}{numbers}, gradient={self.gradient!r}"


def _checked_start(y0: Any) -> Tensor:
    """Require points, and return them as a plain tensor."""
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0: expected a Tensor, got {describe(y0)}")
    check_tree("y0", y0)
    return resolved("y0", check_floating("y0", y0))


def _checked_context(value: Any, i: int, y0: Tensor) -> Tensor:
    """Require context for points `y0`, and return it as a plain tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"context[{i}]: expected a Tensor, got {describe(value)}")
    (value,), _ = check_tree("context", value, i)
    check_alike("context", [value], y0.shape[0], y0.device, i)
    return resolved(f"context[{i}]", value)


def _handed_out(result: EnergyResult) -> EnergyResult:
    """Copy the integers that the backward pass reads: the caller may write to those of the result."""
    if not (result.y.requires_grad or result.energy.requires_grad):
        return result
    trace = result.trace
    if trace is not None:
        trace = trace._replace(row=trace.row.clone(), step=trace.step.clone())
    return result._replace(steps=result.steps.clone(), status=result.status.clone(), trace=trace)
