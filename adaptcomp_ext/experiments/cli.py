"""Entry point of the command line.

Everything but ``info`` needs the optional extras, so nothing of them is imported here before it is known to be wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from adaptcomp_ext.experiments.info import print_info

__all__ = ["main"]

_EXTRAS = {
    **dict.fromkeys(("markdown", "matplotlib", "rich", "safetensors", "scipy", "sklearn", "typer"), "demo"),
    "gymnasium": "demo,maze",
    "dm_control": "demo,control",
    "mujoco": "demo,control",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["info"]:
        print_info()
        return
    try:
        from adaptcomp_ext.experiments.app import app

        app(args=words, prog_name="adaptcomp")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        install = f'pip install "adaptcomp_ext[{_EXTRAS[missing]}]"'
        print(f"adaptcomp: this command needs {missing}; install the extras with: {install}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
