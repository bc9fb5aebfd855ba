"""``adaptcomp bench batcher`` where torch is all there is: ``python benchmarks/bench_batcher.py --quick``."""

from adaptcomp_ext.experiments.bench import BatcherBenchmark

if __name__ == "__main__":
    BatcherBenchmark.main()
