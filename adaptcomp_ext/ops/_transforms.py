"""Detection of torch's transforms and tracers that the kernels cannot serve; each raises RuntimeError.

The kernels read addresses and decide on the host. An address does not show that a tensor stands for many
tensors (``vmap``), has a tangent (forward mode) or has no values (fake tensors); and a recorded graph would
replay the steps of one batch for every other batch. `enter` looks for all of them at the beginning of a call
and costs 0.2 µs. Tensors that reach a call only through the user's own functions, such as a parameter with a
tangent, are checked by the `Watch` it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree

from adaptcomp_ext.ops._backend import on_reference

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _nothing() -> None:
    return None


# Private names of torch. Where a release lacks one of them, its transform is no longer refused here, and
# nothing else changes.
_functorch = getattr(torch._C, "_functorch", None)
_interpreter = getattr(_functorch, "peek_interpreter_stack", _nothing)
_interpreters = getattr(_functorch, "get_interpreter_stack", _nothing)
_tracing_state = getattr(torch._C, "_get_tracing_state", _nothing)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _nothing)
_mode = getattr(torch._C, "_get_dispatch_mode", None)
_mode_keys = getattr(torch._C, "_TorchDispatchModeKey", None)
_is_included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", None)
_pre_dispatch = getattr(torch._C.DispatchKey, "PreDispatch", None)
_before_dispatch = (
    functools.partial(_is_included, _pre_dispatch) if _is_included and _pre_dispatch else _nothing
)
_is_forward_mode_enabled = getattr(torch._C, "_is_fwd_grad_enabled", lambda: True)
_is_legacy_batched = getattr(_functorch, "is_legacy_batchedtensor", lambda tensor: False)

# The transforms that the reference of a loop, being plain PyTorch, serves; those that a registered op serves;
# and those of an op without a list of tensors among its arguments.
DIFFERENTIATION = frozenset({"grad", "jvp", "functionalize", "forward"})
OP = frozenset({"export", "trace", "make_fx", "fake", "functionalize"})
OP_OF_TENSORS = OP | {"vmap"}
EVERYTHING = DIFFERENTIATION | OP_OF_TENSORS

_NAMES = {
    "grad": "torch.func.grad, vjp and jacrev",
    "jvp": "torch.func.jvp and jacfwd",
    "vmap": "torch.vmap",
    "functionalize": "torch.func.functionalize",
    "forward": "forward-mode differentiation (dual numbers)",
    "trace": "torch.jit.trace and the ONNX export built on it",
    "make_fx": "make_fx",
    "fake": "FakeTensorMode",
    "export": "torch.export",
}
_KINDS = {"Grad": "grad", "Jvp": "jvp", "Vmap": "vmap"}  # of functorch's interpreters
_BY_LOOP = (
    "rows do not depend on each other: give all samples in one batch, "
    "or call it for one sample after the other"
)
_RECORDED = (
    "the values of the rows decide how many steps run, and a recorded graph would repeat those of one batch: "
    "record the other parts of the model, or use torch.compile without fullgraph=True, which leaves it out "
    "of the graph"
)
_WAYS = {
    "grad": "use torch.autograd.grad",
    "jvp": "use torch.autograd.functional.jvp",
    "vmap": _BY_LOOP,
    "functionalize": "call it outside",
    "forward": "use torch.autograd.functional.jvp",
    "trace": _RECORDED,
    "make_fx": _RECORDED,
    "fake": "its tensors have no values to decide by: call it outside the mode, on real tensors",
    "export": _RECORDED,
}


def enter(
    called: str,
    tensors: Sequence[Any],
    kernels: Collection[str] = (),
    reference: Collection[str] = DIFFERENTIATION,
    decides: Any = None,
) -> Watch | None:
    """Raise, before work begins, if a transform is active that the call cannot serve.

    Parameters
    ----------
    called : str
        Name of the function that the user called, for the message.
    tensors : sequence of pytree of Tensor
        Its arguments; leaves that are not tensors are ignored.
    kernels, reference : collection of str
        The transforms that the kernels serve, and those that the reference serves, named as in this module.
    decides : optional
        A tensor whose values decide shapes. It must not have a batch of ``vmap``, on the reference either.

    Returns
    -------
    Watch or None
        A check for the results of the user's functions; None, the usual case, if there is nothing to check.

    Raises
    ------
    RuntimeError
        If the call cannot serve an active transform. The message names the transform and the way out.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo knows the transforms that it traces through
        return None
    if (
        _interpreter() is None
        and forward_ad._current_level < 0
        and _tracing_state() is None
        and not _dispatch_modes()
        and not _before_dispatch()
    ):
        return None
    return _look(called, tensors, kernels, reference, decides)


def without_address() -> bool:
    """Whether a kernel must go through torch's dispatcher: a graph is being recorded, or a mode is active."""
    return torch.compiler.is_compiling() or bool(_dispatch_modes())


def is_direct(tensor: Tensor) -> bool:
    """Whether torch's dispatcher, without a gradient, would only call the kernel of an op on `tensor`."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(tensor) is Tensor
        and (tensor.is_cpu or tensor.is_cuda)
        and _interpreter() is None
        and not _dispatch_modes()
        and _tracing_state() is None
        and not _before_dispatch()
        and not torch.compiler.is_compiling()
    )


def is_plain_call() -> bool:
    """Whether nothing traces, transforms or counts the operations of a call."""
    return (
        not torch.compiler.is_compiling()
        and _interpreter() is None
        and forward_ad._current_level < 0
        and _tracing_state() is None
        and not _dispatch_modes()
        and not _before_dispatch()
    )


def has_values() -> bool:
    """Whether the values of tensors can be read: no graph is being traced, and no tensor is fake."""
    if torch.compiler.is_compiling():
        return False
    return (_interpreter() is None and not _dispatch_modes()) or not {"fake", "functionalize"}.intersection(
        _active()
    )


def on_values(look: Callable[[], int]) -> int:
    """Return ``look()``, a number read from tensors, without recording its operations."""
    if not _dispatch_modes() and not _before_dispatch():
        return look()
    with _python_dispatch._disable_current_modes():
        return look()


class Watch:
    """A check for tangents and batches that reach a call through the results of the user's functions."""

    def __init__(self, called: str, forbidden: Collection[str], reference: Collection[str]) -> None:
        self._called = called
        self._forbidden = forbidden
        self._reference = reference

    def __call__(self, where: str, tree: Any) -> None:
        """Raise if a tensor in `tree` has a tangent or a batch of ``vmap`` that would be dropped."""
        for tensor in pytree.tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            if "vmap" in self._forbidden and (_is_batched(tensor) or _loses_gradient(tensor)):
                _refuse(self._called, "vmap", self._reference, where)
            if "forward" in self._forbidden and _has_tangent(tensor):
                _refuse(self._called, "forward", self._reference, where)

    def refuse(self, kind: str) -> None:
        """Raise if `kind` is among the transforms that the call cannot serve."""
        if kind in self._forbidden:
            _refuse(self._called, kind, self._reference)

    def wrap(self, where: str, function: _Function) -> _Function:
        """Return `function` with a check of its results."""

        @functools.wraps(function, updated=())
        def watched(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self(where, result)
            return result

        return watched  # type: ignore[return-value]


def check_gradients(called: str, gradients: Iterable[Any]) -> None:
    """Raise, in a backward pass, if a gradient is a batch of gradients or has a tangent."""
    if torch.compiler.is_compiling():
        return
    dual = forward_ad._current_level >= 0
    for gradient in gradients:
        if gradient is not None and _is_legacy_batched(gradient):
            raise RuntimeError(
                f"The backward pass of {called} does not support batches of gradients "
                "(is_grads_batched=True, or vectorize=True of torch.autograd.functional): leave the option "
                "out, and torch takes one gradient after the other."
            )
        if dual and gradient is not None and _has_tangent(gradient):
            _refuse(f"the backward pass of {called}", "forward", ())


def apart(called: str, function: _Function) -> _Function:
    """Exclude `function` from graphs of torch.compile; where a graph may not be split, the error says why.

    ``torch.compiler.disable`` would import Dynamo, which takes as long as torch itself. Torch's own helper
    imports it at the first call. Dynamo knows such a function, and its reason, by the two attributes.
    """
    outside: Callable[..., Any] = torch._disable_dynamo(function)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        return outside(*arguments, **options)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        f"{called} does not support torch.compile(fullgraph=True) here, nor torch.export: {_RECORDED}. The "
        "page of promises lists what can be one operator of a graph."
    )
    return run  # type: ignore[return-value]


def _look(
    called: str, tensors: Sequence[Any], kernels: Collection[str], reference: Collection[str], decides: Any
) -> Watch | None:
    served = reference if on_reference() else kernels
    active = _active()
    for kind in active:
        if kind not in served and kind not in ("vmap", "forward"):
            _refuse(called, kind, reference)
    if "vmap" in active:
        if isinstance(decides, Tensor) and _is_batched(decides):
            _refuse(called, "vmap", ())
        if kernels and any(
            isinstance(t, Tensor) and _loses_gradient(t) for t in pytree.tree_leaves(list(tensors))
        ):
            _refuse(called, "vmap", reference)
    # These two do harm only if a tensor has a batch or a tangent.
    forbidden = {"vmap", "forward"}.intersection(active).difference(served)
    if not forbidden:
        return None
    watch = Watch(called, forbidden, reference)
    watch("", tensors)
    return watch


def _active() -> list[str]:
    """Return the active transforms, tracers and modes, the most specific ones first."""
    kinds = ["export"] if getattr(torch.compiler, "is_exporting", bool)() else []
    if _tracing_state() is not None:
        kinds.append("trace")
    if _mode is not None and _mode_keys is not None:
        for kind, key in (("make_fx", "PROXY"), ("fake", "FAKE"), ("functionalize", "FUNCTIONAL")):
            if _mode(getattr(_mode_keys, key)) is not None:
                kinds.append(kind)
    if _before_dispatch():
        kinds.append("make_fx")
    kinds += [_KINDS.get(interpreter.key().name, "functionalize") for interpreter in _interpreters() or ()]
    if forward_ad._current_level >= 0:
        kinds.append("forward")
    return kinds


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor and the tensors that functorch has wrapped in it, from the outside to the inside."""
    yield tensor
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def _loses_gradient(tensor: Tensor) -> bool:
    """Whether a tensor needs a gradient under ``vmap``, which the kernels do not provide."""
    return (
        torch.is_grad_enabled()
        and not on_reference()
        and any(layer.requires_grad for layer in _layers(tensor))
    )


def _is_batched(tensor: Tensor) -> bool:
    return _functorch is not None and any(_functorch.is_batchedtensor(layer) for layer in _layers(tensor))


def _has_tangent(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def _refuse(called: str, kind: str, reference: Collection[str], where: str = "") -> NoReturn:
    way = _WAYS[kind]
    if kind in reference:
        way += ", or run it inside adaptcomp_ext.reference_kernels(), whose plain PyTorch supports it"
    came = (
        f", and {where} returned a tensor with {'a batch or a gradient' if kind == 'vmap' else 'a tangent'}"
        if where
        else ""
    )
    raise RuntimeError(f"{called} does not support {_NAMES[kind]}{came}: {way}.")


def is_in_a_function() -> bool:
    """Whether this is the forward pass of a ``torch.autograd.Function``, as of a reentrant checkpoint.

    It runs without gradients, and its backward pass may repeat it with gradients. A step draws random numbers
    by place in the block, so that the block has to hold the same rows in the same places. torch disables
    forward mode there, and elsewhere only in inference mode.
    """
    return not (_is_forward_mode_enabled() or torch.is_inference_mode_enabled())
