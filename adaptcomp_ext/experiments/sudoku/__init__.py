"""Reasoning by energy: a Sudoku is solved by descending a learnt energy, longer where the puzzle is harder.

``puzzles`` and ``nine`` make the puzzles and hold some out, ``model`` has the energy and two networks to
compare it with, ``training`` trains them, ``evaluation`` measures what they solve in how many steps,
``measure`` is one seed of all that, and ``experiment`` declares it and reports.
"""

from .experiment import sudoku

__all__ = ["sudoku"]
