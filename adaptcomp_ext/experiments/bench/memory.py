"""Training memory: what autograd keeps between forward and backward, as a function of the steps really taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .contenders import forward_contenders
from .grid import FRACTIONS
from .problem import Config, make_model, make_problem

__all__ = ["memory_rows", "saved_bytes"]


class _Saved:
    """Handle that autograd holds in place of a saved tensor, so that one can tell when it lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Any], ignore: Iterable[Tensor] = ()) -> int:
    """Return the bytes of distinct storages saved for backward and still held when the forward pass ends.

    This is their peak, since the backward pass only frees them.

    Parameters
    ----------
    forward : callable
        Builds the graph; what it returns keeps the graph alive.
    ignore : iterable of Tensor
        Tensors that are there anyway, such as weights and inputs.
    """
    live: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        handle = _Saved(tensor)
        live.add(handle)
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        graph = forward()
    storages = {s.data_ptr(): s.nbytes() for s in (handle.tensor.untyped_storage() for handle in live)}
    for tensor in ignore:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del graph
    return sum(storages.values())


def memory_rows(
    cores: tuple[str, ...],
    device: torch.device,
    seed: int,
    sizes: tuple[tuple[int, int], ...] = ((256, 128), (1024, 256)),
    fractions: tuple[float, ...] = FRACTIONS,
) -> list[dict[str, Any]]:
    """Measure saved bytes of the masked form, of boolean indexing and of AdaptiveHalt over mean/M.

    One core, M = 16, ``fixed`` and ``act``. ``row_steps`` is the sum of steps over all rows: ours should
    follow it, the masked form B times the longest row.
    """
    core = cores[0]
    found = []
    for policy in ("fixed", "act"):
        for batch, dim in sizes:
            for fraction in fractions:
                config = Config(
                    core, batch, dim, fraction=fraction, policy=policy, training=True, compiled=False
                )
                problem = make_problem(config, make_model(config, device, seed), device, seed)
                calls = forward_contenders(problem, None)
                ignore = [*problem.leaves, *problem.state, *problem.inputs, problem.steps]
                found.append(
                    {
                        "config": config.as_dict(),
                        "row_steps": int(problem.steps.sum()),
                        "masked_row_steps": batch * int(problem.steps.max()),
                        "bytes": {name: saved_bytes(call, ignore) for name, call in calls.items()},
                    }
                )
    return found
