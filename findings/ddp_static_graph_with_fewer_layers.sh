#!/usr/bin/env bash
# torch 2.13.0: DistributedDataParallel(static_graph=True) around an early-exit network, two processes over gloo.
#
# Guess:     a step of training that uses fewer layers than the first one did breaks the promise of a static graph, and the
#            backward pass of that step says so.
# Behaviour: that backward pass says nothing and leaves gradients as each process computed them: in this network, whose gradients
#            share one bucket, none is averaged, not even those of the layers that were used. An optimiser that steps now lets the replicas drift apart. The error comes
#            in the next forward pass, and never if there is none. find_unused_parameters=True averages as it should.
# Who meets it: early-exit and adaptive-depth networks, whose number of layers in use is known only when they run.
#
# Installs torch into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class EarlyExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3))
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward(self, x, depth):
        for layer in self.layers[:depth]:
            x = layer(x)
        return x


def train(rank, store, option, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = EarlyExit()
    parallel = DistributedDataParallel(network, **{option: True})
    seen = []
    for depth in (3, 2, 3):
        network.zero_grad(set_to_none=False)
        try:
            parallel(torch.full((1, 1), rank + 1.0), depth).sum().backward()
            seen.append([float(layer.weight.grad) for layer in network.layers])
        except RuntimeError as error:
            seen.append(str(error).split(".")[0])
    results[rank, option] = seen


if __name__ == "__main__":
    print("torch", torch.__version__)
    with mp.Manager() as manager:
        results = manager.dict()
        for option in ("find_unused_parameters", "static_graph"):
            mp.spawn(train, (f"{sys.argv[1]}/{option}", option, results), nprocs=2)
            for rank in range(2):
                for depth, seen in zip((3, 2, 3), results[rank, option], strict=True):
                    print(f"{option:22} process {rank}, {depth} layers: {seen}")
        for rank in range(2):
            assert results[rank, "find_unused_parameters"] == [[1.5] * 3, [1.5, 1.5, 0.0], [1.5] * 3], "averages otherwise now"
            first, fewer, after = results[rank, "static_graph"]
            assert first == [1.5] * 3
            assert fewer == [rank + 1.0, rank + 1.0, 0.0], "the step with fewer layers behaves otherwise now"
            assert "Expected to have finished reduction" in after, "the step after it behaves otherwise now"
PY
"$folder/environment/bin/python" "$folder/program.py" "$folder"
