"""The halting benchmark, a small package: one idea per module.

``halting`` runs it, ``grid`` says what is run, ``measure`` verifies and times one configuration, ``contenders`` lists
who takes part (``masked`` and ``indexed`` are the rivals), ``cores`` and ``schedule`` script the halting, ``memory``
and ``cuda`` are sections of their own, ``report`` and ``figure`` present the result.
"""

from .halting import bench_halting

__all__ = ["bench_halting"]
