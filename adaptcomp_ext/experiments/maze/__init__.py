"""An agent that plans in mazes, for as long as a state is worth the price of planning."""

from .experiment import maze

__all__ = ["maze"]
