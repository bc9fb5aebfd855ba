#!/usr/bin/env bash
# torch 2.13.0, CPU: index_add in a compiled function, into a vector of one element.
#
# Guess:     a compiled sum by rows (zeros(batch).index_add(0, row, values), as of a trace or a ragged batch) works for every batch.
# Behaviour: into two elements it works. Into one, inductor raises an AssertionError without a word while it generates C++ code:
#            the index of a dimension of size 1 is a constant, and its vectorised atomic addition takes a vector of indices only.
#            So does index_put(accumulate=True). scatter_add and scatter_reduce work, and so does index_add of rows with two
#            dimensions.
# Who meets it: whoever compiles a loss that sums values by sample, when a batch of one sample comes (the last of an epoch).
# Way out:   scatter_add.
#
# Needs a C++ compiler and a network. Installs torch into a temporary folder, uses nothing of this project.
# Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat >"$folder/program.py" <<'PY'
import logging

import torch

logging.disable(logging.CRITICAL)
row, values = torch.zeros(64, dtype=torch.int64), torch.arange(64.0)
WAYS = {
    "index_add": lambda size: lambda row, values: torch.zeros(size).index_add(0, row, values),
    "index_put": lambda size: lambda row, values: torch.zeros(size).index_put((row,), values, accumulate=True),
    "scatter_add": lambda size: lambda row, values: torch.zeros(size).scatter_add(0, row, values),
    "index_add of pairs": lambda size: lambda row, values: torch.zeros(size, 2).index_add(0, row, values[:, None].expand(-1, 2)),
}
seen = {}
for name, make in WAYS.items():
    for size in (1, 2):
        torch.compiler.reset()
        try:
            right = torch.equal(torch.compile(make(size))(row, values), make(size)(row, values))
            seen[name, size] = "right" if right else "wrong"
        except Exception as error:
            seen[name, size] = str(error).split(":")[0].strip()
        print(f"torch {torch.__version__}: {name} into {size}: {seen[name, size]}")
failing = {case for case, came in seen.items() if came == "AssertionError"}
assert failing == {("index_add", 1), ("index_put", 1)}, failing
assert all(came == "right" for case, came in seen.items() if case not in failing)
PY
TORCHINDUCTOR_CACHE_DIR=$folder/cache "$folder/environment/bin/python" "$folder/program.py"
