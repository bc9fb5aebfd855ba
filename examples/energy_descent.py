"""Energy descent: sort five numbers by going downhill on a learned energy E(y, x).

x are the numbers and y the answer. The descent starts at y = 0, and each row stops when its energy falls no
further. The energy learns through the descent: the loss is the distance from the point where a row stopped to
the sorted numbers, and its gradient flows back through every step, of which only the points are kept.

    python examples/energy_descent.py

Expect the error of a number to fall from 0.30 after one step to 0.10 after eight, and every row to stop by
itself, after 13 steps on average of 50 allowed.
"""

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

NUMBERS = 5


def draw(rows: int) -> tuple[Tensor, Tensor]:
    """Numbers [rows, 5], uniform in −1..1, and the same in order."""
    x = torch.rand(rows, NUMBERS) * 2 - 1
    return x, x.sort(dim=1).values


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    energy = ac.MLPEnergy(dim_y=NUMBERS, dim_context=NUMBERS, hidden=256, activation="gelu", ridge=1.0)
    step_size = nn.Parameter(torch.tensor(0.3))  # learned with the energy
    descend = ac.EnergyDescent(energy, step_size=step_size, max_steps=30, tol=1e-4)
    optimizer = torch.optim.Adam(descend.parameters(), lr=3e-3)
    for _ in range(600):
        x, answer = draw(256)
        result = descend(torch.zeros_like(x), x)
        loss = (result.y - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, answer = draw(2000)
    figures = {}
    for max_steps in (1, 2, 4, 8, 50):  # any setting may be changed between calls
        descend.max_steps = max_steps
        with torch.no_grad():
            result = descend(torch.zeros_like(x), x)
        error = (result.y - answer).square().mean().sqrt().item()
        steps = result.steps.float().mean().item()
        halted = (result.status == ac.Status.HALTED).float().mean().item()
        print(f"at most {max_steps:2} steps: error {error:.3f}, {steps:4.1f} taken, {halted:4.0%} halted")
        figures |= {f"error {max_steps}": error, f"steps {max_steps}": steps, f"halted {max_steps}": halted}
    return descend, figures


if __name__ == "__main__":
    main()
