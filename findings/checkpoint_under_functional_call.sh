#!/usr/bin/env bash
# torch 2.13.0: gradients through torch.utils.checkpoint inside torch.func.functional_call.
#
# Guess:     a checkpointed block computes its forward pass again with the parameters that the call was made with, so that a
#            gradient is the same with and without the checkpoint, up to rounding.
# Behaviour: it computes it again with the module's own parameters, which functional_call has put back by then. The value is
#            right; the gradient mixes both sets of parameters, is off by up to a third here, and no error is raised. The form that
#            torch recommends, use_reentrant=False, compares shapes and dtypes of the two passes, and those agree. The reentrant
#            form gives the gradient to the module's own parameter, and none to the one that was handed in.
# Who meets it: meta-learning, hypernetworks and ensembles that save memory by checkpointing.
# Way out:   hand the parameters to the checkpointed function as arguments, and call functional_call inside of it.
#
# Installs torch into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PY'
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.linear, self.way = nn.Linear(3, 3, bias=False), way
        nn.init.eye_(self.linear.weight)

    def block(self, x):
        return self.linear(self.linear(x).tanh()).sum()

    def other_block(self, x, weight):
        def linear(x):
            return functional_call(self.linear, {"weight": weight}, (x,))

        return linear(linear(x).tanh()).sum()

    def forward(self, x):
        if self.way == "plain":
            return self.block(x)
        if self.way == "handed in":
            return checkpoint(self.other_block, x, self.linear.weight, use_reentrant=False)
        return checkpoint(self.block, x, use_reentrant=self.way == "reentrant")


def gradients(way):
    network = Network(way)
    x = torch.arange(12.0).view(4, 3).div(10).requires_grad_()
    weight = torch.full((3, 3), 0.5, requires_grad=True)
    value = functional_call(network, {"linear.weight": weight}, (x,))
    value.backward()
    return value.item(), weight.grad, network.linear.weight.grad


print("torch", torch.__version__)
results = {way: gradients(way) for way in ("plain", "not reentrant", "reentrant", "handed in")}
for way, (value, handed_in, own) in results.items():
    print(f"{way:14} value {value:.4f}, gradient of the parameter handed in", None if handed_in is None else handed_in.flatten().tolist())
    print(f"{'':14} gradient of the module's own parameter", None if own is None else own.flatten().tolist())

value, right, own = results["plain"]
assert own is None and all(abs(result[0] - value) < 1e-6 for result in results.values()), "the values differ"
assert not torch.allclose(results["not reentrant"][1], right, rtol=0.1), "not reentrant: the gradient is right now"
assert results["reentrant"][1] is None and results["reentrant"][2] is not None, "reentrant: the gradient goes elsewhere now"
assert torch.allclose(results["handed in"][1], right), "the way out does not work any more"
PY
"$folder/environment/bin/python" "$folder/program.py"
