"""Run the energy benchmark: ``python benchmarks/bench_energy.py --quick --out results/quick``.

The same as ``adaptcomp bench energy``; needs torch and the package, none of its extras.
"""

from adaptcomp_ext.experiments.bench import EnergyBenchmark

if __name__ == "__main__":
    EnergyBenchmark.main()
