"""Inference by descent on an energy over classes and a latent, trained through that descent.

``model`` builds the networks, ``training`` trains them and says what did not work, ``timing`` sets the
kernels against plain autograd, ``corruption`` makes images harder, ``evaluation`` counts steps and right
answers, ``landscape`` maps the energy around a descent, ``figure`` and ``descents`` draw, and ``report`` runs
all that and prints it.
"""

from .report import energy

__all__ = ["energy"]
