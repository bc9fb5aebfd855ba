"""The demonstration: a reader of digits that looks longer at hard ones, and the time that this saves.

``model`` is the reader, ``training`` trains it, ``contenders`` times the ways of running it, ``figure`` draws
what came out, and ``report`` runs all that and prints it.
"""

from .report import demo

__all__ = ["demo"]
