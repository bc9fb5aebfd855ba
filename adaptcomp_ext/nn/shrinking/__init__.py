"""Removing dead units: sparsity that runs faster."""

from adaptcomp_ext.nn.shrinking.shrink import shrink

__all__ = ["shrink"]
