#!/usr/bin/env bash
# torch 2.13.0, CPU: the sum of a row of more than 32,768 numbers, alone and in a batch.
#
# Guess:     a reduction over the last dimension treats each row by itself, so that a row's sum has the same bits alone and in any
#            batch. Matrix products are known not to promise this, since BLAS picks a kernel by the number of rows; a sum has no
#            such choice to make.
# Behaviour: up to 32,768 columns it is so. Above, and with at least two threads, a row alone is split over the threads and the
#            parts are added, while the rows of a batch are given to the threads whole: about half of the rows have other last bits.
#            The same holds for mean, and for the sum inside logsumexp, whose logarithm hides most of it; softmax, var and layer_norm
#            keep rows apart. With one thread nothing differs.
# Who meets it: whoever thresholds a log-likelihood or an energy over a large vocabulary row by row (early exit, halting,
#            rejection sampling): a row near the threshold decides otherwise alone than in a batch, on the same machine.
# Way out:   torch.softmax and log_softmax where they serve; else reduce in two steps, over blocks of at most 32,768 columns and then
#            over the blocks.
#
# Installs torch into a temporary folder, needs a network, uses nothing of this project. Exit status 0: torch still behaves so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PY'
import torch

ROWS = 64


def differing(reduce, threads, columns):
    """The number of rows whose result has other bits alone than among the others."""
    torch.set_num_threads(threads)
    rows = torch.rand(ROWS, columns, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([reduce(rows[i : i + 1]) for i in range(ROWS)])
    return int((reduce(rows) != alone).sum())


def in_two_steps(rows):
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 1024))
    return padded.view(len(rows), -1, 1024).sum(dim=2).sum(dim=1)


REDUCTIONS = {
    "sum": lambda rows: rows.sum(dim=1),
    "mean": lambda rows: rows.mean(dim=1),
    "logsumexp": lambda rows: rows.logsumexp(dim=1),
    "log_softmax": lambda rows: rows.log_softmax(dim=1)[:, 0],
    "sum in two steps": in_two_steps,
}
print("torch", torch.__version__, "- rows of 64 with other bits alone than in the batch")
found = {}
for name, reduce in REDUCTIONS.items():
    for columns in (32768, 32769, 50000):
        found[name, columns] = [differing(reduce, threads, columns) for threads in (1, 2)]
        print(f"{name:17} {columns:6} columns: {found[name, columns][0]:2} with one thread, {found[name, columns][1]:2} with two")

for name in ("sum", "mean"):
    assert found[name, 32768] == [0, 0], f"{name}: 32,768 columns are split, too"
    for columns in (32769, 50000):
        one, two = found[name, columns]
        assert one == 0 and two > 0, f"{name}: wide rows are kept apart now"
for name in ("log_softmax", "sum in two steps"):
    assert all(found[name, columns] == [0, 0] for columns in (32768, 32769, 50000)), f"{name}: no way out any more"
PY
"$folder/environment/bin/python" "$folder/program.py"
