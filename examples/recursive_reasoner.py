"""Halting in a recursive reasoner: each puzzle leaves a tiny recursive model as soon as its answer is sure.

The model is that of `tiny-recursive-model`, which refines an answer in deep steps of three blocks each and
lets puzzles exit between deep steps. Here a block is the step of `AdaptiveHalt`, and `calibrate` chooses how
sure is sure enough: so that no more than 2 % of answers differ from those after 24 blocks.

    pip install tiny-recursive-model && python examples/recursive_reasoner.py

Needs the extra `demo` for the Sudokus, 4×4. Expect 93 % right, as after 24 blocks, with four to five blocks
per puzzle on average. Takes three quarters of a minute.
"""

import torch
from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.sudoku.puzzles import FourByFour

MOST = 24  # blocks


class Sure(ac.Policy):
    """Halt where the model's own head says that the answer is right, with at least this probability."""

    calibrated = ac.Confidence.calibrated

    def __init__(self, head: nn.Module, threshold: float) -> None:
        super().__init__()
        self.head, self.threshold = head, threshold

    def decide(self, view: ac.nn.View) -> ac.Decision:
        return ac.Decision(self.head(view.state[0]).sigmoid() >= self.threshold)


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    model = TinyRecursiveModel(dim=32, num_tokens=5, network=MLPMixer1D(dim=32, depth=1, seq_len=16))
    source, generator = FourByFour(0), torch.Generator().manual_seed(0)
    tokens = lambda puzzles: ((puzzles.solution + 1) * puzzles.given, puzzles.solution + 1)  # noqa: E731
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        board, solution = tokens(source.train(64, generator))
        state = model.get_initial()
        for _ in range(2):  # deep steps
            loss, _, *state, _, _ = model(board, *state, labels=solution)
            optimizer.zero_grad()
            (loss / 64).backward()
            optimizer.step()

    def start(board: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        embedded = model.input_embed(board)
        return tuple(t.expand_as(embedded).contiguous() for t in model.get_initial()), embedded

    def digits(answer: Tensor) -> Tensor:
        return model.to_pred(answer).argmax(2)

    def block(state: tuple[Tensor, Tensor], board: Tensor) -> tuple[Tensor, Tensor]:
        """Refine the latents, then the answer; the state is (answer, latents), [n, 16, 32] each."""
        return model.refine_latent_then_output_once(board, *state)

    halt = ac.AdaptiveHalt(block, Sure(model.to_halt_pred, 0.9), max_steps=MOST)
    with torch.no_grad():
        held_out = start(tokens(source.test(1024, generator))[0])
        differs = lambda answer, last: (digits(answer) != digits(last)).any(1)  # noqa: E731
        print(ac.calibrate(halt, [held_out], risk=(0.02, 0.05), loss=differs))
        board, solution = tokens(source.test(1024, generator))
        result, full = halt(*start(board)), model.predict(board, 2.0, MOST // 3)[0]
    figures = {"blocks": result.steps.float().mean().item()}
    pairs = {"right": (own := digits(result.output), solution), "same": (own, full)}
    for name, (answer, wanted) in {**pairs, "right, full depth": (full, solution)}.items():
        figures[name] = (answer == wanted).all(1).float().mean().item()
    print({name: round(value, 3) for name, value in figures.items()})
    return model, figures


if __name__ == "__main__":
    main()
