"""Whole runs in one kernel call: the steps are those of a cell, the decisions those of a kernel's policy.

The kernel takes the numbers of modules, and calls none. So it serves only modules whose call is known to be
their formula: cells of `adaptcomp_ext.cells`, and `torch.nn.Linear` as head and readout, without hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from adaptcomp_ext import _C
from adaptcomp_ext.nn import cells
from adaptcomp_ext.nn._tree import form
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.policies.convergence import Convergence
from adaptcomp_ext.nn.halting.policies.pondernet import PonderNet
from adaptcomp_ext.nn.halting.policy import Policy
from adaptcomp_ext.nn.result import HaltResult, Status, Trace
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import DTYPE_CODES, contiguous, on_cuda
from adaptcomp_ext.ops._plain import is_dense
from adaptcomp_ext.ops.linear import linear_unchecked
from adaptcomp_ext.ops.mlp_energy import ACTIVATION_CODES
from adaptcomp_ext.ops.recurrence import Ended, Settings, Tensors, fits, recurrence

TENSOR, PAIR = 0, 1  # forms of a state
KINDS: dict[type, str] = {cells.GRU: "gru", cells.LSTM: "lstm", cells.MLP: "mlp"}
_CALLED: tuple[type[nn.Module], ...] = (*KINDS, nn.Linear)
FORMULAS: tuple[tuple[type, str, Any], ...] = (
    *((cls, name, getattr(cls, name)) for cls in _CALLED for name in ("forward", "__call__")),
    *((cls, "forward", cls.forward) for cls in (nn.GRUCell, nn.LSTMCell)),
)
"""The methods whose formulas the kernel has, as long as none is assigned to its class."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES: tuple[dict[Any, Any], ...] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
LAYER = ("weight", "bias")
GATES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
MLP = ("weight_input", "weight_state", "bias1", "weight2", "bias2")
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
# The methods whose formulas the kernel has, too.
_CONVERGES = {"decide": Convergence.decide}
_PONDERS = {name: getattr(PonderNet, name) for name in ("decide", "begin", "log_prior", "prior_terms")}
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


_P = TypeVar("_P", bound=Policy)
_Layer = tuple[Tensor | None, Tensor | None]  # weight and bias


class NotServed(Exception):
    """Why the kernel does not serve a run."""


def active_mode(device: str = "cpu") -> str | None:
    """Return which mode of torch the kernel does not serve on a type of device, as a sentence, or None."""
    if _dispatch_modes() or _function_modes():
        return "a mode of torch is active"
    if torch.is_autocast_enabled(device):
        return "autocast is enabled"
    if any(_OF_ALL_MODULES):
        return "torch has hooks of all modules"
    if torch.is_grad_enabled() and _saved_tensors_hooks(False) is not None:
        return "hooks of saved tensors are active, which do not see what the kernel keeps"
    return None


def find(problem: Problem, fused: halting.Fused | None, step: Any) -> WholeRun:
    """Return the run as the kernel takes it, or raise `NotServed` with the reason why it does not."""
    kind = KINDS.get(type(step))
    if kind is None:
        raise NotServed("the step is no cell of adaptcomp_ext.cells")
    policy = problem.policy
    if policy.lookahead:
        raise NotServed("the policy looks ahead")
    prior = None
    if fused is None or fused.policy in halting.CONVERGES.values():
        fused = _convergence(policy)
    if fused is None and _is_own(policy, PonderNet, _PONDERS) and policy.training:
        prior = policy.prior_terms(problem.run)
        fused = halting.Fused(
            halting.PONDER_SAMPLE,
            threshold=math.log(policy.epsilon) if policy.epsilon else -math.inf,
            has_cost=True,
            head=policy.head,
        )
    if fused is None:
        raise NotServed(f"{type(policy).__name__} decides in Python")
    if fused.policy == halting.ARGMAX:
        raise NotServed("the kernel of a whole run remembers no predictions")
    state, device = problem.state, problem.run.device
    if prior is not None and on_cuda(device):
        raise NotServed("PonderNet in training keeps all steps, and only the device knows how many there are")
    for cls, name, written in FORMULAS:
        if getattr(cls, name) is not written:
            raise NotServed(f"{cls.__name__}.{name} was assigned to")
    if problem.keep_trace:
        raise NotServed("keep_trace keeps the readout of every step")
    if problem.together is not None:
        raise NotServed("the processes of a group step together")
    if problem.watch is not None:
        raise NotServed("a transform of torch is active")
    mode = active_mode(device.type)
    if mode is not None:
        raise NotServed(mode)
    dtype = state[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise NotServed(f"the state is {dtype}, not float32 or float64")
    if not (problem.ordinary or _are_ordinary(problem, device)):
        raise NotServed("state and inputs are not all plain contiguous tensors")
    dim = step.hidden_size if kind != "mlp" else step.state_size
    shape = (problem.run.batch, dim)
    if form(problem.structure) != (PAIR if kind == "lstm" else TENSOR) or len(state) > 2:
        raise NotServed("the state has another structure than the cell's")
    if any(t.shape != shape or t.dtype != dtype for t in state):
        raise NotServed("the state has another shape than the cell's")
    inputs = problem.inputs
    wanted = 1 if step.input_size else 0
    if not len(inputs) == len(problem.input_structures) == wanted or problem.has_containers:
        raise NotServed("the inputs are not the cell's")
    if inputs and (inputs[0].shape != (problem.run.batch, step.input_size) or inputs[0].dtype != dtype):
        raise NotServed("the input has another shape or dtype than the cell's")
    cell = _cell(kind, step, dtype, device)
    head: _Layer = (None, None)
    readout: _Layer = (None, None)
    if fused.head is not None:
        head = _linear("head", fused.head, dim, dtype, device)
        if head[0] is None or head[0].shape[0] != 1:
            raise NotServed("the head gives more than one number")
    if problem.readout is not None:
        readout = _linear("readout", problem.readout, dim, dtype, device)
    if kind == "lstm" and not head[0] is readout[0] is None:
        raise NotServed("a Linear cannot read the pair of an LSTM")
    settings = Settings(
        kind,
        ACTIVATION_CODES[step.activation] if kind == "mlp" else 0,
        kind == "mlp" and step.residual,
        fused.policy,
        problem.run.min_steps,
        problem.run.max_steps,
        fused.threshold,
        fused.parameter,
        fused.signal,
        problem.run.sample_ids,
        problem.readout is None and policy.reads_logits,
        fused.has_cost,
        prior=prior,
        relative=fused.policy == halting.GIVEN and policy.norm == "relative",
    )
    second = state[1] if len(state) == 2 else None
    tensors = Tensors._make((inputs[0] if inputs else None, state[0], second, *cell, *head, *readout))
    if on_cuda(device) and not fits(settings, tensors):
        raise NotServed("a row, or with gradients the states of its steps, does not fit on the device")
    return WholeRun(problem, settings, tensors)


def _are_ordinary(problem: Problem, device: torch.device) -> bool:
    """Whether state and inputs are on CUDA and such as the compiled module calls ordinary on the CPU."""
    return on_cuda(device) and all(
        type(t) in (Tensor, nn.Parameter)
        and is_dense(t)
        and t.is_contiguous()
        and not t.is_neg()
        and t.numel()
        for t in (*problem.state, *problem.inputs)
    )


def _convergence(policy: Policy) -> halting.Fused | None:
    """Return the decision of `Convergence`, with the two readouts that the kernel of a whole run keeps."""
    if not _is_own(policy, Convergence, _CONVERGES):
        return None
    if policy.norm == "kl":
        raise NotServed("the kernel of a whole run has no divergences")
    return halting.Fused(halting.GIVEN, threshold=policy.tol, parameter=policy.patience)


def _is_own(policy: Policy, cls: type[_P], methods: dict[str, Any]) -> TypeGuard[_P]:
    """Whether the policy is one of this class with the methods that it came with."""
    return type(policy) is cls and all(
        getattr(cls, name) is method and name not in policy.__dict__ for name, method in methods.items()
    )


def _is_its_formula(module: nn.Module) -> bool:
    own = module.__dict__  # `active_mode` has looked at the hooks of all modules
    return "forward" not in own and not any(own[name] for name in _HOOKS)


def _own(
    name: str, module: nn.Module, parameter: str, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    value: Any = module._parameters.get(parameter)
    if value is None:
        if getattr(module, parameter, None) is not None:
            raise NotServed(f"{name}.{parameter} is computed")
        return None
    if type(value) not in (Tensor, nn.Parameter) or value.dtype != dtype or value.device != device:
        raise NotServed(f"{name}.{parameter} is no plain tensor of {dtype} on {device}")
    return contiguous(name, value)


def _linear(name: str, module: Any, inner: int, dtype: torch.dtype, device: torch.device) -> _Layer:
    if type(module) is not nn.Linear:
        raise NotServed(f"the {name} is no torch.nn.Linear")
    columns = module.out_features
    own = _C.own_parameters(module, LAYER, ((columns, inner), (columns,)), DTYPE_CODES[dtype])
    if own is not None and own[0] is not None and columns:
        return own
    if not _is_its_formula(module):
        raise NotServed(f"the {name} has hooks, or a forward of its own")
    weight = _own(name, module, "weight", dtype, device)
    if weight is None or weight.dim() != 2 or weight.shape[1] != inner or not weight.shape[0]:
        raise NotServed(f"the {name} does not read the state")
    bias = _own(name, module, "bias", dtype, device)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise NotServed(f"the {name} has a bias of another shape")
    return weight, bias


def _cell(kind: str, step: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Return the cell's parameters in the order of `Tensors`."""
    inner, hidden = step.input_size, step.hidden_size
    names: tuple[str, ...] = GATES
    optional: tuple[str, ...] = GATES[2:]
    shapes: tuple[tuple[int, ...], ...]
    if kind == "mlp":
        dim, names = step.state_size, MLP
        shapes = (
            (hidden, inner),
            (hidden, dim),
            (hidden,),
            (dim, hidden),
            (dim,),
        )
        optional = () if inner else MLP[:1]
    else:
        gates = (3 if kind == "gru" else 4) * hidden
        shapes = ((gates, inner), (gates, hidden), (gates,), (gates,))
    own = _C.own_parameters(step, names, shapes, DTYPE_CODES[dtype])
    if own is None:
        if not _is_its_formula(step):
            raise NotServed("the step has hooks, or a forward of its own")
        own = tuple([_own("step", step, name, dtype, device) for name in names])
    for name, shape, value in zip(names, shapes, own, strict=True):
        if value is None and name not in optional:
            raise NotServed(f"step.{name} is missing")
        if value is not None and value.shape != shape:
            raise NotServed(f"step.{name} has another shape than at first")
    return (*own[:3], None, *own[3:]) if kind == "mlp" else (*own, None, None)


class WholeRun:
    """A run that the kernel serves."""

    def __init__(self, problem: Problem, settings: Settings, tensors: Tensors) -> None:
        self.problem, self.settings, self.tensors = problem, settings, tensors

    def run(self) -> HaltResult:
        """Run every row until it has ended."""
        problem, readout, first = self.problem, self.tensors.readout, self.tensors.state
        if readout is None:
            problem.check_readout(first, first.shape[0])
        else:
            problem.policy.check_readout(first.new_empty((first.shape[0], readout.shape[0])))
        # ACT begins with a carry, which the kernel has itself, and has nothing to check.
        if not self.settings.weighted:
            problem.policy.begin(problem.run)
        return halt_result(recurrence(self.settings, self.tensors), self.tensors, problem.tree)


def _read(states: Tensor, broken: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the readouts, of which those of rows that are not finite pass no gradient to the layer."""
    if not bool(broken.any()):
        return linear_unchecked(states, weight, bias)
    broken = broken[:, None]
    clean = linear_unchecked(torch.where(broken, 0, states), weight, bias)
    with torch.no_grad():
        values = linear_unchecked(states, weight, bias)
    return torch.where(broken, values, clean)


def halt_result(ended: Ended, tensors: Tensors, tree: Callable[[list[Tensor]], Any]) -> HaltResult:
    """Return the results of a run; `tree` makes a state of its tensors."""
    trace = None
    if ended.trace is not None:
        states, weights, row, step = ended.trace
        outputs = states
        if tensors.readout is not None:
            outputs = _read(
                states, ended.status[row] == Status.NONFINITE, tensors.readout, tensors.readout_bias
            )
        trace = Trace(outputs, weights, row, step)
    return HaltResult(
        ended.state[0] if ended.output is None else ended.output,
        tree(ended.state),
        ended.steps,
        ended.steps.to(ended.state[0].dtype) if ended.cost is None else ended.cost,
        ended.status,
        trace,
        None,
    )
