"""Transfer: what is kept from one task to the next."""

from .report import transfer

__all__ = ["transfer"]
