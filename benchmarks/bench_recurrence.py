"""``adaptcomp bench recurrence`` where torch is all there is.

To try it: ``python benchmarks/bench_recurrence.py --quick``.
"""

from adaptcomp_ext.experiments.bench import RecurrenceBenchmark

if __name__ == "__main__":
    RecurrenceBenchmark.main()
