"""The benchmark of routing, a small package: one idea per module.

``run`` runs it, ``problem`` says what is run and builds one configuration, ``contenders`` lists who takes
part, ``measure`` verifies and times them, ``report`` presents the result.
"""

from .run import bench_route

__all__ = ["bench_route"]
