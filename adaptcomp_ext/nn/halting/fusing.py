"""The test whether the halting kernel may take a policy's decision, because it equals that of its methods.

`Policy.fuse` states in the kernel's terms what `decide`, `begin` and the other methods do in Python. A
subclass that overrides one of these and inherits `fuse` runs in Python, and so does a policy with a method
assigned to it. The result for a class is cached on the class.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.policy import Policy, Run, no_lookahead
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_choice, check_int, describe
from adaptcomp_ext.ops._plain import check_memory, is_dense, plain

_HARMLESS = {"extra_repr", "fuse", "calibrated", "_fusing", "_written"}


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result for a class of policies, valid while it has these two methods."""

    decide: Any
    begin: Any
    fusable: bool
    built_in: bool  # a policy of this package, whose `fuse` and `begin` need no checks
    hooks: frozenset[str]  # methods that an instance must not shadow


def fused_decision(policy: Policy, run: Run) -> halting.Fused | None:
    """Return the policy's decision for the kernel; None if it has none, or if its methods are overridden."""
    if policy.lookahead:
        return None
    cls = type(policy)
    answer: _Answer | None = cls.__dict__.get("_fusing")
    # A class can change after its result was cached.
    if answer is None or answer.decide is not cls.decide or answer.begin is not cls.begin:
        answer = cls._fusing = _look(cls)  # type: ignore[attr-defined]
    own = policy.__dict__
    if "fuse" not in own:
        if not answer.fusable:
            return None
        if not own.keys().isdisjoint(answer.hooks):
            return None
    fused = policy.fuse()
    if fused is None or (answer.built_in and "fuse" not in own):
        return fused
    return _check(fused, run)


def begin(policy: Policy, run: Run, carried: bool) -> tuple[Tensor, ...]:
    """Return the policy's initial carry, checked; if `carried`, the first is a copy, for the kernel."""
    if policy.lookahead:
        if policy.weighted or policy.traced:
            no_lookahead(type(policy).__name__, policy.lookahead)
        return (*_begin(policy, run, carried), torch.zeros(run.batch, dtype=torch.bool, device=run.device))
    return _begin(policy, run, carried)


def _begin(policy: Policy, run: Run, carried: bool) -> tuple[Tensor, ...]:
    carry = policy.begin(run)
    if carry == ():
        return ()
    if "begin" not in policy.__dict__ and getattr(type(policy).begin, "__module__", "").startswith(
        "adaptcomp_ext."
    ):
        return carry
    if not isinstance(carry, (tuple, list)):
        raise TypeError(f"begin: expected it to return a tuple of Tensors, got {describe(carry)}")
    checked = []
    for i, value in enumerate(carry):
        if not isinstance(value, Tensor):
            raise TypeError(f"begin: expected Tensors in the carry, got {describe(value)} at {i}")
        value = plain("begin", value)
        if not is_dense(value):
            raise TypeError(f"begin: expected dense tensors in the carry, got {describe(value)} at {i}")
        check_memory("begin", value)
        if value.shape[:1] != (run.batch,) or value.device != run.device:
            raise ValueError(
                f"begin: expected a carry of {run.batch} rows on {run.device}, got {describe(value)} at {i}"
            )
        checked.append(value)
    if not carried:
        return tuple(checked)
    if not checked or checked[0].shape != (run.batch,) or not checked[0].is_floating_point():
        came = describe(checked[0]) if checked else "none"
        raise ValueError(
            f"begin: expected floating-point numbers of shape [{run.batch}], which the fused decision "
            f"carries, got {came}"
        )
    first = torch.empty(run.batch, dtype=run.scalar, device=run.device).copy_(checked[0].detach())
    return (first, *checked[1:])


def _look(cls: type[Policy]) -> _Answer:
    mro = cls.__mro__
    at = next(i for i, base in enumerate(mro) if "fuse" in vars(base))
    fuses = mro[at]
    # All names that `fuse` may depend on: attributes of its class and the bases.
    known = {
        name for base in mro[at : mro.index(Policy) + 1] for name in vars(base) if not name.startswith("__")
    } - _HARMLESS
    known |= set(inspect.signature(fuses).parameters)
    known.add("__getattribute__")
    overridden = any(name in known for base in mro[:at] for name in vars(base))
    # Methods that were assigned to a class after its statement, unless `fuse` was assigned, too.
    for base in mro[at : mro.index(Policy) + 1]:
        written = vars(base).get("_written", {})
        if vars(base).get("fuse") is written.get("fuse"):
            overridden |= any(
                vars(base).get(name) is not value for name, value in written.items() if name in known
            )
    hooks = frozenset(
        name for name in known if callable(getattr(cls, name, None)) and not name.startswith("_")
    )
    return _Answer(
        cls.decide, cls.begin, not overridden, fuses.__module__.startswith("adaptcomp_ext."), hooks
    )


def _check(fused: Any, run: Run) -> halting.Fused:
    """Check the result of a user's `fuse`, which the kernel reads unchecked."""
    if not isinstance(fused, halting.Fused):
        raise TypeError(f"fuse: expected it to return a Fused or None, got {describe(fused)}")
    check_choice("fuse: policy", fused.policy, tuple(halting.KERNELS))
    kernel = halting.KERNELS[fused.policy]
    if kernel.has_head and not callable(fused.head):
        raise TypeError(f"fuse: expected a head that can be called, got {describe(fused.head)}")
    if not kernel.has_head and fused.head is not None:
        raise TypeError(f"fuse: expected no head for this policy, got {describe(fused.head)}")
    if isinstance(fused.threshold, bool) or not isinstance(fused.threshold, (int, float)):
        raise TypeError(f"fuse: expected a number as threshold, got {describe(fused.threshold)}")
    check_int("fuse: parameter", fused.parameter, 0)
    if kernel.parameters is not None:
        check_choice("fuse: parameter", fused.parameter, kernel.parameters)
    if bool(fused.carried) != kernel.carries or bool(fused.has_cost) != kernel.carries:
        raise ValueError(
            f"fuse: expected carried and has_cost to be {kernel.carries}, got {fused.carried!r} and "
            f"{fused.has_cost!r}"
        )
    signal = fused.signal
    if signal is None:
        return fused
    if not kernel.has_signal:
        raise TypeError(f"fuse: expected no signal for this policy, got {describe(signal)}")
    if (
        not isinstance(signal, Tensor)
        or signal.dtype != torch.int64
        or signal.shape != (run.batch,)
        or signal.device != run.device
    ):
        raise TypeError(
            f"fuse: expected a signal of int64, shape [{run.batch}], on {run.device}, got {describe(signal)}"
        )
    return fused._replace(signal=signal.contiguous())
