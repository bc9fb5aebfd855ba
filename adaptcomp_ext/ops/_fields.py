"""Named tuples whose fields say what they are, to ``help()`` and to a tooltip."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)

_FIELD = re.compile(r"^(\w+) : (.+)$", re.MULTILINE)


def documented(cls: _Class) -> _Class:
    """Give each field of a named tuple what the class's docstring says of it under ``Attributes``.

    Left to itself, Python says "Alias for field number 0".
    """
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes\n----------\n")[2]
    found = list(_FIELD.finditer(text))
    for match, following in zip(found, [*found[1:], None], strict=True):
        said = text[match.end() : None if following is None else following.start()]
        getattr(cls, match[1]).__doc__ = f"{match[2]}. {' '.join(said.split())}"
    return cls
