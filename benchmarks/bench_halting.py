"""Run the halting benchmark: ``python benchmarks/bench_halting.py --quick --out results/quick``.

The same as ``adaptcomp bench halting``; needs torch and the package, none of its extras.
"""

from adaptcomp_ext.experiments.bench import HaltingBenchmark

if __name__ == "__main__":
    HaltingBenchmark.main()
