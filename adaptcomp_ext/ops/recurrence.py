"""The kernel calls that run a recurrent cell until every row has halted, and walk back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops._backend import CPU, contiguous, on_cuda, place
from adaptcomp_ext.ops._library import Function
from adaptcomp_ext.ops._transforms import check_gradients
from adaptcomp_ext.ops.halting import ACT

# The codes of csrc/recurrence/recurrence.h.
CELLS = {"gru": 0, "lstm": 1, "mlp": 2}


class Tensors(NamedTuple):
    """What a run reads, and what its gradients are in: contiguous, of one dtype, float32 or float64.

    Attributes
    ----------
    x : Tensor or None
        [B, input].
    state, second : Tensor, and Tensor or None
        [B, dim] each: the initial state; an LSTM has two.
    weight_ih, weight_hh, bias_ih, bias_hh : Tensor or None
        [gates, input], [gates, dim], [gates], [gates]; gates: 3 dim, 4 dim or hidden.
    weight2, bias2 : Tensor or None
        [dim, hidden] and [dim], of the MLP.
    head, head_bias : Tensor or None
        [1, dim] and [1].
    readout, readout_bias : Tensor or None
        [width, dim] and [width]; None: the readout is `state`.
    """

    x: Tensor | None
    state: Tensor
    second: Tensor | None
    weight_ih: Tensor | None
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    head: Tensor | None
    head_bias: Tensor | None
    readout: Tensor | None
    readout_bias: Tensor | None


class Settings(NamedTuple):
    """The cell and the policy of a run."""

    kind: str  # a key of `CELLS`
    activation: int  # the code of the MLP's activation
    residual: bool  # whether the MLP adds its state
    policy: int
    min_steps: int
    max_steps: int
    threshold: float
    parameter: int
    signal: Tensor | None
    sample_ids: Tensor | None
    reads_state: bool  # whether the state is read as logits, in which minus infinity is valid
    has_cost: bool
    relative: bool  # of convergence: the threshold is one of the readout's norm
    prior: tuple[float, float] | None  # of PonderNet in training: log_decay and log_total

    @property
    def weighted(self) -> bool:
        """Whether the output is the weighted sum of the readouts."""
        return self.policy == ACT or self.prior is not None


class Steps(NamedTuple):
    """All steps of a run, S in number, ordered by step and then by row."""

    states: Tensor  # [S, dim]: the first tensor of the state
    weights: Tensor  # [S]
    row: Tensor  # int64 [S]
    step: Tensor  # int64 [S]


class Ended(NamedTuple):
    """The results of a run; `output` is None where it is the first of `state`."""

    output: Tensor | None
    state: list[Tensor]
    cost: Tensor | None
    steps: Tensor
    status: Tensor
    trace: Steps | None = None  # of PonderNet in training


def _arguments(
    settings: Settings, tensors: Tensors, steps: Tensor, status: Tensor, tape: _C.RecurrenceTape | None
) -> list[Any]:
    rows, dim = tensors.state.shape
    x, second_layer, readout = tensors.x, tensors.weight2, tensors.readout
    return [
        rows,
        0 if x is None else x.shape[1],
        dim,
        0 if second_layer is None else second_layer.shape[1],
        *(tensors.state.dtype == torch.float64, CELLS[settings.kind], settings.activation, settings.residual),
        *tensors,
        dim if readout is None else readout.shape[0],
        *(settings.policy, settings.min_steps, settings.max_steps, settings.threshold),
        *(settings.prior or (None, None)),
        *(steps, status, tape),
    ]


def _scratch_bytes(settings: Settings, tensors: Tensors, backward: bool) -> int:
    """Return the scratch memory of a call on CUDA; negative where a row does not fit on the device."""
    first, x, second_layer, readout = tensors.state, tensors.x, tensors.weight2, tensors.readout
    return _C.recurrence_scratch(
        [
            first.shape[0],
            0 if x is None else x.shape[1],
            first.shape[1],
            0 if second_layer is None else second_layer.shape[1],
            *(first.dtype == torch.float64, CELLS[settings.kind]),
            0 if readout is None else readout.shape[0],
            *(settings.policy, settings.max_steps, backward, place(first.device)[0]),
        ]
    )


def fits(settings: Settings, tensors: Tensors) -> bool:
    """Whether a run on CUDA, and with gradients its backward pass, fits on the device."""
    return _scratch_bytes(settings, tensors, backward=False) >= 0 and not (
        torch.is_grad_enabled()
        and _any_requires_grad(tensors)
        and _scratch_bytes(settings, tensors, backward=True) < 0
    )


def _place(settings: Settings, tensors: Tensors, backward: bool) -> tuple[Any, ...]:
    """Return the end of an argument list: device, stream, and on CUDA the scratch memory."""
    device = tensors.state.device
    if not on_cuda(device):
        return CPU, 0
    scratch = torch.empty(_scratch_bytes(settings, tensors, backward), dtype=torch.uint8, device=device)
    return *place(device), scratch, scratch.numel()


def _run(settings: Settings, tensors: Tensors, tape: _C.RecurrenceTape | None) -> Ended:
    first, second, readout = tensors.state, tensors.second, tensors.readout
    rows, dim = first.shape
    dtype, device = first.dtype, first.device
    output = cost = None
    if settings.weighted:
        width = dim if readout is None else readout.shape[0]
        output = torch.zeros((rows, width), dtype=dtype, device=device)
    elif readout is not None:
        output = torch.empty((rows, readout.shape[0]), dtype=dtype, device=device)
    if settings.has_cost:
        cost = torch.zeros(rows, dtype=dtype, device=device)
    state = [torch.empty_like(t, requires_grad=False) for t in (first, second) if t is not None]
    steps = torch.empty(rows, dtype=torch.int64, device=device)
    status = torch.empty(rows, dtype=torch.int8, device=device)
    if settings.prior is not None and tape is None:
        tape = _C.RecurrenceTape(rows)
    _C.recurrence(
        [
            *_arguments(settings, tensors, steps, status, tape),
            *(output, state[0], None if second is None else state[1], cost),
            *(settings.parameter, settings.signal, settings.sample_ids),
            *(settings.reads_state, settings.relative),
            *_place(settings, tensors, backward=False),
        ]
    )
    trace = None
    if settings.prior is not None:
        count = int(steps.sum())
        row, step = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        states, weights = torch.empty((count, dim), dtype=first.dtype), torch.empty(count, dtype=first.dtype)
        _C.recurrence_trace(
            [tape, steps, rows, dim, first.dtype == torch.float64, states, weights, row, step]
        )
        trace = Steps(states, weights, row, step)
    return Ended(output, state, cost, steps, status, trace)


class _Recurrence(Function):
    """A whole run as one node. Its results that have no gradient are left in `ended`."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, ended: list[Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        given = Tensors(*tensors)  # type: ignore[arg-type]
        on_host = not on_cuda(given.state.device)  # elsewhere the backward pass repeats the steps
        tape = _C.RecurrenceTape(given.state.shape[0]) if on_host else None
        result = _run(settings, given, tape)
        ended += (result.steps, result.status)
        states = weights = None
        if result.trace is not None:
            states, weights, *rest = result.trace
            ended += rest
        ctx.settings = settings
        # The tape goes with the saved tensors, when the backward pass has ended, and not with the node.
        holder: Any = torch.empty(0)
        holder.tape = tape
        ctx.save_for_backward(*tensors, result.steps, result.status, holder)
        ctx.set_materialize_grads(False)
        return tuple(
            [t for t in (result.output, *result.state, result.cost, states, weights) if t is not None]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        check_gradients("AdaptiveHalt", grads)
        settings: Settings = ctx.settings
        *saved, steps, status, holder = ctx.saved_tensors
        tensors = Tensors(*saved)
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *_by_reference(settings, tensors, steps, status, grads, ctx.needs_input_grad[2:]),
            )
        it = iter([None if g is None else contiguous("gradient", g) for g in grads])
        g_output = next(it) if settings.weighted or tensors.readout is not None else None
        g_state = next(it)
        g_second = None if tensors.second is None else next(it)
        g_cost = next(it) if settings.has_cost else None
        g_trace, g_weights = (None, None) if settings.prior is None else (next(it), next(it))
        if tensors.readout is None and not settings.weighted:
            g_state, g_output = None, g_state  # the output is the last state
        bias = tensors.readout_bias
        if settings.weighted and bias is not None and g_output is not None:
            g_output = g_output.masked_fill(bias == -torch.inf, 0)  # a masked class has no gradient
        found = [
            torch.empty_like(t, requires_grad=False) if t is not None and wanted else None
            for t, wanted in zip(tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        _C.recurrence_backward(
            [
                *_arguments(settings, tensors, steps, status, holder.tape),
                *(g_output, g_state, g_second, g_cost, g_trace, g_weights, *found),
                *_place(settings, tensors, backward=True),
            ]
        )
        return (None, None, *found)


def _by_reference(
    settings: Settings,
    tensors: Tensors,
    steps: Tensor,
    status: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients that are differentiable in their turn: from the same steps in plain PyTorch."""
    # Views, at which the differentiation stops: one tensor may be computed from another, or be the same.
    own = Tensors._make(
        t.view_as(t) if t is not None and w else t for t, w in zip(tensors, wanted, strict=True)
    )
    inputs = [t for t, w in zip(own, wanted, strict=True) if t is not None and w]
    # The dtypes are the run's, wherever this was called.
    with torch.autocast(tensors.state.device.type, enabled=False):
        results = reference.recurrence(settings, own, steps, status)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        found = torch.autograd.grad(
            [r for r, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    at = iter(found)
    return [next(at) if t is not None and w else None for t, w in zip(own, wanted, strict=True)]


def _any_requires_grad(tensors: Tensors) -> bool:
    # As a loop, which ends at the first: a generator takes longer to make than this.
    for t in tensors:  # noqa: SIM110
        if t is not None and t.requires_grad:
            return True
    return False


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def recurrence(settings: Settings, tensors: Tensors) -> Ended:
    """Run every row until it has ended, with a gradient in `tensors` where one is wanted."""
    if not settings.weighted and tensors.head is not None:  # the decisions have no gradient
        tensors = tensors._replace(head=tensors.head.detach(), head_bias=_detached(tensors.head_bias))
    if not (torch.is_grad_enabled() and tensors.state.shape[0] and _any_requires_grad(tensors)):
        return _run(settings, tensors, None)
    ended: list[Tensor] = []
    results = list(_Recurrence.apply(settings, ended, *tensors))
    steps, status, *places = ended
    output = results.pop(0) if settings.weighted or tensors.readout is not None else None
    trace = None
    if settings.prior is not None:
        weights = results.pop()
        trace = Steps(results.pop(), weights, *places)
    cost = results.pop() if settings.has_cost else None
    return Ended(output, results, cost, steps, status, trace)
