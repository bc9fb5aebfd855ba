"""
Run the halting benchmark: ``python benchmarks/bench_halting.py --quick --out results/quick``.

The same as ``adaptcomp bench halting``, for a checkout without the command line's dependencies.
"""

from __future__ import annotations

import argparse

from adaptcomp_ext.experiments.bench import bench_halting


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description="Adaptive halting against masked and boolean-indexed loops.")
    parser.add_argument("--out", default="results/bench_halting", help="folder of the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid", default="default", choices=["default", "quick", "required"])
    parser.add_argument("--quick", action="store_true", help="the same as --grid quick")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cores", default="gru,mlp,transformer", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=None, help="per configuration")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    bench_halting(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
