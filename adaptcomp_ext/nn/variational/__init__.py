"""Variational dropout: noise of learned strength on weights, from which follows their description length."""

from adaptcomp_ext.nn.variational.dropout import VariationalDropout
from adaptcomp_ext.nn.variational.networks import description_length, sparsity, variational

__all__ = ["VariationalDropout", "description_length", "sparsity", "variational"]
