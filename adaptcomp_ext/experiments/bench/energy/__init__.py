"""The benchmark of energy descent, a small package: one idea per module.

``run`` runs it, ``grid`` says what is run, ``problem`` builds one configuration (``starts`` the points from
which rows stop when they should), ``contenders`` lists who takes part (``functions``, ``loops`` and
``analytic`` are the rivals), ``measure`` verifies and times them, ``memory`` is a section of its own,
``bars`` says what is asked of the ratios, ``report`` and ``figure`` present the result.
"""

from .run import bench_energy

__all__ = ["bench_energy"]
