"""`AdaptiveHalt`: run a step on each row of a batch until the row halts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice, repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn import _batch_statistics
from adaptcomp_ext.nn._active import LAG, check_lag
from adaptcomp_ext.nn._block import Problem, check_weighable
from adaptcomp_ext.nn._fused import run_fused, serves
from adaptcomp_ext.nn._fusing import fused_decision
from adaptcomp_ext.nn._loop import run_loop
from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn._settings import Checked
from adaptcomp_ext.nn._tree import check_alike, check_batch, flatten, is_container
from adaptcomp_ext.nn.cost_model import count_weights
from adaptcomp_ext.nn.policy import Policy, Run
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops._backend import contiguous, on_reference
from adaptcomp_ext.ops._checks import check_choice, check_int, describe
from adaptcomp_ext.ops._plain import Kinds, is_dense
from adaptcomp_ext.ops._transforms import apart, enter
from adaptcomp_ext.ops.halting import MAX_LEAVES


def _check_step(step: Any) -> Any:
    if not (callable(step) or isinstance(step, nn.ModuleList)):
        raise TypeError(f"step: expected a callable, nn.Module or nn.ModuleList, got {describe(step)}")
    if isinstance(step, nn.ModuleList) and len(step) == 0:
        raise ValueError("step: expected a ModuleList with at least one layer, got an empty one")
    return step


def _check_policy(policy: Any) -> Policy:
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: expected an adaptcomp_ext.Policy, got {describe(policy)}")
    return policy


def _check_readout(readout: Any) -> Any:
    if readout is not None and not callable(readout):
        raise TypeError(f"readout: expected a callable or None, got {describe(readout)}")
    return readout


def _check_compact(compact: Any) -> bool | str:
    if not isinstance(compact, (bool, str)):  # 0 and 1 would pass for False and True, and then be neither
        raise TypeError(f'compact: expected True, False or "auto", got {describe(compact)}')
    result: bool | str = check_choice("compact", compact, (True, False, "auto"))
    return result


class AdaptiveHalt(Checked):
    """Run ``step`` on each row of a batch until a policy halts the row; halted rows leave the batch.

    Parameters
    ----------
    step : callable, nn.Module or nn.ModuleList
        ``step(state, *inputs) -> state``. The state keeps its structure, shapes and dtypes; a dictionary may
        come back with its keys in another order. A ModuleList gives step n its own layer (early exit) and
        ends with its last one.
    policy : Policy
        Decides which rows halt: `ACT`, `PonderNet`, `Confidence`, `Convergence`, `FixedSteps`, or a `Policy`
        of your own.
    max_steps : int
        M, at least 1. May be changed between calls (more thinking at test time).
    min_steps : int
        No row halts before this step.
    readout : callable, optional
        ``readout(state) -> Tensor`` [n, ...]: what the policy reads and the output is made of. Default: the
        state itself, or the first of its tensors.
    compact : bool or "auto"
        True: halted rows leave the block at once, and only active rows are ever passed to ``step``. False:
        they stay behind a mask. "auto": a cost model (`adaptcomp_ext.nn.cost_model`) lets a few halted rows
        stay for as long as moving the others would cost more; with gradients every halted row leaves at once.
    lag : int or None
        On CUDA, the size of a block is made from the number of active rows after the step that came `lag`
        steps before it; at least 1. With 2, the default, the host waits for the step before last while the
        device runs the last one, and the sizes of the blocks depend on the data alone. With None it never
        waits, and uses the newest number that has arrived: the sizes depend on the clock, and stay at B where
        the host is far ahead of a slow step; `torch.utils.checkpoint`, which compares sizes, may then refuse.
        Results are the same for every lag. May be changed between calls; unused on the CPU, where every
        number is known at once. See *CUDA* below.

    Notes
    -----
    *Row independence.* A row's result is bitwise the same alone, in any batch, in any order, and for any
    `compact`, as far as ``step``, ``readout`` and ``head`` compute it so. Matrix products of a BLAS may round
    a row differently in batches of other sizes; that is theirs, and it is all that differs.

    *Gradients* reach the step's and the policy's parameters, the initial state and the inputs, to any order;
    each row takes part in the backward pass up to its own last step. A row that ended ``NONFINITE`` keeps
    what it produced, in its output and state, and passes no gradient back; the parameters' gradients are
    still whatever the step's own backward makes of a zero there.

    *Masked classes.* −∞ is an ordinary value in the readout that ``readout`` gives (and in the tensor of the
    state that is this readout), in the state where `Confidence` reads it as logits, and in a halting logit,
    where it means that the row does not halt here. In a weighted output a class is masked that is masked in
    any step with a weight, and no gradient comes of it. A readout that is −∞ throughout has no distribution,
    and ends the row as NaN and +∞ do; so does −∞ with a negative weight. In the rest of the state −∞ comes of
    a step that diverges, and ends the row: ``readout=lambda state: state`` says that it is logits, and
    constant masks belong to the inputs, which are not tested.

    *Subclasses of torch.Tensor* without a ``__torch_dispatch__`` are rows like others: ``step``, ``readout``
    and ``head`` get blocks of the class that the state has or ``step`` returned, and of each input's, but
    without attributes of the object, which would not follow the rows. ``output`` and ``state`` have the
    classes of the first readout and of what the first step returned; all else in the result is plain.
    Subclasses with a ``__torch_dispatch__`` are refused, but for the result of an asynchronous collective,
    which is waited for.

    *Batch normalisation* in training mode takes its statistics over the rows in the block: with
    ``compact="auto"`` halted rows then stay in the block, as with False, and a warning says so; True is
    refused. Where such a layer is hidden in a plain function, give ``compact=False`` yourself.

    *Steps in place.* ``step`` may overwrite the state that it is given; at the first step that is the
    caller's own. With gradients, `ACT`, `PonderNet` and other policies with a weight or a cost refuse it by a
    RuntimeError, or torch does in the backward pass. Its inputs ``step`` must leave in their shapes and
    memory. Without a ``readout``, the result's ``output`` may share its memory with its ``state``.

    *Gradient checkpointing.* A run inside the forward pass of a ``torch.autograd.Function``, as of
    ``torch.utils.checkpoint(use_reentrant=True)``, has its rows in the same places as the run with gradients
    that will follow, so that dropout draws the same numbers.

    *CUDA.* Blocks have the sizes of a few buckets, and the host learns late which rows have halted. Until
    then ``step`` is called on them again, or on copies of active rows, and what it makes of them is
    discarded; with gradients always on copies, so that a step which diverges past a row's halt makes no
    gradient NaN. When no row is left, ``step`` may be called on rows of zeros before the host knows. With a
    `lag` of at most 2 these calls take no part in the gradient; with a longer one, with None and in a CUDA
    graph they have the gradient zero, for which the derivatives of ``step`` at zero have to be finite.

    *Not promised:* that ``step`` sees the rows in batch order, or that a row keeps its place; that dropout in
    ``step`` draws the same numbers for a row whatever surrounds it.

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
    }

    lag: int | None = LAG  # of modules that were pickled before there was a choice
    _searched: tuple[Any, Any, Any, int | None, list[Any]] | None = None  # what `_known` has found

    def __init__(
        self,
        step: Callable[..., Any],
        policy: Policy,
        max_steps: int = 16,
        min_steps: int = 1,
        readout: Callable[[Any], Tensor] | None = None,
        compact: bool | str = "auto",
        lag: int | None = LAG,
    ) -> None:
        super().__init__()
        self.step = step
        self.policy = policy
        self.max_steps = max_steps
        self.min_steps = min_steps
        self.readout = readout
        self.compact = compact
        self.lag = lag
        self._bounds(step)

    def _bounds(self, step: Any) -> tuple[int, int]:
        min_steps, max_steps = self.min_steps, self.max_steps
        if not (
            type(max_steps) is int and type(min_steps) is int and 0 < min_steps <= max_steps < 2**63
        ):  # never, usually
            max_steps, min_steps = check_int("max_steps", max_steps, 1), check_int("min_steps", min_steps, 1)
        if isinstance(step, nn.ModuleList):
            max_steps = min(max_steps, len(step))
        if min_steps > max_steps:
            raise ValueError(f"min_steps: expected at most max_steps = {max_steps}, got {min_steps}")
        return min_steps, max_steps

    def _known(self, step: Any, policy: Policy, readout: Any) -> tuple[int | None, bool | str]:
        """The step's number of weights, and whether to compact: `compact` itself, but where there is batch normalisation."""
        # Walking through a large module takes longer than a small step: once for what is set.
        known = self._searched
        if known is None or known[0] is not step or known[1] is not policy or known[2] is not readout:
            found = _batch_statistics.find(step, policy, readout)
            known = self._searched = (step, policy, readout, count_weights(step), found)
        compact = _batch_statistics.settle(known[4], self.compact) if known[4] else self.compact
        return (known[3] if compact == "auto" else None), compact

    def forward(self, state: Any, *inputs: Any, sample_ids: Tensor | None = None) -> HaltResult:
        """Run every row until it halts, fails to be finite, or has done `max_steps`.

        Parameters
        ----------
        state : Tensor or pytree of Tensors
            Each [B, ...]. B = 0 works.
        *inputs : Tensor or pytree of Tensors
            Per-row context for ``step``, each [B, ...]; loses its halted rows together with the state. None,
            alone or in a pytree (an optional mask, say), is handed to ``step`` as it is.
        sample_ids : Tensor, optional
            int64 [B]: the key of each row's random numbers, for policies that draw them. Default: its
            position in the batch.

        Returns
        -------
        HaltResult

        Raises
        ------
        TypeError, ValueError
            Before anything runs, if an argument is not as described; after the first step, if ``step``
            changes the structure, shapes or dtypes of the state, or a head or readout returns something else
            than described.
        """
        if torch.compiler.is_compiling():
            # A compiled model is split here: in a graph there are no addresses for kernels, and no rows that
            # come and go.
            return self._run_apart(state, inputs, sample_ids)
        return self._run(state, inputs, sample_ids)

    def _run(self, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None) -> HaltResult:
        problem = self._problem(state, inputs, sample_ids)
        policy = problem.policy
        fused = None if policy.traced or on_reference() else fused_decision(policy, problem.run)
        if fused is not None and fused.head is not None and problem.watch is not None:
            fused = fused._replace(head=problem.watch.wrap("head", fused.head))
        try:
            if fused is not None and serves(problem, fused):
                return run_fused(problem, fused)
            return run_loop(problem, fused)
        except ValueError as error:
            explained = _batch_statistics.explain(error)
            if explained is error or problem.compact is False:
                raise
            raise explained from error

    _run_apart = apart("AdaptiveHalt", _run)

    def _problem(self, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None) -> Problem:
        step = self.step
        policy: Any = self._modules["policy"]  # its look-up as an attribute would take its time
        min_steps, max_steps = self._bounds(step)
        watch = enter("AdaptiveHalt", (state, inputs))
        leaves, structure = flatten(state)
        input_leaves: list[Tensor] = []
        structures = []
        has_containers = has_nothing = False
        for value in inputs:
            some, how = flatten(value)
            input_leaves += some
            structures.append(how)
            has_containers = has_containers or is_container(how)
            has_nothing = has_nothing or not some
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
        weights, compact = self._known(step, policy, readout)
        scalar = torch.float64 if torch.float64 in [t.dtype for t in leaves] else torch.float32
        steps: Iterable[Callable[..., Any]] = repeat(step, max_steps)
        if isinstance(step, nn.ModuleList):
            steps = islice(step, max_steps)
        if watch is not None:
            wrap = watch.wrap
            steps = (wrap("step", layer) for layer in steps)
            readout = readout if readout is None else watch.wrap("readout", readout)
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
            as_in_training=torch.is_grad_enabled() or _is_in_a_function(),
            lag=self.lag,
        )

    def extra_repr(self) -> str:
        """The names of plain functions, the bounds and the modes."""
        functions = named(step=self.step, readout=self.readout)
        return f"{functions}max_steps={self.max_steps}, min_steps={self.min_steps}, compact={self.compact!r}, lag={self.lag}"


_is_forward_mode_enabled = getattr(torch._C, "_is_fwd_grad_enabled", lambda: True)


def _is_in_a_function() -> bool:
    """Whether this is the forward pass of a ``torch.autograd.Function``, as of a reentrant checkpoint.

    It runs without gradients, and its backward pass may run the same again with them. Random numbers of a
    step are drawn for places in a block: it then has to hold the same rows in the same places. Torch switches
    forward mode off there, and elsewhere only in inference mode.
    """
    return not (_is_forward_mode_enabled() or torch.is_inference_mode_enabled())
