"""``adaptcomp bench energy`` where torch is all there is: ``python benchmarks/bench_energy.py --quick``."""

from adaptcomp_ext.experiments.bench import EnergyBenchmark

if __name__ == "__main__":
    EnergyBenchmark.main()
