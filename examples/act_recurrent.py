"""Adaptive computation time in a recurrent model: a reader that stops when it knows the answer.

Each row is a sequence of 16 symbols, one of which is marked, and the answer is the marked symbol. The reader
sees one symbol per step; `ACT` learns that nothing after the mark matters.

    python examples/act_recurrent.py

Expect an accuracy of 1.00, about 8.5 steps on average of 16 allowed, which is the mean position of the mark,
and a correlation of nearly 1 between a row's steps and the position of its mark.
"""

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

LENGTH, SYMBOLS, HIDDEN, PRICE = 16, 8, 64, 0.06  # the price of a step, in units of the loss


def draw(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols [rows, 16], the marked one raised by 8; answers [rows]; positions of the marks [rows]."""
    tokens, mark = torch.randint(SYMBOLS, (rows, LENGTH)), torch.randint(LENGTH, (rows,))
    answer = tokens[torch.arange(rows), mark]
    tokens[torch.arange(rows), mark] += SYMBOLS
    return tokens, answer, mark


class Reader(nn.Module):
    """One step: each row reads its next symbol. The state is (hidden [n, 64], position [n])."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(2 * SYMBOLS, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, state: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden, position = state
        return self.cell(self.embed(tokens.gather(1, position[:, None])[:, 0]), hidden), position + 1


class Head(nn.Linear):
    """The halting logit, from the hidden part of the state."""

    def forward(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(state[0])


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    halt = ac.AdaptiveHalt(Reader(), ac.ACT(head := Head(HIDDEN, 1)), max_steps=LENGTH)
    nn.init.constant_(head.bias, -3.0)  # start by thinking long
    model = nn.ModuleDict({"halt": halt, "classify": nn.Linear(HIDDEN, SYMBOLS)})
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)  # step, head and classifier: all are modules

    def run(tokens: Tensor) -> tuple[Tensor, ac.HaltResult]:
        hidden, position = torch.zeros(len(tokens), HIDDEN), torch.zeros(len(tokens), dtype=torch.int64)
        result = model["halt"]((hidden, position), tokens)
        return model["classify"](result.output), result

    for _ in range(250):
        tokens, answer, _ = draw(256)
        logits, result = run(tokens)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(logits, answer) + PRICE * result.cost.mean()).backward()
        optimizer.step()

    tokens, answer, mark = draw(4096)
    with torch.no_grad():
        logits, result = run(tokens)
    figures = {
        "accuracy": (logits.argmax(1) == answer).float().mean().item(),
        "steps": result.steps.float().mean().item(),
        "correlation": torch.corrcoef(torch.stack([result.steps, mark]).float())[0, 1].item(),
    }
    print(", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return model, figures


if __name__ == "__main__":
    main()
