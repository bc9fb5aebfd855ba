"""Settings that are checked at every assignment, as in the constructor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from adaptcomp_ext.nn._scripting import refuse_scripting


class Checked(nn.Module):
    """A module that checks its settings at every assignment, so that a call need not check them."""

    _settings: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """For each setting, a function that returns the value to be kept, or raises TypeError or ValueError."""

    __prepare_scriptable__ = refuse_scripting

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._settings.get(name)
        super().__setattr__(name, value if check is None else check(value))
