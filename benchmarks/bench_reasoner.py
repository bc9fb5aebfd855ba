"""Time halting in a recursive reasoner, tiny-recursive-model trained here on 4×4 Sudoku, and races of starts.

The model is the package's own, with its default depth of a step: a *deep step* is three blocks of six
refinements of the latents and one of the answer. It is trained from scratch, with its halting head, and asked
for puzzles that were held out (`adaptcomp_ext.experiments.sudoku.puzzles`). Forms:

- *full depth*: ``predict`` with a threshold that nothing reaches: four deep steps, as in training.
- *its default*: ``predict`` as it is, which exits rows at a probability of 0.5 after each deep step.
- *its best*: ``predict`` with the threshold that `calibrate` finds for its deep steps.
- *deep steps*: the same steps and threshold in `AdaptiveHalt`: what the loop alone costs or saves.
- *blocks*: a block as the step of `AdaptiveHalt`, so that a row leaves after one to twelve of them, with the
  threshold that `calibrate` finds for blocks.
- *stream*: the same in a `ContinuousBatcher`, whose slots are refilled: a few hard puzzles hold up no block.

A threshold is the cheapest whose answers are not those of full depth in at most 0.5 % of puzzles, with
probability 95 %, by Learn-then-Test on puzzles drawn apart from the test puzzles. All test puzzles are
timed, in batches or in as many slots. Ratios of times in the same round, median over interleaved rounds.

Races: four starts of each puzzle, the first that halts wins, against one start, in the reasoner and in a
learnt energy (of the Sudoku experiment). Start 0 is the usual one, the others begin at random.

`python benchmarks/bench_reasoner.py`, after `pip install tiny-recursive-model` (measured: 0.0.15). Training
takes some minutes of one core; the weights are kept in the folder of the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench import harness
from adaptcomp_ext.experiments.bench.harness import Columns, Report, Row, Table
from adaptcomp_ext.experiments.bench.timing import ratios_over
from adaptcomp_ext.experiments.device import seeded
from adaptcomp_ext.experiments.sudoku.measure import solved
from adaptcomp_ext.experiments.sudoku.puzzles import FourByFour, Puzzles
from adaptcomp_ext.experiments.sudoku.training import EnergySolver, Recipe, first_answer, train_energy

DEPTH, BLOCKS = 4, 3
"""Deep steps, in training and at most in prediction, and blocks of a deep step, the package's default."""
RISK = (0.005, 0.05)
STARTS = 4
NOISE = 1.0


# --- the model ----------------------------------------------------------------------------------------------
def make_model(width: int) -> Any:
    """Make a model for boards of 16 cells, with tokens 0 for a blank and 1 to 4 for the digits."""
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    network = MLPMixer1D(dim=width, depth=1, seq_len=16, expansion_factor=2)
    return TinyRecursiveModel(dim=width, num_tokens=5, network=network)


def tokens(puzzles: Puzzles) -> tuple[Tensor, Tensor]:
    """Return boards and solutions, int64 [n, 16]."""
    solution = puzzles.solution + 1
    return solution * puzzles.given, solution


@dataclass(frozen=True)
class Training:
    """How the model is trained."""

    width: int = 48
    updates: int = 4000
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warm_up: int = 100
    average: float = 0.995  # of the weights, exponential


def train(model: Any, recipe: Training, source: FourByFour, seed: int) -> Any:
    """Train with the package's own loss, a deep step at a time; return the averaged model.

    Every row takes all deep steps: then the model learns to keep answers that are right already, and full
    depth is as good as few steps.
    """
    generator = seeded(seed)
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)

    def factor(done: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, done / recipe.updates)))
        return min(1.0, (done + 1) / recipe.warm_up) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    done = 0
    while done < recipe.updates:
        board, solution = tokens(source.train(recipe.batch, generator))
        answer, latent = model.get_initial()
        for _ in range(DEPTH):
            loss, _, answer, latent, _, _ = model(board, answer, latent, labels=solution)
            (loss / recipe.batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            average.update_parameters(model)
            done += 1
    return average.module.eval()


# --- the same model in the loop -----------------------------------------------------------------------------
class Block(nn.Module):
    """One block: the latents are refined, then the answer. The state is (answer, latents)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, state: tuple[Tensor, Tensor], board: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.refine_latent_then_output_once(board, *state)


class DeepStep(Block):
    """Three blocks."""

    def forward(self, state: tuple[Tensor, Tensor], board: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.deep_refinement(board, *state)


class Sure(ac.Policy):
    """Halt where the model's head says that the answer is right, with at least this probability."""

    calibrated = ac.Confidence.calibrated

    def __init__(self, head: nn.Module, threshold: float = 0.5) -> None:
        super().__init__()
        self.head, self.threshold = head, threshold

    def decide(self, view: Any) -> ac.Decision:
        return ac.Decision(self.head(view.state[0]).sigmoid() >= self.threshold)


def arguments(model: Any, board: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the initial state and the embedded board, [n, 16, width] each."""
    embedded = model.input_embed(board)
    answer, latent = (t.expand_as(embedded).contiguous() for t in model.get_initial())
    return (answer, latent), embedded


def answers(model: Any, output: Tensor) -> Tensor:
    """Return the tokens of the answers, int64 [n, 16]."""
    return model.to_pred(output).argmax(-1)


@dataclass
class Reasoner:
    """The trained model, its two loops, calibrated, and the puzzles."""

    model: Any
    deep: ac.AdaptiveHalt
    blocks: ac.AdaptiveHalt
    board: Tensor
    solution: Tensor

    @classmethod
    def make(cls, model: Any, source: FourByFour, rows: int, seed: int) -> Reasoner:
        """Calibrate on puzzles that are not among the test puzzles."""
        deep = ac.AdaptiveHalt(DeepStep(model), Sure(model.to_halt_pred), DEPTH, compact=True)
        blocks = ac.AdaptiveHalt(Block(model), Sure(model.to_halt_pred), DEPTH * BLOCKS, compact=True)
        held_out = [arguments(model, c) for c in tokens(source.test(rows, seeded(seed + 1)))[0].split(256)]

        def differs(output: Tensor, last: Tensor) -> Tensor:
            return (answers(model, output) != answers(model, last)).any(1)

        for halt in (deep, blocks):
            print(ac.calibrate(halt, held_out, risk=RISK, loss=differs), end="\n\n")
        return cls(model, deep, blocks, *tokens(source.test(rows, seeded(seed + 2))))

    @torch.no_grad()
    def predict(self, threshold: float, board: Tensor) -> tuple[Tensor, Tensor]:
        """Return answers and blocks of the package's own prediction."""
        answer, steps = self.model.predict(board, threshold, DEPTH)
        return answer, steps * BLOCKS

    @torch.no_grad()
    def halt(self, halt: ac.AdaptiveHalt, board: Tensor) -> tuple[Tensor, Tensor]:
        """Return answers and blocks of the loop."""
        result = halt(*arguments(self.model, board))
        return answers(self.model, result.output), result.steps * (BLOCKS if halt is self.deep else 1)

    @torch.no_grad()
    def stream(self, slots: int, board: Tensor) -> tuple[Tensor, Tensor]:
        """Return answers and blocks of the loop in slots that are refilled."""

        def samples() -> Iterator[Any]:
            for chunk in board.split(slots):
                (answer, latent), embedded = arguments(self.model, chunk)
                for row in zip(answer, latent, embedded, strict=True):
                    yield row[:2], row[2]

        results = list(ac.ContinuousBatcher(self.blocks, slots).run(samples()))
        output = torch.stack([result.output for result in results])
        return answers(self.model, output), torch.stack([result.steps for result in results])

    def forms(self, rows: int) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """Return what is compared, with batches of so many rows; each takes boards."""

        def batches(form: Callable[..., Any], *settings: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(board: Tensor) -> tuple[Tensor, Tensor]:
                answer, blocks = zip(*(form(*settings, chunk) for chunk in board.split(rows)), strict=True)
                return torch.cat(answer), torch.cat(blocks)

            return run

        return {
            "full depth": batches(self.predict, 2.0),
            "its default": batches(self.predict, 0.5),
            "its best": batches(self.predict, self.deep.policy.threshold),
            "deep steps": batches(self.halt, self.deep),
            "blocks": batches(self.halt, self.blocks),
            "stream": partial(self.stream, rows),
        }

    def examine(self, rows: int) -> dict[str, dict[str, float]]:
        """Return, for each form, what it makes of the test puzzles."""
        found = {}
        full: Tensor | None = None
        for name, form in self.forms(rows).items():
            answer, blocks = form(self.board)
            full = answer if full is None else full
            found[name] = {
                "right": 100 * _share((answer == self.solution).all(1)),
                "same": 100 * _share((answer == full).all(1)),
                "blocks": float(blocks.double().mean()),
            }
        return found


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


# --- races --------------------------------------------------------------------------------------------------
def noisy(state: Any, start: Tensor) -> Any:
    """Start 0 is the usual one; the others begin elsewhere."""
    generator = seeded(len(start))

    def moved(t: Tensor) -> Tensor:
        other = (start > 0).view(-1, *[1] * (t.dim() - 1))
        return t + NOISE * other * torch.randn(t.shape, generator=generator)

    return tuple(map(moved, state)) if isinstance(state, tuple) else moved(state)


@dataclass(frozen=True)
class Config:
    """A part of the report."""

    label: str


FORMS: Columns = {
    "form": "{name}",
    "right, %": "{right:.2f}",
    "as at full depth, %": "{same:.2f}",
    "blocks per puzzle": "{blocks:.2f}",
    "ms": "{ms:ms}",
    "time / that of a stream": "{ratio:.2f}",
}
RACES: Columns = {
    "solver": "{label}",
    "one start: right, %": "{one[right]:.1f}",
    "steps": "{one[steps]:.2f}",
    "four: right, %": "{race[right]:.1f}",
    "steps of the winner": "{race[steps]:.2f}",
    "slowest of one": "{one[slowest]:.0f}",
    "slowest winner": "{race[slowest]:.0f}",
    "time of a race / one start": "{ratios[race/one]:.2f}",
}


class ReasonerBenchmark(harness.Benchmark):
    """A recursive reasoner that halts, and races of its starts."""

    name = "reasoner"
    title = "A recursive reasoner that halts"

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_reasoner", "Folder of the results and of the weights.")
        threads: int | None = harness.option(1, "Threads of torch.", 1)
        updates: int = harness.option(Training.updates, "Updates of the reasoner; 300 with --quick.", 1)
        rows: int = harness.option(256, "Puzzles of a timed batch.", 1)
        full_seconds: ClassVar[float] = 30.0

    _settings: ClassVar[tuple[str, ...]] = (*harness.Benchmark._settings, "updates")

    def configs(self) -> Iterable[Config]:
        return map(Config, ("reasoner", "race, reasoner", "race, energy"))

    def measure(self, config: Config) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            if config.label == "reasoner":
                return self._reasoner(config)
            with torch.no_grad():
                return self._race(config, *self._racers(config))

    def _recipe(self) -> Training:
        return Training(updates=300 if self.options.quick else self.options.updates)

    def _trained(self) -> Reasoner:
        """Return the reasoner; its weights are read if they were trained by the same recipe before."""
        if not hasattr(self, "_made"):
            seed, recipe, source = self.options.seed, self._recipe(), FourByFour(self.options.seed)
            path = Path(self.options.out) / "reasoner.pt"
            torch.manual_seed(seed)
            model = make_model(recipe.width).eval()
            kept = torch.load(path, weights_only=True) if path.exists() else {}
            if kept.get("recipe") != {**asdict(recipe), "seed": seed}:
                weights = train(make_model(recipe.width), recipe, source, seed).state_dict()
                kept = {"recipe": {**asdict(recipe), "seed": seed}, "weights": weights}
                torch.save(kept, path)
            model.load_state_dict(kept["weights"])
            self._made = Reasoner.make(model, source, 512 if self.options.quick else 4096, seed)
        return self._made

    def _reasoner(self, config: Config) -> dict[str, Any]:
        reasoner = self._trained()
        rows = self.options.rows
        found = reasoner.examine(rows)

        def agreement() -> float:
            best, ours = found["its best"], found["deep steps"]
            apart = abs(best["same"] - ours["same"])
            if apart > 0.1:
                raise harness.DisagreementError(f"deep steps: {apart:.2f} % of other answers than its best")
            if abs(found["stream"]["same"] - found["blocks"]["same"]) > 0.1:
                raise harness.DisagreementError("stream: other answers than in batches")
            return apart

        calls = {name: partial(form, reasoner.board) for name, form in reasoner.forms(rows).items()}
        thresholds = {"deep": reasoner.deep.policy.threshold, "blocks": reasoner.blocks.policy.threshold}
        known = {"found": found, "threshold": thresholds, "version": version("tiny-recursive-model")}
        return self.timed(config, calls, agreement, partial(ratios_over, under="stream"), **known)

    def _racers(self, config: Config) -> tuple[Any, Any, tuple[Tensor, ...], Callable[[Any], Tensor]]:
        """Return what runs, the usual start, the inputs, and what tells right results."""
        if config.label == "race, reasoner":
            reasoner = self._trained()
            state, embedded = arguments(reasoner.model, reasoner.board[: self.options.rows])
            solution = reasoner.solution[: self.options.rows]
            return (
                reasoner.blocks,
                state,
                (embedded,),
                lambda result: (answers(reasoner.model, result.output) == solution).all(1),
            )
        seed, source = self.options.seed, FourByFour(self.options.seed)
        recipe = Recipe(updates=30) if self.options.quick else Recipe()
        solver = EnergySolver(source.box, recipe)
        with torch.enable_grad():
            train_energy(solver, source, recipe, seed, lambda loss: None)
        puzzles = source.test(self.options.rows, seeded(seed))
        board = puzzles.board()
        step_size = float(solver.log_step.detach().exp())
        descend = ac.EnergyDescent(solver.energy, step_size, max_steps=64, tol=1e-3, gradient="detached")
        return descend, first_answer(board, seeded(seed)), (board,), lambda result: solved(result.y, puzzles)

    def _race(
        self,
        config: Config,
        halt: Any,
        state: Any,
        inputs: tuple[Tensor, ...],
        right: Callable[[Any], Tensor],
    ) -> dict[str, Any]:
        def one() -> Any:
            return halt(state, *inputs)

        def race() -> Any:
            return ac.race(halt, state, *inputs, starts=STARTS, perturb=noisy).result

        found = {}
        for name, call in (("one", one), ("race", race)):
            result = call()
            found[name] = {
                "right": 100 * _share(right(result)),
                "steps": float(result.steps.double().mean()),
                "slowest": int(result.steps.max()),
            }
        calls = {"one": one, "race": race}
        return self.timed(config, calls, lambda: 0.0, partial(ratios_over, under="one"), **found)

    @staticmethod
    def notes(report: Report) -> str:
        settings = report["settings"]
        rows, updates = settings["rows"], settings["updates"]
        return f"{rows} puzzles in a batch, or slots; the reasoner had {updates:,} updates."

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterator[Table]:
        for row in rows:
            if row["label"] == "reasoner":
                forms = [
                    {
                        "name": name,
                        **found,
                        "ms": row["times_ms"][name]["median"],
                        "ratio": row["ratios"].get(f"{name}/stream", 1.0),
                    }
                    for name, found in row["found"].items()
                ]
                yield Table("Forms", "", forms, FORMS)
        yield Table("Races", "", [row for row in rows if row["label"] != "reasoner"], RACES)


if __name__ == "__main__":
    ReasonerBenchmark.main()
