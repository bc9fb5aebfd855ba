#!/usr/bin/env bash
# torch 2.13.0: a region under torch.autocast(enabled=False), whose gradient is asked for while the outer autocast is still on.
#
# Guess:     a backward operation runs in the precision of its forward operation, as the documentation of autocast says; a product
#            that was taken in float32 because autocast was switched off around it has a float32 gradient wherever backward() is
#            called.
# Behaviour: the formulas of the backward pass are ordinary calls of mm, which autocast casts where backward() is called. The
#            gradient's dtype is float32 and its values have the error of bfloat16 (2.7e-3 instead of 3e-7 here). Nothing warns.
# Who meets it: energies, gradient penalties and meta-learning that take torch.autograd.grad inside the model's forward pass under
#            mixed precision and have switched autocast off for exactly that part.
# Way out:   call grad inside the region without autocast too.
#
# Installs torch into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PY'
import torch

print("torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(64, 256)
weight = torch.randn(256, 256, requires_grad=True)


def energy(x, weight):
    with torch.autocast("cpu", enabled=False):
        return (x @ weight).square().sum()


def error(gradient):
    return float((gradient.double() - exact).norm() / exact.norm())


wide = weight.detach().double().requires_grad_()
(exact,) = torch.autograd.grad(energy(x.double(), wide), wide)

with torch.autocast("cpu", dtype=torch.bfloat16):
    value = energy(x, weight)
    (inside,) = torch.autograd.grad(value, weight, retain_graph=True)
    with torch.autocast("cpu", enabled=False):
        (region,) = torch.autograd.grad(value, weight, retain_graph=True)
(outside,) = torch.autograd.grad(value, weight)

for name, gradient in (("inside autocast", inside), ("inside, switched off", region), ("outside", outside)):
    print(f"grad {name:21} value {value.dtype}, gradient {gradient.dtype}, relative error {error(gradient):.1e}")
assert value.dtype == inside.dtype == torch.float32
assert error(outside) < 1e-6 and error(region) < 1e-6, "the way out does not work any more"
assert error(inside) > 1e-4, "the gradient is as exact as its forward pass now"
PY
"$folder/environment/bin/python" "$folder/program.py"
