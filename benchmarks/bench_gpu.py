"""A first look at a GPU, where torch is all there is: ``python benchmarks/bench_gpu.py --out bench.json``."""

from adaptcomp_ext.experiments.bench.gpu import main

if __name__ == "__main__":
    main()
