"""How a command ends that cannot go on: one sentence on standard error, and an exit code."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer

__all__ = ["INTERRUPTED", "guarded"]

REFUSED, INTERRUPTED = 2, 130  # 130 is a shell's own code for Ctrl-C
FULL = (errno.ENOSPC, errno.EDQUOT)

Command = TypeVar("Command", bound=Callable[..., None])


def guarded(
    resume: str | None, refusals: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Callable[[Command], Command]:
    """Decorate a command.

    Parameters
    ----------
    resume : str, optional
        How the run goes on that a full disk or Ctrl-C has ended, such as "the same command goes on where this
        run ended". None: it does not, and the sentence says that.
    refusals : tuple of exception types
        What a command raises about its arguments and files, whose message is a sentence for the user.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*arguments: Any, **options: Any) -> None:
            try:
                command(*arguments, **options)
            except KeyboardInterrupt:
                raise _end(f"interrupted; {resume or AGAIN}", INTERRUPTED) from None
            except OSError as error:
                if error.errno in FULL:
                    what = (
                        f"{error.filename} could not be written"
                        if error.filename
                        else "a file could not be written"
                    )
                    raise _end(
                        f"the disk is full: {what}; free some space, then {resume or AGAIN}", REFUSED
                    ) from None
                if not isinstance(error, refusals):
                    raise
                raise _end(str(error), REFUSED) from None
            except refusals as error:
                raise _end(str(error), REFUSED) from None

        return run  # type: ignore[return-value]

    return decorate


AGAIN = "nothing of this run is kept, and the same command begins it anew"


def _end(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"adaptcomp: {sentence}", err=True)
    return typer.Exit(code)
