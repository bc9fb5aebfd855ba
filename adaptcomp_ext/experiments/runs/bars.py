"""The progress of cells on a terminal: one bar for each."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bars"]


class Bars:
    """A context manager that shows a bar for each cell.

    Parameters
    ----------
    console : Console
        Where the bars are shown.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._done: set[str] = set()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def wait(self, name: str) -> None:
        """Add the bar of a cell that has not begun; its clock stands until `show`."""
        self._tasks[name] = self._progress.add_task(name, total=1.0, what="waiting", start=False)

    def show(self, name: str, what: str, done: float) -> None:
        """Show what a cell is doing and the share of it that is done; nothing more once `done` was called."""
        if name in self._done:  # what another process sent before its result may come after it
            return
        if name not in self._tasks:
            self.wait(name)
        self._progress.start_task(self._tasks[name])
        self._progress.update(self._tasks[name], completed=done, what=what)

    def done(self, name: str) -> None:
        """Show that a cell is done."""
        self.show(name, "done", 1.0)
        self._done.add(name)

    def say(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self._progress.console.print(sentence)
