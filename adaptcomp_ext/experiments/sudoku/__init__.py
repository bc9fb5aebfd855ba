"""Reasoning by energy: an answer to a Sudoku is found by descending a learnt energy, longer where the puzzle is harder.

``puzzles`` makes the puzzles and keeps some apart, ``model`` holds the energy and two networks to compare it
with, ``training`` trains them, ``evaluation`` says what they solve in how many steps, ``figure`` draws that,
and ``report`` runs it all.
"""

from .report import sudoku

__all__ = ["sudoku"]
