"""Removal of dead units, which turns sparsity into speed."""

from adaptcomp_ext.nn.shrinking.shrink import shrink

__all__ = ["shrink"]
