"""Early exit with a head per exit: an image leaves the network at the first layer that is sure of its digit.

The network has six layers, and each has its own classifier. `AdaptiveHalt` takes them as a ModuleList: step n
is layer n. The state carries the features and the logits of the last exit, which `Confidence` reads. In
training every exit learns the labels.

    python examples/early_exit.py

Needs scikit-learn, whose digits it reads, some of them with much noise. Expect 93 to 94 % of the test images
right with all six layers, and as many at a confidence of 0.9, with 1.7 layers per image on average.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adaptcomp_ext as ac

LAYERS, WIDTH, CLASSES = 6, 64, 10


class Exit(nn.Module):
    """A residual layer with its own classifier. The state is (features [n, 64], logits [n, 10])."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer = nn.Sequential(nn.LayerNorm(WIDTH), first, nn.ReLU(), second)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features = state[0] + self.layer(state[0])
        return features, self.head(features)


def logits(state: tuple[Tensor, Tensor]) -> Tensor:
    """The readout: what `Confidence` reads, and what the output is."""
    return state[1]


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    data = load_digits()
    images, digits = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    images += 0.6 * torch.rand(len(images), 1) * torch.randn(images.shape)  # some are noisier than others
    order = torch.randperm(len(images))
    train, test = order[:1297], order[1297:]

    exits = nn.ModuleList([Exit() for _ in range(LAYERS)])
    halt = ac.AdaptiveHalt(exits, ac.Confidence(0.9), max_steps=LAYERS, readout=logits)
    optimizer = torch.optim.Adam(halt.parameters(), lr=1e-3)
    for _ in range(20):
        for rows in train[torch.randperm(len(train))].split(64):
            state, loss = (images[rows], torch.zeros(len(rows), CLASSES)), torch.zeros(())
            for layer in exits:  # in training every exit learns
                state = layer(state)
                loss = loss + nn.functional.cross_entropy(state[1], digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    start = (images[test], torch.zeros(len(test), CLASSES))
    figures = {}
    for threshold in (0.5, 0.9, 0.99, 1.0):
        halt.policy.threshold = threshold
        with torch.no_grad():
            result = halt(start)
        right = (result.output.argmax(1) == digits[test]).float().mean().item()
        layers, exits_taken = result.steps.float().mean().item(), result.steps.bincount().tolist()[1:]
        print(f"confidence {threshold:4}: {right:.1%} right, {layers:.2f} layers; per exit {exits_taken}")
        figures[f"right at {threshold}"], figures[f"layers at {threshold}"] = right, layers
    return halt, figures


if __name__ == "__main__":
    main()
