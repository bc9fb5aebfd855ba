"""``adaptcomp bench halting`` where torch is all there is: ``python benchmarks/bench_halting.py --quick``."""

from adaptcomp_ext.experiments.bench import HaltingBenchmark

if __name__ == "__main__":
    HaltingBenchmark.main()
