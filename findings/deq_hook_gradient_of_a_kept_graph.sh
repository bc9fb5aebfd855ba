#!/usr/bin/env bash
# torchdeq 0.1.0 (torch 2.13.0, CPU): two backward passes through one graph of a layer with hook_ift=True.
#
# Guess:     hook_ift=True is the implicit gradient by a hook, "a PyTorch backward hook implementation of IFT", and ift=True the same by
#            an autograd function: both give the same gradient, and give it again in a second backward pass through a graph that was
#            kept (retain_graph=True).
# Behaviour: the first pass agrees to rounding. The hook removes itself in it, so that the second pass is the gradient of one
#            application of the function, here 78 % of the gradient's norm away. There is no error and no warning. ift=True gives
#            the same gradient twice.
# Who meets it: whoever takes one gradient for each of several losses, outputs or tasks of a model with such a layer: rows of a
#            Jacobian, gradient balancing between tasks, influence functions. Only the first one is implicit.
# Way out:   ift=True.
#
# Installs torch and torchdeq into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torchdeq still
# behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 torchdeq==0.1.0 numpy
cat >"$folder/program.py" <<'PY'
from importlib.metadata import version

import torch
from torchdeq import get_deq

generator = torch.Generator().manual_seed(0)
weight = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0].mul(0.9).requires_grad_()
x = torch.full((1, 4), 0.1, dtype=torch.float64)
exact = {"f_tol": 1e-12, "b_tol": 1e-12, "f_max_iter": 1000, "b_max_iter": 1000}


def gradients(**how):
    """Return the gradients of two backward passes through one graph."""
    layer = get_deq(**exact, **how)
    loss = layer(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x))[0][-1].sum()
    return [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2)]


print("torch", torch.__version__, "- torchdeq", version("torchdeq"))
function, hook = gradients(ift=True), gradients(hook_ift=True)
apart = {
    "ift, second pass": (function[1] - function[0]).norm() / function[0].norm(),
    "hook_ift, first pass": (hook[0] - function[0]).norm() / function[0].norm(),
    "hook_ift, second pass": (hook[1] - function[0]).norm() / function[0].norm(),
}
for name, difference in apart.items():
    print(f"{name}: differs from the implicit gradient by {difference:.1e} of its norm")
z = get_deq(**exact)(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x))[0][-1].detach()
(one,) = torch.autograd.grad(torch.tanh(z @ weight.T + x).sum(), weight)

assert apart["ift, second pass"] == 0 and apart["hook_ift, first pass"] < 1e-9, "the implicit gradients differ"
assert apart["hook_ift, second pass"] > 0.1, "the second pass is implicit, too, now"
assert torch.allclose(hook[1], one, rtol=1e-9, atol=1e-12), "the second pass is something else"
print("The second pass of hook_ift is the gradient of one application.")
PY
"$folder/environment/bin/python" "$folder/program.py"
