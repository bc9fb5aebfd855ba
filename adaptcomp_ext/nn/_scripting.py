"""The error of modules that ``torch.jit.script`` cannot compile; torch's own points into their sources."""

from __future__ import annotations

from typing import NoReturn


def refuse_scripting(module: object) -> NoReturn:
    """Raise a RuntimeError with the way out; torch calls it as a class's ``__prepare_scriptable__``."""
    raise RuntimeError(
        f"{type(module).__name__} does not support torch.jit.script: it runs Python that is no TorchScript, "
        "and the values of the rows decide how many steps run: script the other parts of the model, or use "
        "torch.compile without fullgraph=True"
    )
