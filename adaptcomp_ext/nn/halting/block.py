"""The constants of a run, and the checks of states and readouts, for both halting loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn._active import LAG
from adaptcomp_ext.nn._tree import flatten, flatten_like, form, unflatten
from adaptcomp_ext.nn.halting.cost_model import at_once, never, schedule
from adaptcomp_ext.nn.halting.policy import Policy, Run, explain_call
from adaptcomp_ext.nn.halting.together import Together
from adaptcomp_ext.ops._backend import DTYPE_CODES
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops._plain import Kinds, check_memory, dress, is_dense, kinds_of, plain
from adaptcomp_ext.ops._transforms import Watch


class StructureError(TypeError, ValueError):
    """A state of another structure. The first versions raised TypeError, which callers may catch."""


@dataclass(slots=True)
class Problem:
    """One call of `AdaptiveHalt`, checked."""

    run: Run
    policy: Policy
    steps: Iterable[Callable[..., Any]]  # one for each step
    readout: Any  # a function of the state once `calling.bind` has run; before, the user's, or None
    state: list[Tensor]
    structure: Any
    kinds: Kinds  # the present classes of the state's leaves
    inputs: list[Tensor]
    input_kinds: Kinds
    input_structures: list[Any]
    has_containers: bool  # an input is a container: each call gets a new one, as the step may change it
    ordinary: bool  # all tensors are plain contiguous ones on the CPU
    compact: bool | str
    weights: int | None  # number of weights of a step, for the cost model
    watch: Watch | None  # check for an active transform
    as_in_training: bool  # blocks are laid out as with gradients, for this run or its repetition
    lag: int | None = LAG  # lag of the count of active rows, on CUDA
    holder: nn.Module | None = None  # whose functions' graphs have yet to be searched, at the first step
    staged: bool = False  # the step is a ModuleList, whose stages may change the shapes of the state
    keep_trace: bool = False
    together: Together | None = None
    first_read: tuple[torch.Size, torch.dtype, torch.device] | None = None
    result_kinds: Kinds = None  # the classes of the first step's result, which the final result gets
    readout_kind: type[Tensor] | None = None
    like: _C.StateLike = field(init=False)
    shapes: list[torch.Size] = field(init=False)  # of a row of each leaf, at the present stage

    def __post_init__(self) -> None:
        self._expect(self.state)

    def _expect(self, leaves: list[Tensor]) -> None:
        self.like = _C.StateLike(leaves, form(self.structure))
        self.shapes = [t.shape[1:] for t in leaves]

    def schedule(self) -> _C.Schedule:
        """Make the schedule of compaction for a run without gradients."""
        if self.compact == "auto":
            return schedule(self.weights, self.state, self.inputs)
        return at_once() if self.compact else never()

    def arguments(self, inputs: list[Tensor]) -> tuple[Any, ...]:
        """Rebuild the step's inputs from their leaves."""
        if self.input_kinds is not None:
            inputs = list(dress(inputs, self.input_kinds))
        out, start = [], 0
        for structure in self.input_structures:
            count = structure.num_leaves
            out.append(unflatten(inputs[start : start + count], structure))
            start += count
        return tuple(out)

    def leaves(self, tree: Any, rows: int) -> list[Tensor]:
        """Return the leaves of the step's result."""
        leaves = self.like.take(tree, rows)
        if leaves is None:
            leaves = self.check_state(tree, rows)
        else:
            self.kinds = None
        return leaves

    def tree(self, leaves: list[Tensor]) -> Any:
        """Build a state from plain leaves, in the classes of the step's result."""
        return unflatten(leaves if self.kinds is None else list(dress(leaves, self.kinds)), self.structure)

    def change_shapes(self, leaves: list[Tensor], n: int) -> list[Tensor] | None:
        """Where step n has changed the shapes of the state, expect them from now on; return room for results.

        From the second step on rows may have ended with the shapes of before, so that nothing but a readout
        has one shape for all rows.
        """
        if not self.staged or all(
            leaf.shape[1:] == shape for leaf, shape in zip(leaves, self.shapes, strict=True)
        ):
            return None
        if n > 1 and self.readout is None:
            raise ValueError(
                "readout: expected one where stages of the step change the shape of the state, because rows "
                f"that halt at different stages have no output of one shape; got None, and a state of "
                f"{[list(leaf.shape) for leaf in leaves]} after step {n}"
            )
        self._expect(leaves)
        return self.room(leaves)

    def room(self, leaves: list[Tensor]) -> list[Tensor]:
        """Allocate a tensor for each leaf that takes the last state of every row."""
        return [
            torch.empty(
                (self.run.batch, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device, requires_grad=False
            )
            for leaf in leaves
        ]

    def last_states(self, results: list[tuple[int, list[Tensor]]], steps: Tensor) -> Any:
        """Return the last states: a state, or a list of one for each step where their shapes differ.

        `results`: for each shape of the state, the first step that has it, and the tensors of all rows.
        """
        self.kinds = self.result_kinds
        if len(results) == 1:
            return self.tree(results[0][1])
        states, of_all = [], iter(results)
        _, leaves = next(of_all)
        following = next(of_all, None)
        for n in range(1, (int(steps.max()) if steps.numel() else 0) + 1):
            if following is not None and following[0] == n:
                leaves, following = following[1], next(of_all, None)
            rows = (steps == n).nonzero()[:, 0]
            states.append(self.tree([leaf.index_select(0, rows) for leaf in leaves]))
        return states

    def check_state(self, tree: Any, rows: int) -> list[Tensor]:
        """Return the leaves of the step's result, which has to have the form of the initial state."""
        leaves, structure = flatten_like(tree, self.structure)
        if structure is not self.structure and structure != self.structure:
            raise StructureError(
                f"step: expected a state with the structure {self.structure}, got {describe_tree(tree)}"
            )
        self.kinds = kinds_of(leaves)
        for i, (leaf, first) in enumerate(zip(leaves, self.state, strict=True)):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"step: expected Tensors in the state, got {describe(leaf)}")
            leaf = leaves[i] = plain("step", leaf)
            if not is_dense(leaf):
                raise TypeError(f"step: expected dense tensors in the state, got {describe(leaf)}")
            shape = (rows, *self.shapes[i])
            if leaf.shape != shape and not (self.staged and leaf.shape[:1] == (rows,)):
                expected = f"{rows} rows" if self.staged else f"the state's shape {list(shape)}"
                raise ValueError(f"step: expected it to keep {expected}, got {list(leaf.shape)}")
            if leaf.dtype != first.dtype:
                if not (torch.is_autocast_enabled(leaf.device.type) and leaf.is_floating_point()):
                    raise TypeError(
                        f"step: expected it to keep the state's dtype {first.dtype}, got {leaf.dtype}"
                    )
                leaves[i] = leaf.to(first.dtype)
            if leaf.device != first.device:
                raise ValueError(f"step: expected it to keep the state on {first.device}, got {leaf.device}")
            check_memory("step", leaves[i])
        return leaves

    def read(self, state: Any, leaves: list[Tensor], rows: int) -> Tensor:
        """Return the readout of a block."""
        if self.readout is None:
            return self.check_readout(leaves[0], rows)
        try:
            readout = self.readout(state)
        except (TypeError, AttributeError) as error:
            explain_call("readout", self.readout, state, error)
            raise
        return self.check_readout(readout, rows)

    def read_leaf(self, readout: Tensor, leaves: list[Tensor]) -> int:
        """Return the index of the leaf that is the readout of logits, where −inf is valid; -1: none."""
        if self.readout is None:
            return 0 if self.policy.reads_logits else -1
        for i, leaf in enumerate(leaves):
            if leaf is readout or _same_memory(leaf, readout):
                return i
        return -1

    def check_readout(self, value: Any, rows: int) -> Tensor:
        """Return the readout as a plain tensor; it has to have the form of the first one."""
        if self.first_read is None:
            self.result_kinds = self.kinds
            if self.readout is not None:
                self.readout_kind = type(value)
                value = check_first_readout(value, rows, self.run.device)
                check_weighable(self.policy, value)
            elif self.kinds is not None:
                self.readout_kind = self.kinds[0]
            self.policy.check_readout(value)
            self.first_read = (value.shape[1:], value.dtype, value.device)
        elif self.readout is not None:
            value = check_rows(value, rows)
            if (value.shape[1:], value.dtype, value.device) != self.first_read:
                shape, dtype, device = self.first_read
                expected = f"a tensor of shape {[rows, *shape]}, {dtype}, on {device}"
                raise ValueError(f"readout: expected {expected}, as at the first step, got {describe(value)}")
        result: Tensor = value
        return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numel() == b.numel() and a.data_ptr() == b.data_ptr()


def check_rows(value: object, rows: int) -> Tensor:
    """Require that the readout is a real tensor with `rows` rows, and return it as a plain one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"readout: expected it to return a Tensor, got {describe(value)}")
    value = plain("readout", value)
    if value.is_complex():
        raise TypeError(f"readout: expected a real dtype, got {value.dtype}")
    if not is_dense(value):
        raise TypeError(f"readout: expected a dense tensor, got {describe(value)}")
    if value.dim() == 0 or value.shape[0] != rows:
        raise ValueError(f"readout: expected {rows} rows, got shape {list(value.shape)}")
    check_memory("readout", value)
    return value


def check_first_readout(value: object, rows: int, device: torch.device) -> Tensor:
    """Require a real tensor with `rows` rows on `device`."""
    value = check_rows(value, rows)
    if value.device != device:
        raise ValueError(f"readout: expected a tensor on {device}, got one on {value.device}")
    return value


def check_weighable(policy: Policy, readout: Tensor) -> None:
    """Require a floating-point readout if the policy weights it."""
    if policy.weighted and readout.dtype not in DTYPE_CODES:
        name = type(policy).__name__
        raise TypeError(
            f"readout: {name} adds up weighted readouts, which takes floating point, got {readout.dtype}"
        )


def describe_tree(tree: Any) -> str:
    """Describe a returned state for an error message."""
    return describe(tree) if tree is None or isinstance(tree, Tensor) else str(flatten(tree)[1])
