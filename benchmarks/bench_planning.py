"""
Run the planning benchmark: ``python benchmarks/bench_planning.py --seconds 2 --out results/quick``.

The same as ``adaptcomp bench planning``, for a checkout without the command line's dependencies.
"""

from __future__ import annotations

import argparse

from adaptcomp_ext.experiments.bench.planning import bench_planning


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description="Batched planning, each state stopping by itself, against its limit."
    )
    parser.add_argument("--out", default="results/bench_planning", help="folder of the results")
    parser.add_argument("--rows", type=int, default=32, help="states planned together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="per size")
    parser.add_argument("--seed", type=int, default=0, help="of weights and states")
    bench_planning(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
