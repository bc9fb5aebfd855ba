"""Gradient descent on an energy, row by row."""
