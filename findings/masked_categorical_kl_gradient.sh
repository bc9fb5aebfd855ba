#!/usr/bin/env bash
# torch 2.13.0: kl_divergence of two torch.distributions.Categorical whose logits forbid the same action with -inf.
#
# Guess:     the divergence has a case for probabilities of zero (0 log 0 = 0), so value and gradient are those of the same
#            distributions over the allowed actions alone.
# Behaviour: the value is, and so is the gradient of the second distribution. The gradient of the first is NaN in all of its
#            allowed actions: the case is taken by overwriting a product that has been NaN before, and the backward pass multiplies
#            by it. entropy() of the same distribution has a right gradient.
# Who meets it: reinforcement learning with action masks and a KL penalty; distillation between masked classifiers.
# Way out:   mask with a large finite number, or take the sum over the allowed classes.
#
# Installs torch into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PY'
import torch
from torch.distributions import Categorical, kl_divergence

print("torch", torch.__version__)
forbidden = torch.tensor([False, False, True])


def divergence(mask):
    a, b = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([0.5, 0.1, 3.0], requires_grad=True)
    first, second = Categorical(logits=mask(a)), Categorical(logits=mask(b))
    (entropy,) = torch.autograd.grad(first.entropy(), a, retain_graph=True)
    value = kl_divergence(first, second)
    return value.detach(), *torch.autograd.grad(value, (a, b)), entropy


right = divergence(lambda x: x[:2])
masked = divergence(lambda x: x.masked_fill(forbidden, float("-inf")))
finite = divergence(lambda x: x.masked_fill(forbidden, -1e9))
for name, seen in (("allowed actions alone", right), ("masked with -inf", masked), ("masked with -1e9", finite)):
    value, *gradients = seen
    print(f"{name:22} {value:.6f}", *(gradient.tolist() for gradient in gradients))

for seen in (masked, finite):
    for position, what in ((0, "value"), (2, "gradient of the second"), (3, "gradient of the entropy")):
        assert torch.allclose(seen[position], right[position], atol=1e-6), what
assert torch.allclose(finite[1], right[1], atol=1e-6), "the way out does not work any more"
assert bool(masked[1][:2].isnan().all()), "the gradient of the first is a number now"
PY
"$folder/environment/bin/python" "$folder/program.py"
