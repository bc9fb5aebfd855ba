"""`AdaptiveHalt`: run a step on each row of a batch until the row halts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn import _in_graph as in_graph
from adaptcomp_ext.nn._active import LAG, check_lag
from adaptcomp_ext.nn._in_graph import InGraph
from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn._refused_cells import refuse_cell, refuse_cell_as_step
from adaptcomp_ext.nn._settings import Checked
from adaptcomp_ext.nn._tree import check_alike, check_batch, flatten, is_container
from adaptcomp_ext.nn.halting import (
    batch_statistics,
    equilibrium,
    exported,
    known_loop,
    known_run,
    rows_apart,
)
from adaptcomp_ext.nn.halting.block import Problem, check_weighable
from adaptcomp_ext.nn.halting.calling import alternatives, bind
from adaptcomp_ext.nn.halting.cost_model import DEFAULT, count_weights, flops_per_row
from adaptcomp_ext.nn.halting.fused import FusedRun, serves
from adaptcomp_ext.nn.halting.fusing import fused_decision
from adaptcomp_ext.nn.halting.in_graph import known_of, result_of, results_of
from adaptcomp_ext.nn.halting.known import Known, learn
from adaptcomp_ext.nn.halting.known_run import KnownRun
from adaptcomp_ext.nn.halting.loop import run_loop
from adaptcomp_ext.nn.halting.plan import RunPlan
from adaptcomp_ext.nn.halting.policy import Policy, Run, heads_of
from adaptcomp_ext.nn.halting.recurrence import KINDS, NotServed, find
from adaptcomp_ext.nn.halting.together import Together, check_process_group
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops._backend import contiguous, on_reference
from adaptcomp_ext.ops._checks import check_choice, check_int, describe
from adaptcomp_ext.ops._plain import Kinds, exporting, is_dense
from adaptcomp_ext.ops._transforms import apart, enter, is_in_a_function
from adaptcomp_ext.ops.halting import MAX_LEAVES


def _check_step(step: Any) -> Any:
    if not (callable(step) or isinstance(step, nn.ModuleList)):
        raise TypeError(f"step: expected a callable, nn.Module or nn.ModuleList, got {describe(step)}")
    if isinstance(step, nn.ModuleList) and len(step) == 0:
        raise ValueError("step: expected a ModuleList with at least one layer, got an empty one")
    for layer in step if isinstance(step, nn.ModuleList) else (step,):
        refuse_cell_as_step(layer)
    return step


def _check_policy(policy: Any) -> Policy:
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: expected an adaptcomp_ext.Policy, got {describe(policy)}")
    return policy


def _check_readout(readout: Any) -> Any:
    if readout is not None and not callable(readout):
        raise TypeError(f"readout: expected a callable or None, got {describe(readout)}")
    for each in alternatives("readout", readout):
        refuse_cell("readout", "readout(state)", "one Tensor", each)
    return readout


def _check_compact(compact: Any) -> bool | str:
    if not isinstance(compact, (bool, str)):  # 0 and 1 equal False and True, but are not them
        raise TypeError(f'compact: expected True, False or "auto", got {describe(compact)}')
    result: bool | str = check_choice("compact", compact, (True, False, "auto"))
    return result


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return value


class AdaptiveHalt(InGraph, Checked):
    """Run ``step`` on each row of a batch until a policy halts the row; halted rows leave the batch.

    Parameters
    ----------
    step : callable, nn.Module or nn.ModuleList
        ``step(state, *inputs) -> state``. The state keeps its structure, shapes and dtypes; a dictionary may
        be returned with its keys in another order. torch's own recurrent cells take the input first and are
        refused: `adaptcomp_ext.cells` has them with the state first. A ModuleList gives step n its own layer
        (early exit), bounds `max_steps` by its length, and may change the state's shapes from stage to stage:
        see *Stages* below. A step with a parameter ``n`` gets the step's number, counted from 1.
    policy : Policy
        Decides which rows halt: `ACT`, `PonderNet`, `Confidence`, `Convergence`, `StablePrediction`, `QHalt`,
        `Bernoulli`, `FixedSteps`, a combination by `AnyOf` or `AllOf`, or a custom `Policy`.
    max_steps : int
        Upper bound on a row's number of steps, at least 1. It may be changed between calls, for more steps at
        test time.
    min_steps : int
        Lower bound on a row's number of steps.
    readout : callable, nn.Module or nn.ModuleList, optional
        ``readout(state) -> Tensor`` [n, ...]: the tensor that the policy reads, and of which the output is
        made. Default: the state itself, or the first of its tensors. A ModuleList has a readout for each
        step, and so may the policy's head be one.
    compact : bool or "auto"
        True: halted rows leave the block at once, and ``step`` gets only active rows. False: they stay and
        are masked. "auto": halted rows stay while moving the active ones would cost more, by a cost model
        (`adaptcomp_ext.nn.halting.cost_model`); with gradients they leave at once.
    lag : int or None
        On CUDA, the size of a block follows from the number of active rows `lag` steps before, at least 1.
        With 2, the default, the host waits for the step before last while the device runs the last one, and
        block sizes depend on the data alone. With None the host never waits, and uses the newest number that
        has arrived: block sizes depend on the clock, and stay at B if the host is far ahead of a slow step;
        `torch.utils.checkpoint`, which compares sizes, may then raise. Results are the same for every lag. It
        may be changed between calls, and is not used on the CPU. See *CUDA* below.
    check_rows : bool
        Whether the first call refuses a step, readout or head that computes a row from other rows. With
        ``compact=False`` rows may see each other, and nothing is checked. See *Rows that stay apart* below.
    keep_trace : bool
        Whether ``trace`` of the result has the readouts of all steps of all rows, with any policy, as for a
        loss at every exit. Their ``weights`` are None, except for PonderNet in training mode.
    compile_step : bool
        Whether ``step`` runs compiled by `torch.compile`: in three graphs at most for each mode and dtype,
        one for the first number of rows, one for any number, one for a single row. A whole run in one kernel
        call does not call it. It has no second derivatives.
    process_group : torch.distributed.ProcessGroup, optional
        The processes that step together: a process whose rows have all halted calls ``step``, readout and
        head with blocks of no rows until the rows of all processes have, forward and backward. For a step
        that communicates, as one under `torch.distributed.fsdp.fully_shard`, which gathers its parameters.
        It costs a reduction of one number at each step. `max_steps` has to be the same for all. A pickle
        does not have it. `torch.nn.parallel.DistributedDataParallel` needs none.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; an attribute that is assigned later, at the latest at the call.

    Warns
    -----
    UserWarning
        Once, at the first step with a graph, if ``step``, ``readout`` or the policy's ``head`` is a plain
        function that uses parameters (without ``requires_grad=False``) which are not among `parameters()`:
        an optimiser made from the module leaves them as they are. Parameters that only state and inputs
        depend on are not meant. Nor are those of a module that the function can see and that also contains
        this one, as ``self`` in ``lambda state: self.cell(state)``: that module holds both. One that the
        function cannot see, because it reads the cell alone, does not silence the warning.

    Notes
    -----
    *Row independence.* A row's result is bitwise the same alone, in any batch, in any order, and for any
    `compact`, provided that ``step``, ``readout`` and ``head`` are row-independent. A BLAS may round a row
    differently in batches of other sizes.

    *Gradients* reach the parameters of step and policy, the initial state and the inputs, to any order; each
    row takes part in the backward pass up to its own last step. A row that ended ``NONFINITE`` keeps its
    values in output and state, and passes no gradient back: the backward pass of ``step`` gets zeros there.
    `Convergence` can also differentiate its rows as fixed points.

    *Whole runs.* A cell of `adaptcomp_ext.cells` with one of the policies of this package, and
    `torch.nn.Linear` as head and readout, runs in one kernel call, and its backward pass in another; `plan`
    tells. The cell's ``forward`` is then not called. A row has the same bits in any batch, products included,
    and so has its gradient in state and inputs. On the CPU the states after each step are kept for the
    backward pass, out of sight of hooks of saved tensors, so that under such hooks, as in a checkpoint that
    is not reentrant, runs go through the loop. So do modules with hooks, subclasses and modes of torch. On
    CUDA no state is kept: the backward pass repeats each row's steps. PonderNet in training, and rows too
    large for the device, go through the loop there.

    *Stages.* ``step``, ``readout`` and ``head`` may be ModuleLists with one module for each step. A function
    with a parameter ``n`` gets the number of the step: ``step(state, *inputs, n=...)``. ``readout`` and
    ``head`` get the inputs, too, if they have further parameters without a default, or ``*inputs``:
    ``readout(state, *inputs, n=...)``. An ``n`` that `functools.partial` has bound, and one that an input
    already fills, is left alone. Only a step that is a ModuleList may change the shapes of the state;
    structure, dtypes and number of rows are kept. If shapes change after the first step, a `readout` is
    required, whose result has one shape at all stages, and ``state`` of the result is a list: its element
    n - 1 has the states of the rows that ended at step n, in batch order. Then the host waits for the device
    at the end of a run.

    *Masked classes.* −∞ is valid in the result of ``readout`` (and in the tensor of the state that is this
    result), in the state if `Confidence` reads it as logits, and in a halting logit, where it means that the
    row does not halt. In a weighted output a class is masked if it is masked in any step with a weight, and
    has no gradient there. A readout of −∞ only, or −∞ with a negative weight, ends the row as NaN and +∞ do.
    In the rest of the state −∞ is taken for divergence, and ends the row: declare logits by
    ``readout=lambda state: state``, and pass constant masks as inputs, which are not tested.

    *Subclasses of torch.Tensor* without a ``__torch_dispatch__`` are treated as plain rows. ``step``,
    ``readout`` and ``head`` get blocks in the classes of state and inputs, but without the objects'
    attributes. ``output`` and ``state`` have the classes of the first readout and of the first step's result;
    all other results are plain. Subclasses with a ``__torch_dispatch__`` raise TypeError, except for the
    result of an asynchronous collective, which is waited for.

    *Rows that stay apart.* With `check_rows`, the first call with at least two rows calls ``step``,
    ``readout`` and ``head`` once more on copies of up to four rows, and again for each combination of step,
    mode and dtype: that of the state's first tensor. One row's result is differentiated. ValueError names
    the submodule through which it depends on another row, where one can be found. Each stage of a ModuleList
    is checked at the first call. What the calls change is put back: random states, buffers, attributes,
    variables, short lists and dictionaries. Hooks do not run. The check waits for the next call while torch
    compiles, exports, traces, transforms, counts or captures, or if a lazy module has no parameters yet. On
    CUDA the host waits for it. It leaves out what has no derivative, what communicates between processes,
    what reads an iterator, what raises on these rows, and a policy's own ``decide``. It cannot undo effects
    outside of Python and torch: set ``check_rows=False`` for a step that has them.

    *Batch normalisation* in training mode takes its statistics over the rows in the block. With `check_rows`
    it raises ValueError unless ``compact=False``. Without, ``compact="auto"`` keeps halted rows in the block,
    as False does, with a warning, and True raises ValueError; if such a layer is hidden in a plain function,
    set ``compact=False``.

    *Steps in place.* ``step`` may overwrite its state, which at the first step is the caller's. With
    gradients, policies with a weight or a cost, such as `ACT` and `PonderNet`, raise RuntimeError, or torch
    does in the backward pass. ``step`` must not change shape or memory of its inputs. Without a ``readout``,
    the result's ``output`` may share memory with its ``state``.

    *Gradient checkpointing.* A run inside the forward pass of a ``torch.autograd.Function``, as in
    ``torch.utils.checkpoint(use_reentrant=True)``, has its rows in the same places as the following run with
    gradients, so that dropout draws the same numbers.

    *CUDA.* Blocks have the sizes of a few buckets, and the host learns late which rows have halted. Until
    then ``step`` gets these rows again, or copies of active rows, and the results are discarded. With
    gradients it always gets copies, so that a step that diverges after a row's halt makes no gradient NaN.
    When no row is left, ``step`` may get rows of zeros before the host knows. With a `lag` of at most 2 these
    calls take no part in the gradient. With a longer lag, with None and in a CUDA graph their gradient is
    zero, which requires finite derivatives of ``step`` at zero.

    *Not promised:* that a step which mixes rows is found, where its derivatives are zero on the rows that
    were tried; that ``step`` gets the rows in batch order, or that a row keeps its place; that a row's
    dropout in ``step`` does not depend on the other rows.

    Examples
    --------
    >>> halt = ac.AdaptiveHalt(step=my_block, policy=ac.ACT(head), max_steps=16)
    >>> result = halt(state, x)
    >>> loss = criterion(result.output, y) + 0.01 * result.cost.mean()
    """

    _settings: ClassVar = {
        "step": _check_step,
        "policy": _check_policy,
        "readout": _check_readout,
        "compact": _check_compact,
        "lag": check_lag,
        "check_rows": partial(_check_bool, "check_rows"),
        "keep_trace": partial(_check_bool, "keep_trace"),
        "compile_step": partial(_check_bool, "compile_step"),
    }

    lag: int | None = LAG  # for modules that were pickled by older versions
    check_rows: bool = True
    keep_trace: bool = False
    compile_step: bool = False
    _together: Together | None = None
    _learned: Known | None = None  # cache of `_known`
    _known_run: KnownRun | None = None
    _warned: bool = False  # of parameters that it does not hold

    def __init__(
        self,
        step: Callable[..., Any],
        policy: Policy,
        max_steps: int = 16,
        min_steps: int = 1,
        readout: Callable[..., Tensor] | None = None,
        compact: bool | str = "auto",
        lag: int | None = LAG,
        check_rows: bool = True,
        keep_trace: bool = False,
        compile_step: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.step = step
        self.policy = policy
        self.max_steps = max_steps
        self.min_steps = min_steps
        self.readout = readout
        self.compact = compact
        self.lag = lag
        self.check_rows = check_rows
        self.keep_trace = keep_trace
        self.compile_step = compile_step
        self.process_group = process_group
        self._bounds(step)
        self._enroll()

    @property
    def process_group(self) -> Any:
        """The processes that step together, or None."""
        return None if self._together is None else self._together.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._together = check_process_group(group)

    def _bounds(self, step: Any) -> tuple[int, int]:
        min_steps, max_steps = self.min_steps, self.max_steps
        if not (
            type(max_steps) is int and type(min_steps) is int and 0 < min_steps <= max_steps < 2**63
        ):  # rarely
            max_steps, min_steps = check_int("max_steps", max_steps, 1), check_int("min_steps", min_steps, 1)
        if isinstance(step, nn.ModuleList):
            max_steps = min(max_steps, len(step))
        if min_steps > max_steps:
            raise ValueError(f"min_steps: expected at most max_steps = {max_steps}, got {min_steps}")
        return min_steps, max_steps

    def _known(self, step: Any, policy: Policy, readout: Any) -> Known:
        """Return what is known of the functions."""
        known = self._learned
        if (
            known is None
            or known.step is not step
            or known.policy is not policy
            or known.readout is not readout
        ):
            known = self._learned = learn(step, policy, readout)
            known.unwalked = known.unwalked and not self._warned
        return known

    def _called_step(self, known: Known) -> Any:
        """Return the step, or the stages, as a run calls them: compiled with `compile_step`."""
        return known.compiled.all(known.step) if self.compile_step else known.step

    def _searched(self, warned: bool) -> None:
        """Search no graph again; with `warned`, not even that of another function."""
        if self._learned is not None:
            self._learned.unwalked = False
        self._warned = self._warned or warned

    def _check_rows(
        self, known: Known, dtype: torch.dtype, device: torch.device, state: Any, inputs: tuple[Any, ...]
    ) -> None:
        """Check once for each combination of functions, modes and dtype that rows do not depend on rows."""
        combination = (dtype, self.training, known.moded is not None and known.moded.training)
        if combination not in known.apart:
            if not rows_apart.can_check(device):
                return
            if not rows_apart.check(known.step, known.readout, heads_of(known.policy), state, inputs):
                return
            known.apart.add(combination)
        known.dtype, known.training, known.mode = combination

    def forward(self, state: Any, *inputs: Any, sample_ids: Tensor | None = None) -> HaltResult:
        """Run every row until it halts, is not finite, or has taken `max_steps`.

        Parameters
        ----------
        state : Tensor or pytree of Tensors
            Each [B, ...]; B may be 0.
        *inputs : Tensor or pytree of Tensors
            Context of each row for ``step``, each [B, ...], compacted together with the state. None, alone or
            in a pytree (as an optional mask), is passed to ``step`` unchanged.
        sample_ids : Tensor, optional
            int64 [B]: the key of each row's random numbers, for policies that sample. Default: the row's
            place in the batch.

        Returns
        -------
        HaltResult

        Raises
        ------
        TypeError, ValueError
            Before the first step, if an argument is not as described, or if ``step``, ``readout`` or
            ``head`` mixes rows; after it, if ``step`` changes the structure, shapes or dtypes of the state,
            or a head or readout returns something else than described.
        RuntimeError
            If a transform of torch is active that the call cannot serve; the message names the way out.
        """
        if torch.compiler.is_compiling():
            if exporting() and not torch.compiler.is_dynamo_compiling():
                return exported.run(self, state, inputs, sample_ids)
            return self._run_in_graph(state, inputs, sample_ids)
        if sample_ids is None and not equilibrium.is_wanted(self._modules["policy"]):
            result = None
            if self._known_run is not None:
                result = self._known_run.run(self, state, inputs)
            elif self._learned is not None:
                loop = self._learned.loops.get(torch.is_grad_enabled())
                if loop is not None:
                    result = loop.run(self, self._learned, state, inputs)
            if result is not None:
                return result
        return self._run(state, inputs, sample_ids)

    def _run(self, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None) -> HaltResult:
        problem = self._problem(state, inputs, sample_ids)
        policy = problem.policy
        if equilibrium.is_wanted(policy):
            return equilibrium.run(self, problem, lambda: self._run(state, inputs, sample_ids))
        fused = None if policy.traced or on_reference() else fused_decision(policy, problem.run)
        step = self._modules.get("step")  # None where it is a plain function
        if type(step) in KINDS and not on_reference():
            try:
                whole = find(problem, fused, step)
            except NotServed:
                pass
            else:
                result = whole.run()
                self._known_run = known_run.remember(self, whole)
                return result
        known = self._known(self.step, policy, self.readout)
        fused = bind(problem, known, fused)
        try:
            if fused is None or not serves(problem, fused):
                return run_loop(problem, fused)
            run = FusedRun(problem, fused)
            result = run.run()
            known.loops[run.training] = known_loop.remember(self, known, run)
            return result
        except ValueError as error:
            batch_statistics.explain(error, problem.compact)
            raise

    _run_apart = apart("AdaptiveHalt", _run)

    # Dynamo reads it, so that it has to stay simple.
    def _run_in_graph(self, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None) -> HaltResult:
        settings = (self.keep_trace, self.policy.training, self.readout is None)
        found = in_graph.run(self, (state, *inputs), {"sample_ids": sample_ids}, known_of, settings)
        if found is None:
            return self._run_apart(state, inputs, sample_ids)
        return result_of(found[0], found[1], state)

    def _graph_results(self, result: HaltResult) -> list[Tensor]:
        return results_of(result)

    def plan(self, state: Any, *inputs: Any, sample_ids: Tensor | None = None) -> RunPlan:
        """Tell which way ``halt(state, *inputs)`` would take now, and why; it runs nothing.

        The answer depends on the modes of this moment, such as `torch.no_grad`.

        Parameters
        ----------
        state, *inputs, sample_ids
            As of a call.

        Returns
        -------
        RunPlan
            ``way``, ``why`` and ``microseconds``. It prints as one line.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If the call would raise before its first step.
        """
        problem = self._problem(state, inputs, sample_ids, probe=False)
        if equilibrium.is_wanted(problem.policy):
            equilibrium.check(problem, self)
            with torch.no_grad():  # as the steps of such a run are taken
                return self.plan(state, *inputs, sample_ids=sample_ids)
        weights = count_weights(self.step)
        price = problem.run.batch * flops_per_row(weights, problem.state[0]) * DEFAULT.per_flop
        if on_reference():
            return RunPlan("reference", "reference_kernels is active", price)
        policy = problem.policy
        fused = None if policy.traced else fused_decision(policy, problem.run)
        try:
            find(problem, fused, self.step)
        except NotServed as reason:
            return RunPlan("python" if fused is None else "loop", str(reason), price)
        return RunPlan("kernel", "cell, policy, head and readout are those of the kernel", price)

    def _problem(
        self, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None, probe: bool = True
    ) -> Problem:
        step = self.step
        policy: Any = self._modules["policy"]  # faster than the look-up as an attribute
        min_steps, max_steps = self._bounds(step)
        watch = enter("AdaptiveHalt", (state, inputs))
        leaves, structure = flatten(state)
        input_leaves: list[Tensor] = []
        structures = []
        has_containers = has_nothing = False
        for value in inputs:
            own_leaves, treedef = flatten(value)
            input_leaves += own_leaves
            structures.append(treedef)
            has_containers = has_containers or is_container(treedef)
            has_nothing = has_nothing or not own_leaves
        kinds: Kinds = None
        input_kinds: Kinds = None
        ordinary = not has_nothing and _C.are_ordinary_rows(leaves, input_leaves)
        if not ordinary:
            kinds, input_kinds = check_batch(state, leaves, structure, inputs, input_leaves, structures)
        if len(leaves) > MAX_LEAVES:
            raise ValueError(f"state: expected at most {MAX_LEAVES} tensors, got {len(leaves)}")
        batch, device = leaves[0].shape[0], leaves[0].device
        if sample_ids is not None:
            if (
                not isinstance(sample_ids, Tensor)
                or sample_ids.dtype != torch.int64
                or sample_ids.ndim != 1
                or not is_dense(sample_ids)
            ):
                raise TypeError(f"sample_ids: expected int64 of shape [B], got {describe(sample_ids)}")
            sample_ids = contiguous("sample_ids", sample_ids)
            check_alike("sample_ids", [sample_ids], batch, device)
        readout = self.readout
        if readout is None:
            check_weighable(policy, leaves[0])
        known = self._known(step, policy, readout)
        compact = self.compact
        dtypes = [t.dtype for t in leaves]
        weights = known.weights if compact == "auto" else None
        if known.norms:  # they may change `compact`
            compact = batch_statistics.settle(known.norms, compact, self.check_rows, self)
        if (
            probe
            and batch > 1
            and compact is not False
            and (
                dtypes[0] is not known.dtype
                or self.training is not known.training
                or (known.moded is not None and known.moded.training is not known.mode)
            )
            and watch is None
            and self.check_rows
        ):
            self._check_rows(known, dtypes[0], device, state, inputs)
        scalar = torch.float64 if torch.float64 in dtypes else torch.float32
        called = self._called_step(known)
        steps: Iterable[Callable[..., Any]] = repeat(called, max_steps)
        if isinstance(step, nn.ModuleList):
            steps = islice(called, max_steps)
        if watch is not None:
            wrap = watch.wrap
            steps = (wrap("step", layer) for layer in steps)
        return Problem(
            run=Run(batch, device, min_steps, max_steps, sample_ids, scalar),
            policy=policy,
            steps=steps,
            readout=readout,
            state=leaves,
            structure=structure,
            kinds=kinds,
            inputs=input_leaves,
            input_kinds=input_kinds,
            input_structures=structures,
            has_containers=has_containers,
            ordinary=ordinary,
            compact=compact,
            weights=weights,
            watch=watch,
            as_in_training=torch.is_grad_enabled() or is_in_a_function(),
            lag=self.lag,
            holder=self if known.unwalked and torch.is_grad_enabled() else None,
            staged=isinstance(step, nn.ModuleList),
            keep_trace=self.keep_trace,
            together=self._together,
        )

    def extra_repr(self) -> str:
        """Return the names of plain functions, the bounds and the modes."""
        functions = named(step=self.step, readout=self.readout)
        modes = f"compact={self.compact!r}, lag={self.lag}"
        if not self.check_rows:
            modes += ", check_rows=False"
        if self.keep_trace:
            modes += ", keep_trace=True"
        if self.compile_step:
            modes += ", compile_step=True"
        return f"{functions}max_steps={self.max_steps}, min_steps={self.min_steps}, {modes}"
