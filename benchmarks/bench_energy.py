"""
Run the energy benchmark: ``python benchmarks/bench_energy.py --quick --out results/quick``.

The same as ``adaptcomp bench energy``, for a checkout without the command line's dependencies.
"""

from __future__ import annotations

import argparse

from adaptcomp_ext.experiments.bench import bench_energy


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description="Energy descent against autograd, compiled and hand-written loops."
    )
    parser.add_argument("--out", default="results/bench_energy", help="folder of the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small grid: less than a minute")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="per configuration")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tensors and step counts")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    bench_energy(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
