"""The base class of halting policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._naming import name_of
from adaptcomp_ext.nn._refused_cells import refuse_cell
from adaptcomp_ext.nn._settings import Checked
from adaptcomp_ext.nn._tree import flatten, is_container
from adaptcomp_ext.nn.halting.calling import alternatives, call_at
from adaptcomp_ext.ops._backend import DTYPE_CODES
from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops._fields import documented
from adaptcomp_ext.ops._plain import check_memory, is_dense, kinds_of, plain
from adaptcomp_ext.ops.halting import Fused


@documented
class Run(NamedTuple):
    """The constants of a run.

    Attributes
    ----------
    batch : int
        B, the number of rows.
    device : torch.device
        The device of all tensors of the run.
    min_steps : int
        No row halts before this step.
    max_steps : int
        Every row ends at this step at the latest.
    sample_ids : Tensor or None
        int64 [B]: the key of each row's random numbers; None: its place in the batch.
    scalar : torch.dtype
        The dtype of weights, costs and log-probabilities: float32, or float64 in a float64 model.
    """

    batch: int
    device: torch.device
    min_steps: int
    max_steps: int
    sample_ids: Tensor | None
    scalar: torch.dtype


@dataclass(slots=True)
class View:
    """The block of n rows that a policy decides about after a step; rows whose ``row`` is -1 are padding.

    Attributes
    ----------
    run : Run
        The constants of the run.
    step : int or Tensor
        The number of the step, counted from 1. In a `ContinuousBatcher` the rows of a block have begun at
        different times: int64 [n], each row's own.
    state : pytree of Tensor
        [n, ...] each: the state after the step.
    previous : pytree of Tensor
        [n, ...] each: the state of the same rows before the step. A step that overwrites its own output
        overwrites it too.
    readout : Tensor
        [n, ...]: the readout after the step.
    row : Tensor
        int64 [n]: the batch row of each row of the block, counted from 0; -1 for padding.
    carry : tuple of Tensor
        [n, ...] each: the carry of the policy's last decision, or of `Policy.begin`.
    inputs : tuple of pytrees of Tensor
        [n, ...] each: the inputs of the same rows.
    """

    run: Run
    step: Any
    state: Any
    previous: Any
    readout: Tensor
    row: Tensor
    carry: tuple[Tensor, ...]
    inputs: tuple[Any, ...] = ()


@documented
class Decision(NamedTuple):
    """A policy's decision for each row of the block; weight, cost, log_prob and carry are differentiable.

    Attributes
    ----------
    halt : Tensor
        bool [n]: whether the row halts. It is used from `min_steps` on; at `max_steps` every row ends.
    weight : Tensor or None
        [n], for weighted policies: the weight of this step's readout in the output.
    cost : Tensor or None
        [n]: added to the row's ponder cost. None at every step: the cost is the number of steps.
    log_prob : Tensor or None
        [n], in nats: added to the row's log-probability.
    carry : tuple of Tensor
        [n, ...] each: passed to the policy at the next step, for the active rows. Number and dtypes have to
        be the same at every step.
    logits : Tensor or None
        [n]: the logits of the decision. A row where they are NaN or +inf ends ``NONFINITE``.
    """

    halt: Tensor
    weight: Tensor | None = None
    cost: Tensor | None = None
    log_prob: Tensor | None = None
    carry: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


@documented
class Threshold(NamedTuple):
    """The setting of a policy that `calibrate` chooses, and the values that it tries.

    Attributes
    ----------
    name : str
        The name of the attribute.
    candidates : tuple of float
        The values to try, from the most careful one, with the most steps, to the cheapest. They must not
        depend on data.
    """

    name: str
    candidates: tuple[float, ...]


FRACTIONS = (1.0, *(1 / (1 + math.exp(-k / 2)) for k in range(28, -9, -1)))
"""Candidates for a threshold on a probability: 1, then log-odds from 14 down to −4 in steps of a half."""


def check_lookahead(lookahead: Any) -> int:
    """Require 0 or 1."""
    if check_int("lookahead", lookahead, 0) > 1:
        raise ValueError(f"lookahead: expected 0 or 1, got {lookahead}")
    return int(lookahead)


def no_lookahead(name: str, lookahead: Any) -> int:
    """Require 0, of a policy that weights or keeps all steps."""
    if check_lookahead(lookahead):
        raise ValueError(
            f"lookahead: expected 0 for {name}, which weights the readouts of a row's steps, got {lookahead}"
        )
    return 0


class Policy(Checked):
    """Base class of halting policies, which decide after each step which rows halt.

    A subclass implements `decide`; `begin` and the properties have defaults. The policies of this package
    check their settings at every assignment.

    Examples
    --------
    A policy that halts a row whose state has stopped changing:

    >>> class Still(ac.Policy):
    ...     def decide(self, view):
    ...         return ac.Decision(halt=(view.state - view.previous).norm(dim=1) < 1e-3)
    """

    calibrated: ClassVar[Threshold | None] = None
    """The threshold that `calibrate` and `compute_curve` choose unless told otherwise; None: it has none."""

    _settings: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"lookahead": check_lookahead}

    lookahead: int = 0
    """With 1, what `decide` says of a row at step n ends it after step n + 1, whose readout is its output.
    `decide` is called at step n + 1, too; of a row that ends there only cost and log-probability are used. A
    policy that is weighted or traced must have 0."""

    _written: dict[str, Any]
    """The attributes of the class statement: see `adaptcomp_ext.nn.halting.fusing`."""

    _decides_by_step = False
    """Whether `decide` takes the step as an int alone: a block of rows at different steps is then decided in
    parts, one for each step."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._written = dict(vars(cls))

    @property
    def weighted(self) -> bool:
        """Whether the output is the weighted sum of the readouts, not the readout at each row's last step."""
        return False

    @property
    def traced(self) -> bool:
        """Whether `HaltResult.trace` is filled."""
        return False

    @property
    def reads_logits(self) -> bool:
        """Whether the readout is class logits, so that −inf masks a class even where it is the state."""
        return False

    @property
    def has_log_prob(self) -> bool:
        """Whether decisions have a ``log_prob``, as `torch.compile` has to know beforehand."""
        return False

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Check the policy against the batch, and return the initial carry, [B, ...] each. Default: none."""
        return ()

    def decide(self, view: View) -> Decision:
        """Return the decision for each row of the block; it must not depend on other rows."""
        raise NotImplementedError(f"{type(self).__name__} must implement decide()")

    def fuse(self) -> Fused | None:
        """Return the decision of `decide` in the halting kernel's terms; None (default) if it has no kernel.

        It is used only if no subclass overrides `decide`, `begin` or another method without overriding
        `fuse`: such a subclass runs by its methods.
        """
        return None

    def check_readout(self, readout: Tensor) -> None:
        """Raise TypeError or ValueError if the policy cannot use the first readout. Default: any is fine."""


def heads_of(policy: Any) -> tuple[Any, ...]:
    """Return the heads of a policy and of the policies inside it."""
    members = getattr(policy, "policies", None)
    if isinstance(members, nn.ModuleList):
        return tuple(head for member in members for head in heads_of(member))
    head = getattr(policy, "head", None)
    return () if head is None else (head,)


def decision_of(policy: Policy, view: View) -> Decision:
    """Return the policy's decision about the rows that halt now: with a lookahead, that of the step before.

    The carry of a policy with a lookahead ends with the bools of those rows that are to halt.
    """
    if not policy.lookahead:
        return policy.decide(view)
    decision = policy.decide(replace(view, carry=view.carry[:-1]))
    if not isinstance(decision, Decision):
        return decision  # `check_decision` raises
    return decision._replace(halt=view.carry[-1], carry=(*decision.carry, decision.halt))


def head_logits(head: Any, view: View, most: int = 1) -> Tensor:
    """Return one logit per row, [n], from a halting head that returns [n] or [n, 1].

    With `most`, a head may return that many logits, [n, most].

    The head may be an nn.ModuleList with one for each step, and may take the inputs and the step's number:
    ``head(state, *inputs, n=...)``.
    """
    return head_logits_of(
        lambda state: call_at("head", head, state, view.inputs, view.step),
        view.state,
        view.row.shape[0],
        view.run.device,
        named=head,
        most=most,
    )


def head_logits_of(
    head: Any, state: Any, rows: int, device: torch.device, named: Any = None, most: int = 1
) -> Tensor:
    """Return one logit per row, [n], of a block's state; with `most` that many, [n, most], if it gives these.

    `named` is the head of which an error speaks.
    """
    try:
        logits = head(state)
    except (TypeError, AttributeError) as error:
        explain_call("head", head if named is None else named, state, error)
        raise
    return check_logits(logits, rows, device, most)


_RETURNS = {"head": "one logit per row, [n] or [n, 1]", "readout": "one Tensor, [n, ...]"}


def explain_call(role: str, function: Any, state: Any, error: Exception) -> None:
    """Raise TypeError if the error of a head or readout comes of a state of several tensors."""
    structure = flatten(state)[1]
    if is_container(structure):
        raise TypeError(
            f"{role}: expected a callable that takes the state, here {structure}, and returns "
            f"{_RETURNS[role]}; got {name_of(function)}, which raised {type(error).__name__}: {error}. "
            "For one tensor of the state pass a module that picks it, as in forward(self, state): return "
            "self.linear(state[0])"
        ) from error


def check_logits(logits: object, rows: int, device: torch.device, most: int = 1) -> Tensor:
    """Check the result of a halting head, and return it as [n], or [n, k] where it gives 2 to `most`."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"head: expected it to return a Tensor, got {describe(logits)}")
    logits = plain("head", logits)
    if not is_dense(logits):
        raise TypeError(f"head: expected dense logits, got {describe(logits)}")
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(f"head: expected floating-point logits, got {logits.dtype}")
    if logits.device != device:
        raise ValueError(f"head: expected logits on {device}, got them on {logits.device}")
    check_memory("head", logits)
    if logits.shape == (rows, 1):
        return logits.reshape(rows)
    if logits.shape != (rows,) and (most == 1 or logits.shape != (rows, most)):
        expected = f"one logit per row, shape [{rows}] or [{rows}, 1]"
        if most > 1:
            expected = f"{most} logits per row, shape [{rows}, {most}], or {expected}"
        raise ValueError(f"head: expected {expected}, got {list(logits.shape)}")
    return logits


def plain_decision(decision: Any) -> Any:
    """Return the decision with plain tensors."""
    if not isinstance(decision, Decision):
        return decision  # `check_decision` raises
    fields = (decision.halt, decision.weight, decision.cost, decision.log_prob, decision.logits)
    if kinds_of([t for t in fields if t is not None]) is None and kinds_of(decision.carry) is None:
        return decision
    halt, weight, cost, log_prob, logits = map(
        _plain_field, ("halt", "weight", "cost", "log_prob", "logits"), fields
    )
    carry = tuple(_plain_field(f"carry[{i}]", t) for i, t in enumerate(decision.carry))
    return Decision(halt, weight, cost, log_prob, carry, logits)


def _plain_field(name: str, value: Any) -> Any:
    return plain(f"Decision.{name}", value) if isinstance(value, Tensor) else value


def check_decision(decision: object, view: View) -> tuple[bool, bool, bool]:
    """Require a decision that the kernels can read; return which of weight, cost and log_prob it has."""
    n, device = view.row.shape[0], view.row.device
    if not isinstance(decision, Decision):
        raise TypeError(f"decide: expected it to return a Decision, got {describe(decision)}")
    scalars = (
        ("weight", decision.weight),
        ("cost", decision.cost),
        ("log_prob", decision.log_prob),
        ("logits", decision.logits),
    )
    for name, value in (("halt", decision.halt), *scalars):
        if value is None and name != "halt":
            continue
        if not isinstance(value, Tensor) or (
            value.dtype != torch.bool if name == "halt" else value.dtype not in DTYPE_CODES
        ):
            expected = "a bool Tensor" if name == "halt" else "a floating-point Tensor"
            raise TypeError(f"Decision.{name}: expected {expected}, got {describe(value)}")
        if not is_dense(value):
            raise TypeError(f"Decision.{name}: expected a dense tensor, got {describe(value)}")
        if value.shape != (n,) or value.device != device:
            raise ValueError(f"Decision.{name}: expected shape [{n}] on {device}, got {describe(value)}")
    for i, value in enumerate(decision.carry):
        if not isinstance(value, Tensor):
            raise TypeError(f"Decision.carry[{i}]: expected a Tensor, got {describe(value)}")
        if not is_dense(value):
            raise TypeError(f"Decision.carry[{i}]: expected a dense tensor, got {describe(value)}")
        if value.shape[:1] != (n,) or value.device != device:
            raise ValueError(f"Decision.carry[{i}]: expected {n} rows on {device}, got {describe(value)}")
    return decision.weight is not None, decision.cost is not None, decision.log_prob is not None


def check_head(head: object, returns: str = "one logit per row") -> Any:
    """Require a callable."""
    if not callable(head):
        raise TypeError(f"head: expected a callable or nn.Module, got {describe(head)}")
    for each in alternatives("head", head):
        refuse_cell("head", "head(state)", returns, each)
    return head
