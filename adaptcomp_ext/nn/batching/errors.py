"""The errors of samples, which name a sample by its index."""

from __future__ import annotations


class SampleError(RuntimeError):
    """A sample of a `ContinuousBatcher` that has no result.

    Its ``__cause__`` is the error of the step, which has failed all rows that were in flight. A sample that
    does not have the form of the others raises a subclass that is also a TypeError and a ValueError.

    Attributes
    ----------
    index : int
        The sample's index in its stream, or the number of its `ContinuousBatcher.submit`, counted from 0.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)
        self.index = index

    def __str__(self) -> str:
        return f"sample {self.index}: {self.args[1]}"


class BadSampleError(SampleError, TypeError, ValueError):
    """A sample of another structure, shape, dtype or device than the first one."""


def failed(index: int, cause: BaseException) -> SampleError:
    """Return the error of a sample that was in flight when `cause` was raised."""
    error = SampleError(index, f"{type(cause).__name__} while it was in flight: {cause}")
    error.__cause__ = cause
    return error


def refused(index: int, cause: Exception) -> BadSampleError:
    """Return the error of a sample that was refused."""
    error = BadSampleError(index, str(cause))
    error.__cause__ = cause
    return error
