"""The base class of halting policies: the public names of `adaptcomp_ext.nn.halting.policy`."""

from adaptcomp_ext.nn.halting.policy import Decision, Policy, Run, View

__all__ = ["Decision", "Policy", "Run", "View"]
