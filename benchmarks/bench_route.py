"""``adaptcomp bench route`` where torch is all there is: ``python benchmarks/bench_route.py --quick``."""

from adaptcomp_ext.experiments.bench import RouteBenchmark

if __name__ == "__main__":
    RouteBenchmark.main()
