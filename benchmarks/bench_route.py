"""
Run the routing benchmark: ``python benchmarks/bench_route.py --quick --out results/quick``.

The same as ``adaptcomp bench route``, for a checkout without the command line's dependencies.
"""

from __future__ import annotations

import argparse

from adaptcomp_ext.experiments.bench import bench_route


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description="Routing against masking, boolean indexing and index_select."
    )
    parser.add_argument("--out", default="results/bench_route", help="folder of the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small grid: less than half a minute")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="per configuration")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tensors and routed rows")
    bench_route(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
