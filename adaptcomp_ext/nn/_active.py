"""How many rows are still running, as far as the host knows without waiting."""

from __future__ import annotations

import torch

_SMALLEST_BUCKET = 32


def bucket(rows: int) -> int:
    """`rows` rounded up to a power of two or one and a half times one, so that the step sees few different sizes."""
    if rows <= _SMALLEST_BUCKET:
        return _SMALLEST_BUCKET
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


class ActiveCount:
    """An upper bound on the rows still running on a CUDA device, which never blocks the host.

    The count lives on the device and can only fall, so an old copy of it is a valid bound. After every step a copy is sent to
    pinned memory, with an event behind it; `bound` takes the newest copy whose event has passed.
    """

    def __init__(self, rows: int, max_steps: int, device: torch.device) -> None:
        self.running = torch.full((), rows, dtype=torch.int64, device=device)
        self._bound = rows
        self._capturing = torch.cuda.is_current_stream_capturing()
        # While a graph is captured the host must learn nothing: the bound stays, and the graph holds every step.
        self._copies = None if self._capturing else torch.empty(max_steps, dtype=torch.int64, pin_memory=True)
        self._pending: list[tuple[torch.cuda.Event, int]] = []
        self._posted = 0

    def post(self) -> None:
        """Send the count as it is now to the host."""
        if self._copies is None:
            return
        self._copies[self._posted].copy_(self.running, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, self._posted))
        self._posted += 1

    def bound(self) -> int:
        """The smallest bound that has arrived."""
        while self._pending and self._pending[0][0].query():
            assert self._copies is not None
            self._bound = int(self._copies[self._pending.pop(0)[1]])
        return self._bound
