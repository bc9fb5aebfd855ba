"""``adaptcomp bench planning`` where torch is all there is: ``python benchmarks/bench_planning.py``."""

from adaptcomp_ext.experiments.bench import PlanningBenchmark

if __name__ == "__main__":
    PlanningBenchmark.main()
