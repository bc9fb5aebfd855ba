"""Reasoning by energy: a Sudoku is solved by descending a learnt energy, longer where the puzzle is harder.

``puzzles`` and ``nine`` make the puzzles and hold some out, ``model`` has the energy and two networks to
compare it with, ``training`` trains them, ``measure`` is one seed and what it solves in how many steps, and
``experiment`` declares it and reports.
"""

from .experiment import sudoku

__all__ = ["sudoku"]
