"""Docstrings for the fields of named tuples, as ``help()`` and editors show them."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)

_FIELD = re.compile(r"^(\w+) : (.+)$", re.MULTILINE)


def documented(cls: _Class) -> _Class:
    """Give each field of a named tuple its description under ``Attributes`` in the class's docstring.

    Python's default is "Alias for field number 0".
    """
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes\n----------\n")[2]
    fields = list(_FIELD.finditer(text))
    for match, following in zip(fields, [*fields[1:], None], strict=True):
        description = text[match.end() : None if following is None else following.start()]
        getattr(cls, match[1]).__doc__ = f"{match[2]}. {' '.join(description.split())}"
    return cls
