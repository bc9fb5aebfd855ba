"""Gymnasium's conventions: when ended episodes begin anew, which of them a reset begins, and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from adaptcomp_ext.ops._checks import describe

__all__ = ["check_autoreset_mode", "check_render_mode", "check_reset_mask", "refuse_ended"]

RENDER_MODES = ("rgb_array",)


def check_autoreset_mode(mode: object) -> AutoresetMode:
    """Require one of Gymnasium's modes, or its name ("NextStep", "SameStep", "Disabled")."""
    if isinstance(mode, AutoresetMode):
        return mode
    try:
        return AutoresetMode(mode)
    except ValueError:
        names = ", ".join(repr(known.value) for known in AutoresetMode)
        raise ValueError(
            f"autoreset_mode: expected an AutoresetMode of Gymnasium, or one of {names}, got {mode!r}"
        ) from None


def check_render_mode(mode: object) -> str | None:
    """Require "rgb_array" or None."""
    if mode is None or (isinstance(mode, str) and mode in RENDER_MODES):
        return mode
    raise ValueError(f"render_mode: expected 'rgb_array' or None, got {mode!r}")


def check_reset_mask(options: object, count: int, started: bool) -> NDArray[np.bool_]:
    """Return which of `count` environments a reset begins, bool [count]: ``options["reset_mask"]``, or all.

    Parameters
    ----------
    options : dict or None
        What the user passed to ``reset``; ``reset_mask`` is all that it may hold.
    count : int
        The number of environments.
    started : bool
        Whether all of them have begun before; if not, all of them have to.
    """
    if options is None:
        return np.ones(count, bool)
    if not isinstance(options, dict):
        raise TypeError(f"options: expected a dict or None, got {describe(options)}")
    unknown = [key for key in options if key != "reset_mask"]
    if unknown:
        raise ValueError(f"options: expected no key but 'reset_mask', got {', '.join(map(repr, unknown))}")
    if "reset_mask" not in options:
        return np.ones(count, bool)
    mask: Any = options["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask']: expected a NumPy array of bool, got {describe(mask)}")
    if mask.shape != (count,):
        raise ValueError(f"options['reset_mask']: expected shape ({count},), got {mask.shape}")
    if not mask.any():
        raise ValueError("options['reset_mask']: expected at least one True, got none")
    if not (started or mask.all()):
        raise ValueError(
            "options['reset_mask']: expected True for every environment at the first reset, got some False"
        )
    return mask


def refuse_ended(ended: NDArray[np.bool_]) -> None:
    """Require that every environment is in an episode: in mode DISABLED the caller begins the next one."""
    if ended.any():
        which = ", ".join(map(str, np.flatnonzero(ended)[:5]))
        raise RuntimeError(
            "step: expected reset(options={'reset_mask': mask}) of the environments whose episodes have "
            f"ended, got none for {which}{' and others' if ended.sum() > 5 else ''} (autoreset_mode is "
            "Disabled)"
        )
