"""The demonstration: a reader of digits that looks longer at hard ones, and the time that this saves.

``model`` is the reader, ``training`` trains it, ``baselines`` times the ways of running it, ``measure`` is
one seed of all that, and ``experiment`` declares it and reports.
"""

from .experiment import demo

__all__ = ["demo"]
