"""What runs the rows of a `ContinuousBatcher`, and the choice of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Engine(ABC):
    """Rows that have been accepted and have not ended.

    A user's samples come in by `put` and their results come out of `advance`, each with its key.
    """

    calls = 0
    """Number of blocks that were run."""
    row_steps = 0
    """Number of steps of all rows."""
    capacity = 0
    """Number of rows that the blocks that were run have room for, all together; 0: unknown."""
    held = 0
    """Number of rows."""

    @property
    @abstractmethod
    def room(self) -> int:
        """Number of samples that are taken now."""

    @abstractmethod
    def put(self, sample: Any, key: int, sample_id: int) -> None:
        """Accept a copy of a sample; TypeError or ValueError if it is not like the others."""

    @abstractmethod
    def advance(self) -> list[tuple[int, Any]]:
        """Run a block, and return keys and results of the rows that have ended. There has to be a row."""

    @abstractmethod
    def drop(self) -> None:
        """Forget all rows, after an error."""
