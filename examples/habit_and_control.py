"""Habit and control: a cheap network answers every row, an expensive one the rows whose gate calls it.

A Stroop task on scikit-learn's digits. Each digit has an ink. In training nine of ten digits have the ink of
their class (they are congruent), in the test every second one. The habit is one linear layer, which
variational dropout keeps simple; it leans on the ink. Control is large, and learns in proportion to what the
habit fails at.

    python examples/habit_and_control.py

Needs scikit-learn. Expect the habit to read 87 % of the incongruent digits and control 95 %. With control on
about 40 % of the rows the answers are as good as with control on all: the gate, which sees nothing but the
habit's entropy, calls half of the incongruent rows and a fifth of the congruent ones.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adaptcomp_ext as ac

CLASSES, RATE = 10, 0.4


def colour(digits: Tensor, congruent: float) -> Tensor:
    """The inks [n]: a digit's own with the probability `congruent`, else one of the nine others."""
    others = (digits + torch.randint(1, CLASSES, digits.shape)) % CLASSES
    return torch.where(torch.rand(len(digits)) < congruent, digits, others)


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    data = load_digits()
    pixels, digits = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(digits))
    train, held_out, test = order[:997], order[997:1397], order[1397:]

    def items(rows: Tensor, congruent: float) -> tuple[Tensor, Tensor, Tensor]:
        ink = colour(digits[rows], congruent)
        return torch.cat([pixels[rows], nn.functional.one_hot(ink, CLASSES)], 1), digits[rows], ink

    habit = nn.Linear(64 + CLASSES, CLASSES)
    control = nn.Sequential(
        nn.Linear(64 + CLASSES, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )
    acc = ac.models.ACC(nn.Identity(), habit, control, classes=CLASSES)  # the habit gets variational dropout
    optimizer = torch.optim.Adam(acc.parameters(), lr=1e-3)
    epochs = 30
    for epoch in range(epochs):
        x, y, _ = items(train[torch.randperm(len(train))], 0.9)
        for i in range(0, len(x), 64):
            loss = acc.loss(x[i : i + 64], y[i : i + 64], rows=len(x), beta_factor=epoch / epochs)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()

    acc.eval()
    acc.gate.calibrate(acc.both(items(held_out, 0.5)[0])[0], rate=RATE)
    x, y, ink = items(test, 0.5)
    with torch.no_grad():
        result, (default, everywhere) = acc(x), acc.both(x)
    right = {
        "habit": default.argmax(1) == y,
        "control": everywhere.argmax(1) == y,
        "gated": result.output.argmax(1) == y,
        "called": result.called,
    }
    figures = {}
    for name, kept in (("congruent", ink == y), ("incongruent", ink != y)):
        shares = {f"{key}, {name}": rows[kept].float().mean().item() for key, rows in right.items()}
        print(", ".join(f"{key} {share:.0%}" for key, share in shares.items()))
        figures |= shares
    return acc, figures


if __name__ == "__main__":
    main()
