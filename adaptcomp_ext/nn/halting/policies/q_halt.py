"""The policy of halting by learned values: the hierarchical and the tiny recursive reasoning models."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn.halting.policies._sampling import all_samples, check_seed_or_none, drawn_seed
from adaptcomp_ext.nn.halting.policy import Decision, Policy, Run, View, check_head, head_logits
from adaptcomp_ext.nn.result import HaltResult, Status, Trace
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_fraction, check_int, describe
from adaptcomp_ext.ops.q_halt import q_halt_targets
from adaptcomp_ext.reference import q_halt_least, q_halt_step


class QHalt(Policy):
    """Halt a row when halting is worth more than going on, by two learned values (Wang et al. 2025, HRM).

    The head gives q_halt and q_continue, as logits; a row halts at the first step with q_halt > q_continue.
    A head with one logit, as in tiny recursive models (Jolicoeur-Martineau 2025), halts where it is positive.

    *In training mode* a row explores with the probability `exploration`: it then does not halt before a
    step that is drawn from U{2, …, `max_steps`}, once for each row and call. In evaluation mode none does.

    Parameters
    ----------
    head : callable
        Maps the state to two logits per row, [n, 2], q_halt first; or to q_halt alone, [n] or [n, 1]. Start
        with weights of 0 and biases of −5, as the literature does: rows then take all steps at first.
    exploration : float
        Probability in [0, 1].
    seed : int, optional
        Seed of the exploration, whose draws depend only on seed and the row's sample id (by default its place
        in the batch). Default: each call in training mode draws a seed from torch's generator of the CPU.
    lookahead : int
        0, or 1: the values at step n decide whether the row ends after step n + 1. See `Policy.lookahead`.

    Notes
    -----
    A logit of −∞ is valid; a row where a logit is NaN or +∞ ends ``NONFINITE``. The output is the readout at
    the last step, and has its gradient; the decision has none, so that the head learns by `loss` or with
    `adaptcomp_ext.ops.q_halt_targets`. The ponder cost is the number of steps. A setting that is not as
    described raises TypeError or ValueError, also at a later assignment.

    Examples
    --------
    The trace has the readout of every step, here the state, which decoder and head read again:

    >>> policy = ac.QHalt(head)
    >>> halt = ac.AdaptiveHalt(step, policy, max_steps=16, keep_trace=True)
    >>> result = halt(state, x)
    >>> logits, wanted = decoder(result.trace.outputs), target[result.trace.row]
    >>> right = (logits.argmax(-1) == wanted).all(1)
    >>> loss = cross_entropy(logits.mT, wanted) + 0.5 * policy.loss(result, right).mean()
    """

    _settings: ClassVar = {
        **Policy._settings,
        "head": partial(check_head, returns="one or two logits per row"),
        "exploration": partial(check_fraction, "exploration", zero=True),
        "seed": check_seed_or_none,
    }

    def __init__(
        self, head: Any, exploration: float = 0.1, seed: int | None = None, lookahead: int = 0
    ) -> None:
        super().__init__()
        self.head = head
        self.exploration = exploration
        self.seed = seed
        self.lookahead = lookahead

    @property
    def explores(self) -> bool:
        """Whether rows have a step before which they do not halt: in training mode, with an exploration."""
        return self.training and self.exploration > 0

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Return the first step at which each row may halt, if rows explore."""
        if not self.explores:
            return ()
        seed = drawn_seed() if self.seed is None else self.seed
        return (q_halt_least(seed, all_samples(run), self.exploration, run.max_steps),)

    def decide(self, view: View) -> Decision:
        """Halt rows whose value of halting is the larger one."""
        q = head_logits(self.head, view, most=2).detach()
        halt = q_halt_step(q)
        if view.carry:
            halt = halt & (view.carry[0] <= view.step + self.lookahead)
        return Decision(halt, carry=view.carry, logits=q if q.dim() == 1 else q.amax(dim=1))

    def fuse(self) -> halting.Fused | None:
        """Let the halting kernel decide where no row explores."""
        return None if self.explores else halting.Fused(halting.Q_HALT, head=self.head)

    def loss(
        self,
        result: HaltResult,
        right: Tensor,
        logits: Tensor | None = None,
        following: Tensor | None = None,
        max_steps: int | None = None,
    ) -> Tensor:
        """Return the loss of the head at every step of every row.

        It is the binary cross-entropy, summed over the logits. Their targets are those of
        `adaptcomp_ext.ops.q_halt_targets`, with the logits of the same row one step later, from the trace.

        Parameters
        ----------
        result : HaltResult
            With a trace, as of ``AdaptiveHalt(keep_trace=True)``.
        right : Tensor
            bool [S]: whether the row's answer after the step is right as a whole, in the order of the trace.
        logits : Tensor, optional
            [S, 2], [S, 1] or [S]: the head's logits at these steps. Default: ``head(result.trace.outputs)``,
            for a readout that is the state, or all that the head reads.
        following : Tensor, optional
            [B, 2]: the logits after one step more than each row's last one, such as
            ``head(step(result.state, x))`` without a gradient. Default: at a row's last step going on is its
            own target, so that q_continue has no gradient there.
        max_steps : int, optional
            That of the `AdaptiveHalt`, needed with `following`: after this step going on is worth what
            halting at the next one is.

        Returns
        -------
        Tensor
            [S], in nats, differentiable in the logits. 0 for the step at which a row ended ``NONFINITE``.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described.
        """
        trace = result.trace
        if not isinstance(trace, Trace):
            raise ValueError(
                "result: expected one with a trace, as of AdaptiveHalt(keep_trace=True), got none"
            )
        row, steps = trace.row, trace.step
        count = row.shape[0]
        if logits is None:
            logits = self.head(trace.outputs)
        if not isinstance(logits, Tensor) or logits.shape not in ((count, 2), (count, 1), (count,)):
            raise ValueError(
                f"logits: expected shape [{count}, 2], [{count}, 1] or [{count}], got {describe(logits)}"
            )
        last = None
        after: Tensor | None = None
        if logits.shape == (count, 2):
            after = _next_of(logits.detach(), row)
            if following is not None:
                after, last = self._followed(after, following, trace, result, max_steps)
        elif following is not None:
            raise ValueError(
                "following: expected None for a head with one logit, which has no target for going on"
            )
        targets = q_halt_targets(logits, right, after, last)
        broken = (result.status[row] == Status.NONFINITE) & (steps == result.steps[row])
        over = broken.view(-1, *(1 for _ in logits.shape[1:]))
        loss = binary_cross_entropy_with_logits(
            logits.masked_fill(over, 0.0), targets.masked_fill(over, 0.0), reduction="none"
        )
        return loss.reshape(count, -1).sum(dim=1).masked_fill(broken, 0.0)

    @staticmethod
    def _followed(
        after: Tensor, following: Tensor, trace: Trace, result: HaltResult, max_steps: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits one step later, also after the rows' last steps, and which steps are last."""
        batch = result.steps.shape[0]
        if not isinstance(following, Tensor) or following.shape != (batch, 2):
            raise ValueError(f"following: expected shape [{batch}, 2], got {describe(following)}")
        if max_steps is None:
            raise ValueError("max_steps: expected that of the AdaptiveHalt, which following needs, got None")
        ends = trace.step == result.steps[trace.row]
        after = torch.where(ends[:, None], following.detach()[trace.row].to(after.dtype), after)
        return after, trace.step >= check_int("max_steps", max_steps, 1)

    def extra_repr(self) -> str:
        """Return the head's name, if it is a plain function, exploration, seed and lookahead."""
        return (
            f"{named(head=self.head)}exploration={self.exploration}, seed={self.seed}, "
            f"lookahead={self.lookahead}"
        )


def _next_of(values: Tensor, row: Tensor) -> Tensor:
    """Return the values of each row one step later, for all entries of a trace; NaN: there are none."""
    order = torch.argsort(row, stable=True)  # the trace is in the order of the steps
    same = row[order[1:]] == row[order[:-1]]
    after = torch.full_like(values, torch.nan)
    after[order[:-1]] = torch.where(same[:, None], values[order[1:]], torch.nan)
    return after
