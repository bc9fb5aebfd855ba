"""``adaptcomp bench equilibrium`` where torch is all there is.

``python benchmarks/bench_equilibrium.py --quick``
"""

from adaptcomp_ext.experiments.bench import EquilibriumBenchmark

if __name__ == "__main__":
    EquilibriumBenchmark.main()
