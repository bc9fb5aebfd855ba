"""Settings that are checked at every assignment, as in the constructor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._scripting import refuse_scripting


class Checked(nn.Module):
    """A module that checks its settings at every assignment, so that a call need not check them."""

    _settings: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """For each setting, a function that returns the value to be kept, or raises TypeError or ValueError."""

    _saved: tuple[str, ...] = ()
    """The settings that the state_dict holds, numbers that were chosen from data."""

    __prepare_scriptable__ = refuse_scripting

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._settings.get(name)
        super().__setattr__(name, value if check is None else check(value))

    def save_setting(self, name: str) -> None:
        """Make a setting, a number, part of the module's state_dict from now on."""
        if name not in self._saved:
            self._saved = (*self._saved, name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._saved:
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.float64, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, value in list(vars(self).items()):
            saved = state_dict.get(prefix + name)
            if not (isinstance(saved, Tensor) and saved.dim() == 0 and saved.is_floating_point()):
                continue
            if type(value) not in (int, float) or saved.is_meta:
                continue
            if prefix + name in unexpected_keys:  # so nn.Module calls what it does not know
                unexpected_keys.remove(prefix + name)
            number = saved.item()
            try:
                setattr(self, name, int(number) if type(value) is int and number % 1 == 0 else number)
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error))
            else:
                self.save_setting(name)
