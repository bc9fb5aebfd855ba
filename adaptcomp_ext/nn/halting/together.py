"""Processes that step together: `AdaptiveHalt`'s ``process_group``.

A step whose parameters are sharded over processes gathers them at every call, forward and backward, so that
all processes have to call it equally often. A process whose rows have all halted goes on with empty blocks
until the rows of all processes have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adaptcomp_ext.ops._checks import describe


class Together:
    """The processes of a group. A copy of the module has the same group, and a pickle has none."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> Together:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def any_runs(self, running: int, device: torch.device) -> bool:
        """Whether a process of the group has an active row; all processes have to ask."""
        count: Tensor = torch.tensor(running, device=device)
        dist.all_reduce(count, dist.ReduceOp.MAX, self.group)
        return bool(count)


def check_process_group(group: Any) -> Together | None:
    """Require a process group of torch.distributed, or None."""
    if group is None or isinstance(group, Together):
        return group
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup or None, got {describe(group)}"
        )
    return Together(group)
