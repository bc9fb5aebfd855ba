#!/usr/bin/env bash
# torchdeq 0.1.0 (torch 2.13.0, CPU): the solution with the smallest residual, of a row that overflows later.
#
# Guess:     a solver "returns the solution with the smallest residual" of each row (return_final=False, the default), so that more
#            iterations, which the rows beside it may need, can only improve a row's solution and its reported residual.
# Behaviour: solution and residual of such a row become NaN. The best estimate is kept by mask * new + ~mask * old, and 0 * inf and
#            0 * NaN are NaN. With five iterations the row has a finite solution; with sixty, which another row asks for, it is NaN,
#            and the reported number of steps is still that of the lost solution.
# Who meets it: whoever solves a batch in which a row diverges: its best estimate, and a loss over the batch, are gone without an
#            error, although the solver had a finite answer for every row.
# Way out:   replace what is not finite by the last finite estimate within the function; or choose max_iter so that no row overflows.
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
from torchdeq.solver import get_solver


def step(z):
    """The first row converges slowly to 10; the second squares itself, and begins beside its fixed point 1."""
    return torch.cat([0.9 * z[:1] + 1, z[1:] ** 2])


print("torch", torch.__version__, "- torchdeq", version("torchdeq"))
found = {}
for iterations in (5, 60):
    start = torch.tensor([[0.0], [1.001]])
    solution, _, report = get_solver("fixed_point_iter")(step, start, max_iter=iterations, tol=1e-6)
    row = found[iterations] = [float(t.flatten()[1]) for t in (solution, report["abs_lowest"], report["nstep"])]
    print(f"{iterations:2} iterations: solution {row[0]:.4f}, smallest residual {row[1]:.4f}, found in step {row[2]:.0f}")

assert abs(found[5][0] - 1.002) < 1e-4 and abs(found[5][1] - 1.001e-3) < 1e-5, "the first estimate is another one"
assert found[60][0] != found[60][0] and found[60][1] != found[60][1], "the best estimate is kept now"
assert found[5][2] == found[60][2] == 1, "another step is reported"
print("With more iterations the row has lost its best solution.")
PY
"$folder/environment/bin/python" "$folder/program.py"
