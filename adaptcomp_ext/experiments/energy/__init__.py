"""Inference by descent on an energy over classes and a latent, trained through that descent.

``training`` builds and trains the networks, says what did not work, and compares the kernels with plain
autograd; ``evaluation`` makes images harder and counts steps and right answers; ``landscape`` maps the
energy around a descent and draws it; ``measure`` is one seed of all that, and ``experiment`` declares it
and reports.
"""

from .experiment import energy

__all__ = ["energy"]
