"""The base class of halting policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.nn._settings import Checked
from adaptcomp_ext.ops._backend import DTYPE_CODES
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops._fields import documented
from adaptcomp_ext.ops._plain import check_memory, is_dense, kinds_of, plain
from adaptcomp_ext.ops.halting import Fused


@documented
class Run(NamedTuple):
    """What is known before the first step.

    Attributes
    ----------
    batch : int
        B, the number of rows.
    device : torch.device
        Where all tensors of the run are.
    min_steps : int
        No row halts before this step.
    max_steps : int
        Every row ends at this step.
    sample_ids : Tensor or None
        int64 [B]: the key of each row's random numbers; None: its position in the batch.
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
    """What a policy sees at one step. The block holds n rows; rows whose ``row`` is -1 are padding, and may be ignored.

    Attributes
    ----------
    run : Run
        What was known before the first step.
    step : int
        The step that has just run, from 1.
    state : pytree of Tensor
        [n, ...] each: after the step.
    previous : pytree of Tensor
        [n, ...] each: before the step, the same rows in the same order. A step that overwrites its own output
        overwrites this too.
    readout : Tensor
        [n, ...]: what ``readout`` made of the state after the step.
    row : Tensor
        int64 [n]: the batch row of each row of the block, from 0.
    carry : tuple of Tensor
        [n, ...] each: what the policy remembered of these rows.
    """

    run: Run
    step: int
    state: Any
    previous: Any
    readout: Tensor
    row: Tensor
    carry: tuple[Tensor, ...]


@documented
class Decision(NamedTuple):
    """What a policy says of each row of the block.

    Attributes
    ----------
    halt : Tensor
        bool [n]. Heeded from `min_steps` on; at `max_steps` every row ends anyway.
    weight : Tensor or None
        [n], for weighted policies: the weight of this step's readout in the output.
    cost : Tensor or None
        [n]: added to the row's ponder cost. None at every step: the cost is the number of steps.
    log_prob : Tensor or None
        [n], in nats: added to the row's log-probability.
    carry : tuple of Tensor
        [n, ...] each: handed back at the next step, for the rows that go on. Same number and dtypes at every
        step.
    logits : Tensor or None
        [n]: what the decision was computed from. A row where it is NaN or +inf ends ``NONFINITE``.
    """

    halt: Tensor
    weight: Tensor | None = None
    cost: Tensor | None = None
    log_prob: Tensor | None = None
    carry: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


class Policy(Checked):
    """Base class of halting policies: decides after each step which rows have thought enough.

    A subclass implements `decide`; `begin` and the properties have defaults. Nothing in the halting loop
    knows the policies. The settings of our own are checked whenever they are assigned.

    Examples
    --------
    Halt where the state has stopped moving:

    >>> class Still(ac.Policy):
    ...     def decide(self, view):
    ...         return ac.Decision(halt=(view.state - view.previous).norm(dim=1) < 1e-3)
    """

    _written: dict[str, Any]
    """The class's attributes as its statement left them: see `adaptcomp_ext.nn._fusing`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._written = dict(vars(cls))

    @property
    def weighted(self) -> bool:
        """Whether the output is the weighted sum of the readouts; if not, it is the readout at the row's last step."""
        return False

    @property
    def traced(self) -> bool:
        """Whether `HaltResult.trace` is filled."""
        return False

    @property
    def reads_logits(self) -> bool:
        """Whether it takes the readout for class logits, so that −inf masks a class even where the state itself is read."""
        return False

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Check the policy against the batch and return the initial carry, [B, ...] each. Default: none."""
        return ()

    def decide(self, view: View) -> Decision:
        """Decide for each row of the block. Must treat the rows independently of each other."""
        raise NotImplementedError(f"{type(self).__name__} must implement decide()")

    def fuse(self) -> Fused | None:
        """The same decision for the halting kernel, or None (default) where only `decide` knows how.

        Asked for only where it stands in the same class as the methods that it speaks for, or in a class
        derived from theirs: a subclass that overrides `decide`, `begin` or another method and inherits `fuse`
        runs as its methods say.
        """
        return None

    def check_readout(self, readout: Tensor) -> None:
        """Raise where the policy has no use for a readout such as the first one. Default: any will do."""


def head_logits(head: Any, view: View) -> Tensor:
    """One logit per row from a halting head: [n], whether it gives [n] or [n, 1]."""
    return check_logits(head(view.state), view.row.shape[0], view.run.device)


def check_logits(logits: Any, rows: int, device: torch.device) -> Tensor:
    """What a halting head gave, as [n]."""
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
    if logits.shape != (rows,):
        raise ValueError(
            f"head: expected one logit per row, shape [{rows}] or [{rows}, 1], got {list(logits.shape)}"
        )
    return logits


def plain_decision(decision: Any) -> Any:
    """A decision with plain tensors in it."""
    if not isinstance(decision, Decision):
        return decision  # for `check_decision` to refuse
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
    """Require that the kernels can read what a policy decided. Returns which of weight, cost and log_prob it gives."""
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


def check_head(head: object) -> Any:
    """Require something that can be called on the state."""
    if not callable(head):
        raise TypeError(f"head: expected a callable or nn.Module, got {describe(head)}")
    return head
