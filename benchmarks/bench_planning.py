"""Run the planning benchmark: ``python benchmarks/bench_planning.py --quick --out results/quick``.

The same as ``adaptcomp bench planning``; needs torch and the package, none of its extras.
"""

from adaptcomp_ext.experiments.bench import PlanningBenchmark

if __name__ == "__main__":
    PlanningBenchmark.main()
