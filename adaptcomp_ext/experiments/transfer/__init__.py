"""Transfer: what is kept from one task to the next."""

from .experiment import transfer

__all__ = ["transfer"]
