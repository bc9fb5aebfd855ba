"""Run the routing benchmark: ``python benchmarks/bench_route.py --quick --out results/quick``.

The same as ``adaptcomp bench route``; needs torch and the package, none of its extras.
"""

from adaptcomp_ext.experiments.bench import RouteBenchmark

if __name__ == "__main__":
    RouteBenchmark.main()
