"""The number of active rows, as far as the host knows it while the device is working."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from adaptcomp_ext.ops._backend import capturing, current, on_cuda
from adaptcomp_ext.ops._checks import describe

LAG = 2
"""The default lag: the host reads the count of the step before last while the device runs the last one."""

_SMALLEST_BUCKET = 32


def bucket(rows: int) -> int:
    """Round `rows` up to a power of two, or 1.5 times one, so that the step gets few different sizes."""
    if rows <= _SMALLEST_BUCKET:
        return _SMALLEST_BUCKET
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


def check_lag(lag: object) -> int | None:
    """Require a lag of `ActiveCount`."""
    if lag is None or (isinstance(lag, int) and not isinstance(lag, bool) and lag >= 1):
        return lag
    error = ValueError if isinstance(lag, int) and not isinstance(lag, bool) else TypeError
    raise error(f"lag: expected an int >= 1 or None, got {describe(lag)}")


class _Copy:
    """A copy of the count in the host's memory, which may still be on its way."""

    def __init__(self, word: Tensor, count: int, device: torch.device) -> None:
        self._word = word.fill_(count)
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, count: Tensor) -> None:
        """Queue the copy behind the work that is already queued on the count's device."""
        # It goes to the current stream of the count's device, whichever device is current.
        self._word.copy_(count, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> int:
        """Wait for the copy, and return the count."""
        if self._event is not None:
            self._event.synchronize()
        return self.peek()

    def peek(self) -> int:
        """Return the count that is here now, without waiting: an aligned word arrives in one piece."""
        return int(self._word)


class ActiveCount:
    """An upper bound on the number of active rows on a CUDA device.

    The count is on the device and can only fall, so that an old copy of it is a valid bound. After every step
    a copy is sent to pinned memory, on the device and the current stream of the rows.

    Parameters
    ----------
    rows : int
        Number of rows at the beginning.
    device : torch.device
        Their device.
    lag : int or None
        The size of a block follows from the count `lag` steps before, at least 1. With 1 the host waits for
        the last step. With 2 it waits for the step before last, while the device runs the last one. Block
        sizes then depend on the data alone. With None the host never waits, and takes the newest count that
        has arrived: block sizes depend on the clock.

    Notes
    -----
    While a CUDA graph is captured the host must read nothing: the bound stays, and the graph has all steps.
    """

    _CHUNK = 8  # words of pinned memory that are allocated together

    def __init__(self, rows: int, device: torch.device, lag: int | None = LAG) -> None:
        self.running = torch.full((), rows, dtype=torch.int64, device=device)
        self._lag = lag
        self._bound = rows
        self._device = device
        self._sent: deque[_Copy] = deque()
        self._free: list[_Copy] = []
        self._capturing = False
        if on_cuda(device):
            with current(device):
                self._capturing = capturing()

    def bound(self) -> int:
        """Send the count of the step that was just queued, and return the bound for the next block."""
        if self._capturing:
            return self._bound
        if not self._free:
            self._free = self._copies(1 if self._lag is None else min(self._lag, self._CHUNK))
        if self._lag is None:
            # Copies overwrite each other in the order of the stream, so that the word is always the count
            # after one of the steps.
            self._free[0].send(self.running)
            self._bound = self._free[0].peek()
            return self._bound
        copy = self._free.pop()
        copy.send(self.running)
        self._sent.append(copy)
        if len(self._sent) == self._lag:
            copy = self._sent.popleft()
            self._bound = copy.read()
            self._free.append(copy)
        return self._bound

    @property
    def exact(self) -> bool:
        """Whether the bound is the number of active rows after the last step."""
        return self._lag == 1 and not self._capturing

    def none_ran(self) -> bool:
        """Whether the host knows that no row was active before the last step."""
        return self._bound == 0 and self._lag is not None and self._lag > 1

    def _copies(self, count: int) -> list[_Copy]:
        words = torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")
        return [_Copy(word, self._bound, self._device) for word in words.unbind()]
