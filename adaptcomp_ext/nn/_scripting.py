"""Why these modules are not for ``torch.jit.script``, which would fail in the middle of their sources."""

from __future__ import annotations

from typing import NoReturn


def refuse_scripting(module: object) -> NoReturn:
    """Raise a RuntimeError with the way out. As ``__prepare_scriptable__`` of a class, torch calls it for every such module."""
    raise RuntimeError(
        f"{type(module).__name__} does not support torch.jit.script: it runs Python that is no TorchScript, and what runs is "
        "decided by the values of the rows: script the other parts of the model, or use torch.compile without fullgraph=True"
    )
