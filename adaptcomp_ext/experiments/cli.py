"""Entry point of the command line.

Everything but ``info`` and ``--version`` needs the optional extras: none is imported before it is known to be
wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import adaptcomp_ext as ac

__all__ = ["main", "print_info", "print_version"]

_EXTRAS = {
    **dict.fromkeys(
        ("markdown", "matplotlib", "pandas", "rich", "safetensors", "scipy", "sklearn", "typer"), "demo"
    ),
    "gymnasium": "demo,maze",
    "dm_control": "demo,control",
    "mujoco": "demo,control",
    "ray": "cluster",
    "grpc": "cluster",
}


def print_version() -> None:
    """Print the name and the version of the package."""
    print(f"adaptcomp_ext {ac.__version__}")


def print_info() -> None:
    """Print `adaptcomp_ext.build_info`, one line each."""
    info = ac.build_info()
    width = max(map(len, info))
    for name, value in info.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        print(f"{name.replace('_', ' '):{width}}  {'-' if value in (None, '') else value}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["info"], ["--version"]):
        print_info() if words == ["info"] else print_version()
        return
    try:
        from adaptcomp_ext.experiments.app import app

        app(args=words, prog_name="adaptcomp")
    except KeyboardInterrupt:  # before a command has begun
        print("adaptcomp: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        install = f'pip install "adaptcomp_ext[{_EXTRAS[missing]}]"'
        print(f"adaptcomp: this command needs {missing}; install the extras with: {install}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
