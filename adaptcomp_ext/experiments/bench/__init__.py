"""The benchmarks, one file each, on one `harness`; `machine` says what they were measured on.

The forms that halting and energy time are in a second file each: the first look at a GPU times them as well.
So are those of recurrence, which needs some of halting's.
"""

from .batcher import BatcherBenchmark
from .energy import EnergyBenchmark
from .equilibrium import EquilibriumBenchmark
from .halting import HaltingBenchmark
from .planning import PlanningBenchmark
from .recurrence import RecurrenceBenchmark
from .route import RouteBenchmark

__all__ = [
    "BENCHMARKS",
    "bench_batcher",
    "bench_energy",
    "bench_equilibrium",
    "bench_halting",
    "bench_planning",
    "bench_recurrence",
    "bench_route",
]

BENCHMARKS = (
    HaltingBenchmark,
    RecurrenceBenchmark,
    EnergyBenchmark,
    RouteBenchmark,
    PlanningBenchmark,
    BatcherBenchmark,
    EquilibriumBenchmark,
)

bench_halting = HaltingBenchmark.bench
bench_energy = EnergyBenchmark.bench
bench_route = RouteBenchmark.bench
bench_equilibrium = EquilibriumBenchmark.bench
bench_planning = PlanningBenchmark.bench
bench_recurrence = RecurrenceBenchmark.bench
bench_batcher = BatcherBenchmark.bench
