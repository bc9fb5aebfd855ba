"""`export_notes`: what a model gives up in an exported program."""

from __future__ import annotations

from torch import nn

from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.policies.bernoulli import Bernoulli
from adaptcomp_ext.ops._checks import describe


def export_notes(model: nn.Module) -> str:
    """Tell what the parts of this package in a model give up under `torch.export`, a line for each of them.

    Parameters
    ----------
    model : nn.Module
        It is not run. Calls of `route` are not seen: in an exported program all rows go through its branch.

    Returns
    -------
    str
        Empty if there is none of these parts.

    Raises
    ------
    TypeError
        If `model` is no module.

    Examples
    --------
    >>> print(ac.export_notes(model))
    reader.halt: halted rows stay in the block, masked, until the last row has halted; no gradients
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {describe(model)}")
    lines = []
    for name, module in model.named_modules():
        notes = []
        if isinstance(module, AdaptiveHalt):
            notes = _of_halt(module)
        elif isinstance(module, EnergyDescent):
            notes = ["it cannot be exported: its steps are derivatives of the energy"]
        if notes:
            lines.append(f"{name or type(module).__name__}: {'; '.join(notes)}")
    return "\n".join(lines)


def _of_halt(halt: AdaptiveHalt) -> list[str]:
    if halt.policy.traced or halt.keep_trace:
        return ["it cannot be exported with a trace: set evaluation mode, and keep_trace=False"]
    notes = ["halted rows stay in the block, masked, until the last row has halted", "no gradients"]
    if isinstance(halt.step, nn.ModuleList):
        notes.append("all stages have one shape of the state")
    if halt.process_group is not None:
        notes.append("processes do not wait for each other")
    for policy in halt.policy.modules():
        if isinstance(policy, Bernoulli) and policy.seed is None:
            notes.append("Bernoulli keeps the seed that it draws at the export: give it one")
    return notes
