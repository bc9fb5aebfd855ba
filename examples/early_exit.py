"""Early exit with a head per exit: an image leaves the network at the first layer that is sure of its digit.

The network has six layers, and each has its own classifier. `AdaptiveHalt` takes both as ModuleLists: step n
is layer n, and the readout that `Confidence` reads there is classifier n. In training no image leaves early,
and `keep_trace` gives the answers of all exits, so that each of them learns the labels.

    python examples/early_exit.py

Needs scikit-learn, whose digits it reads, some of them with much noise. Expect 93 to 94 % of the test images
right with all six layers, and as many at a confidence of 0.9, with 1.7 layers per image on average.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adaptcomp_ext as ac

LAYERS, WIDTH, CLASSES = 6, 64, 10


class Layer(nn.Module):
    """A residual layer, features [n, 64] to features [n, 64]."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer = nn.Sequential(nn.LayerNorm(WIDTH), first, nn.ReLU(), second)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layer(features)


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    data = load_digits()
    images, digits = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    images += 0.6 * torch.rand(len(images), 1) * torch.randn(images.shape)  # some are noisier than others
    order = torch.randperm(len(images))
    train, test = order[:1297], order[1297:]

    layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
    exits = nn.ModuleList([nn.Linear(WIDTH, CLASSES) for _ in range(LAYERS)])
    halt = ac.AdaptiveHalt(layers, ac.Confidence(0.9), max_steps=LAYERS, readout=exits)
    whole = ac.AdaptiveHalt(layers, ac.FixedSteps(LAYERS), max_steps=LAYERS, readout=exits, keep_trace=True)
    optimizer = torch.optim.Adam(halt.parameters(), lr=1e-3)
    for _ in range(20):
        for rows in train[torch.randperm(len(train))].split(64):
            trace = whole(images[rows]).trace  # the answers of every exit to every image
            loss = LAYERS * nn.functional.cross_entropy(trace.outputs, digits[rows][trace.row])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    figures = {}
    for threshold in (0.5, 0.9, 0.99, 1.0):
        halt.policy.threshold = threshold
        with torch.no_grad():
            result = halt(images[test])
        right = (result.output.argmax(1) == digits[test]).float().mean().item()
        layers, exits_taken = result.steps.float().mean().item(), result.steps.bincount().tolist()[1:]
        print(f"confidence {threshold:4}: {right:.1%} right, {layers:.2f} layers; per exit {exits_taken}")
        figures[f"right at {threshold}"], figures[f"layers at {threshold}"] = right, layers
    return halt, figures


if __name__ == "__main__":
    main()
