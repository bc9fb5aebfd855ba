#!/usr/bin/env bash
# torch 2.13.0: copy.deepcopy of a module with a parametrization, and remove_parametrizations on the copy.
#
# Guess:     a deep copy shares nothing with its original; baking the parametrization into the copy, for a deployment, leaves the
#            original as it was.
# Behaviour: parametrizing gives the module a class of its own, and the copy has the same class object. Removing the copy's
#            parametrization deletes the property `weight` from that class: the copy works, and the original, whose parameters are
#            all there, raises AttributeError at its next call.
# Who meets it: training with weight_norm, spectral_norm or orthogonal from torch.nn.utils.parametrizations, where a copy without
#            them is exported, quantized or evaluated at times and training goes on.
# Way out:   build the second module anew and load a state_dict with the baked weights into it.
#
# Installs torch into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PY'
import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

print("torch", torch.__version__)
x = torch.randn(4, 3)

for norm in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
    original = norm(nn.Linear(3, 2)).eval()
    before = original(x)
    copied = copy.deepcopy(original)
    assert type(copied) is type(original), "the copy has a class of its own now"
    parametrize.remove_parametrizations(copied, "weight")
    torch.testing.assert_close(copied(x), before)
    names = [name for name, _ in original.named_parameters()]
    assert "parametrizations.weight" in " ".join(names), "the original lost its parameters"
    try:
        original(x)
    except AttributeError as error:
        print(f"{norm.__name__:14} parameters of the original: {names}; calling it: {error}")
    else:
        raise AssertionError("the original works after its copy was changed")

    # The way out.
    original = norm(nn.Linear(3, 2)).eval()
    baked = nn.Linear(3, 2)
    baked.load_state_dict({"weight": original.weight, "bias": original.bias})
    torch.testing.assert_close(baked(x), original(x))
PY
"$folder/environment/bin/python" "$folder/program.py"
