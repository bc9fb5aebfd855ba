"""Gradient descent on an energy, row by row.

==================  ========================================================================================
``energy_descent``  the module `EnergyDescent`, and the checks of a call
``settings``        its settings, and their checks
``problem``         one checked call, and the evaluation of its energy
``modes``           which way a call takes, and the gradient that its results get
``loop``            the loop for an energy that PyTorch evaluates, with one kernel call for each step
``tape``            the steps that the loop hands over, for the backward pass and the trace
``gradient``        the derivative through the steps, and of the energies at the end
``stepwise``        the loop with a gradient for each step by itself
``implicit``        the derivative of a minimum
``adjoint``         the autograd node that these derivatives share
``check``           the comparison of a backward pass's evaluations with the call's
``compiled``        what torch.compile cannot differentiate twice
``fused``           all steps in one kernel call, for an energy in closed form
``energies``        the energies in closed form
==================  ========================================================================================

Imports go down the layers: ``energy_descent`` → ``modes``, ``fused`` → ``stepwise``, ``gradient``,
``implicit`` → ``loop`` → ``tape``, ``problem`` → ``adaptcomp_ext.nn._snapshot``, which finds the state of an
energy at a call through ``adaptcomp_ext.nn._reads``. The loop knows neither the gradient modes nor the
closed forms.

To add an energy in closed form, called NAME here:

1. ``csrc/NAME_energy/``: the arithmetic of the energy for a tile of rows, which ``csrc/descent/tile.h`` runs
   on the CPU and ``csrc/descent/tile.cuh`` on CUDA. ``csrc/bindings/energies.h`` gets the functions
   ``NAME_descent``, ``NAME_descent_backward`` and ``NAME_descent_scratch``, ``csrc/bindings.cpp`` their
   names, and ``CMakeLists.txt`` the family.
2. ``reference/NAME_energy.py``: the energy in plain PyTorch.
3. ``ops/NAME_energy.py``: one line, ``KERNELS = EnergyKernels("NAME", ...)``, binds the three functions and
   says which tensor may have rows of its own. A `ClosedForm` joins it with the reference and the tensors of a
   call.
4. ``nn/descent/energies/NAME.py``: a subclass of `ClosedFormEnergy` whose ``closed_form`` checks its tensors
   and returns that `ClosedForm`. Nothing else in Python has to know it.
5. ``tests/helpers/closed_forms.py``: the energy's name among ``KINDS`` runs the tests of results, gradients,
   row independence and CUDA emulation on it.
"""

from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent

__all__ = ["EnergyDescent"]
