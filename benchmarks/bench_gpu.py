"""Take a first look at a GPU in a few minutes: ``python benchmarks/bench_gpu.py --out bench.json``.

Needs torch and the package, none of its extras.
"""

from adaptcomp_ext.experiments.bench.gpu import main

if __name__ == "__main__":
    main()
