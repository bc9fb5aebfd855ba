"""Variational dropout: noise whose strength is learned, and which says how many nats the weights are worth."""

from adaptcomp_ext.nn.variational.dropout import VariationalDropout
from adaptcomp_ext.nn.variational.networks import description_length, sparsity, variational

__all__ = ["VariationalDropout", "description_length", "sparsity", "variational"]
