"""The benchmarks.

Of the halting benchmark, one idea per module: ``halting`` runs it, ``grid`` says what is run, ``measure``
verifies and times one configuration, ``contenders`` lists who takes part (``masked`` and ``indexed`` are the
rivals), ``cores`` and ``schedule`` script the halting, ``memory`` and ``cuda`` are sections of their own,
``report`` and ``figure`` present the result.

``energy`` is the benchmark of energy descent and ``route`` that of routing, packages of their own. All use
``timing``, ``agreement``, ``compiling``, ``machine``, ``files``, ``progress`` and ``markdown``.
"""

from .energy import bench_energy
from .halting import bench_halting
from .route import bench_route

__all__ = ["bench_energy", "bench_halting", "bench_route"]
