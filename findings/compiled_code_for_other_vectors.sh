#!/usr/bin/env bash
# torch 2.13.0, CPU: what torch.compile keeps on disk, under two values of ATEN_CPU_CAPABILITY.
#
# Guess:     the key under which it is kept holds everything that the generated C++ depends on, the instruction set included: under
#            avx2 a function that was compiled under avx512 is compiled anew.
# Behaviour: it is found and loaded: a program that advances by vectors of 16 floats, where those of AVX2 have 8. This script ends
#            before it runs. Where such a program did run, its results were other numbers, without a word, and processes were aborted.
#            torch._inductor.compile, which does not go through the cache of torch.compile, compiles anew.
# Who meets it: whoever measures with ATEN_CPU_CAPABILITY=avx2 on a machine with AVX-512 on which the same function was compiled
#            before, or shares the folder between machines of both kinds.
# Way out:   a TORCHINDUCTOR_CACHE_DIR of its own for each value.
#
# Needs a processor with AVX-512, a C++ compiler and a network. Installs torch into a temporary folder, uses nothing of this project.
# Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat >"$folder/program.py" <<'PY'
import os
import re
import sys

import torch
from torch._inductor.codecache import PyCodeCache

load = PyCodeCache.load_by_key_path


def look(key, path, *rest, **named):
    """Say what is about to be loaded, and end before it runs."""
    lanes = re.findall(r"\+=\(?static_cast<int64_t>\((\d+)L?\)", open(path).read())
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}: a program for vectors of {sorted(set(lanes))}", flush=True)
    if sys.argv[1] == "look":
        os._exit(0 if lanes and set(lanes) == {sys.argv[2]} else 1)
    return load(key, path, *rest, **named)


PyCodeCache.load_by_key_path = staticmethod(look)


def step(y):
    return y - 0.1 * torch.func.grad(lambda y: torch.nn.functional.silu(y).sum())(y)


torch.compile(step, dynamic=False)(torch.ones(64, 64))
PY
run() { # FOLDER CAPABILITY ARGUMENT...
  TORCHINDUCTOR_CACHE_DIR=$folder/$1 ATEN_CPU_CAPABILITY=$2 "$folder/environment/bin/python" "$folder/program.py" "${@:3}"
}
run shared avx512 run
run shared avx2 look 16
run own avx2 look 8
