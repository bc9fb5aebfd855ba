"""What the recurrence benchmark times: a cell whose rows halt by themselves, and the ways to run it.

The baselines are the loops of `halting_forms`, on a cell without a script: what a row computes decides when
it halts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.plan import RunPlan

from . import halting_forms
from .halting_forms import ACT_THRESHOLD, Form, MaskedStep, Outcome, State, run_boolean, run_masked
from .harness import CompileCache

NEAR = 1e-4
"""A row whose halting sum comes this near to the threshold is drawn anew: there, rounding would decide."""
HEAD_SCALE = 2.0
"""Factor on the initial weights of the head, without which nearly all rows halt after the same step."""


@dataclass(frozen=True)
class Config:
    """A point of the grid: B rows of width D, and the number of threads; mean number of steps M/4."""

    batch: int
    dim: int
    training: bool = False
    threads: int = 1
    cell: str = "gru"
    compiled: bool = True
    max_steps: int = 16

    @property
    def mode(self) -> str:
        """Forward pass only, or both passes."""
        return "train" if self.training else "infer"

    @property
    def model_key(self) -> tuple[str, int, bool, int]:
        """What needs a compilation of its own: compiled code holds the number of threads."""
        return (self.cell, self.dim, self.training, self.threads)

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.cell} B={self.batch} D={self.dim} {self.mode} {threads}"

    def operations(self, row_steps: int) -> float:
        """Return the operations of the products that a run needs.

        They are one product with the state for each step of each row, and one with the input for each row;
        the backward pass has two products for each of these.
        """
        gates = 3 if self.cell == "gru" else 4
        return (3 if self.training else 1) * 2.0 * gates * self.dim**2 * (row_steps + self.batch)


# --- cells --------------------------------------------------------------------------------------------------
class LoopedGRU(ac.cells.GRU):
    """The cell under a type that no kernel knows, so that `AdaptiveHalt` calls it at every step."""


class LoopedLSTM(ac.cells.LSTM):
    """The cell under a type that no kernel knows, so that `AdaptiveHalt` calls it at every step."""


class Step(nn.Module):
    """A cell as the loops of `halting_forms` call it: the state is a tuple of one or two tensors."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, state: State, x: Tensor) -> State:
        new = self.cell(state[0] if len(state) == 1 else state, x)
        return (new,) if len(state) == 1 else new


class Head(nn.Module):
    """A head that reads the first tensor of the state."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, state: State) -> Tensor:
        logit: Tensor = self.linear(state[0])
        return logit


class Hoisted(nn.Module):
    """The rest of a cell's step, given the product with the input: ``(state, product) → state``."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def product(self, x: Tensor) -> Tensor:
        """Compute what no step changes: the product with the input, and the biases that are added to it."""
        cell, bias = self.cell, self.cell.bias_ih
        return F.linear(x, cell.weight_ih, bias if isinstance(cell, nn.GRUCell) else bias + cell.bias_hh)

    def forward(self, state: State, product: Tensor) -> State:
        cell, dim, h = self.cell, self.cell.hidden_size, state[0]
        if isinstance(cell, nn.GRUCell):
            own = F.linear(h, cell.weight_hh, cell.bias_hh)
            reset, update = torch.sigmoid(product[:, : 2 * dim] + own[:, : 2 * dim]).chunk(2, 1)
            new = torch.tanh(torch.addcmul(product[:, 2 * dim :], reset, own[:, 2 * dim :]))
            return (torch.lerp(new, h, update),)
        gates = torch.addmm(product, h, cell.weight_hh.t())
        enter, forget = torch.sigmoid(gates[:, : 2 * dim]).chunk(2, 1)
        c = forget * state[1] + enter * torch.tanh(gates[:, 2 * dim : 3 * dim])
        return torch.sigmoid(gates[:, 3 * dim :]) * torch.tanh(c), c


CELLS: dict[str, tuple[type, type, type]] = {
    "gru": (ac.cells.GRU, LoopedGRU, nn.GRU),
    "lstm": (ac.cells.LSTM, LoopedLSTM, nn.LSTM),
}
"""The cell, its subclass that no kernel knows, and torch's layer."""


# --- problems -----------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """What every form runs. Problems of one model share its weights; each sets the head's bias anew."""

    config: Config
    cell: nn.RNNCellBase
    head: nn.Linear | None
    """The head of ACT; an LSTM has none, and its rows halt after `steps`."""
    state: State
    x: Tensor
    steps: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What training differentiates: the weights, and h and x as if an encoder had made them."""
        heads = [] if self.head is None else list(self.head.parameters())
        return [*self.cell.parameters(), *heads, self.state[0], self.x]

    def with_step(self, step: nn.Module, context: Tensor) -> halting_forms.Problem:
        """Return the problem as the loops of `halting_forms` take it, with a step and its input."""
        c = self.config
        policy = "fixed" if self.head is None else "act"
        config = halting_forms.Config("gru", c.batch, c.dim, c.max_steps, 0.25, policy, c.training)
        head = None if self.head is None else Head(self.head)
        return halting_forms.Problem(config, step, head, self.state, (context,), self.steps)


@lru_cache(maxsize=1)
def make_model(
    cell: str, dim: int, training: bool, device: torch.device, seed: int
) -> tuple[nn.RNNCellBase, nn.Linear | None]:
    """Build the cell and, for a GRU, the head; configurations side by side share them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CELLS[cell][0](dim, dim)
        head = nn.Linear(dim, 1) if cell == "gru" else None
    if head is not None:
        with torch.no_grad():
            head.weight.mul_(HEAD_SCALE)
    for module in (made, head):
        if module is not None:
            module.to(device).requires_grad_(training)
    return made, head


@torch.no_grad()
def halting_logits(cell: nn.Module, head: nn.Linear, h: Tensor, x: Tensor, max_steps: int) -> Tensor:
    """Compute a row's halting logit after every step, without the head's bias: float64 [max_steps, B]."""
    cell, weight = deepcopy(cell).double(), head.weight.double()

    def logits(h: Tensor, x: Tensor) -> Iterator[Tensor]:
        for _ in range(max_steps):
            h = cell(h, x)
            yield F.linear(h, weight).squeeze(-1)

    return torch.stack(list(logits(h.double(), x.double())))


def act_steps(logits: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """Return each row's number of steps under ACT, and how near its halting sum comes to the threshold."""
    sums = torch.sigmoid(logits[:-1] + bias).cumsum(0)
    return 1 + (sums < ACT_THRESHOLD).sum(0), (sums - ACT_THRESHOLD).abs().amin(0)


def bias_for(logits: Tensor, mean: float) -> float:
    """Return the head's bias at which rows take this mean number of steps, or the nearest that can be had.

    States do not depend on the bias, and a larger bias halts every row no later. Where a whole interval of
    biases gives the mean, its middle is returned.
    """

    def largest(holds: Callable[[float], bool]) -> float:
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            steps = float(act_steps(logits, middle)[0].double().mean())
            low, high = (middle, high) if holds(steps) else (low, middle)
        return low

    return (largest(lambda steps: steps > mean) + largest(lambda steps: steps >= mean)) / 2


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Build the model, draw the tensors of one configuration and find the head's bias."""
    cell, head = make_model(config.cell, config.dim, config.training, device, seed)
    generator = torch.Generator().manual_seed(seed)
    batch, dim, last = config.batch, config.dim, config.max_steps

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator).to(device)

    x, h = draw(batch), torch.zeros(batch, dim, device=device)
    if head is None:
        state: State = (h, torch.zeros_like(h))
        steps = halting_forms.scripted_steps(batch, last, 0.25, seed).to(device)
    else:
        state = (h,)
        logits = halting_logits(cell, head, h, x, last)
        bias = bias_for(logits, last / 4)
        steps, distance = act_steps(logits, bias)
        while len(near := (distance < NEAR).nonzero().squeeze(1)):
            x[near] = draw(len(near))
            logits[:, near] = halting_logits(cell, head, h[near], x[near], last)
            steps, distance = act_steps(logits, bias)
        with torch.no_grad():
            head.bias.fill_(bias)
    x.requires_grad_(config.training)
    h.requires_grad_(config.training)
    return Problem(config, cell, head, state, x, steps)


# --- the forms that are timed -------------------------------------------------------------------------------
def adaptive(problem: Problem, cell: nn.RNNCellBase) -> tuple[Form, RunPlan]:
    """Return a call of AdaptiveHalt with a cell, and the way that it takes in this mode."""
    head = problem.head
    policy = ac.FixedSteps(problem.steps) if head is None else ac.ACT(head, threshold=ACT_THRESHOLD)
    halt = ac.AdaptiveHalt(cell, policy, max_steps=problem.config.max_steps)
    state: Any = problem.state[0] if len(problem.state) == 1 else problem.state

    def call() -> Outcome:
        result = halt(state, problem.x)
        return Outcome(result.output, result.steps, result.cost)

    return call, halt.plan(state, problem.x)


def looped(problem: Problem) -> nn.RNNCellBase:
    """Return the problem's cell, with its own parameters, under a type that no kernel knows."""
    loop: nn.RNNCellBase = CELLS[problem.config.cell][1].from_torch(problem.cell)  # type: ignore[attr-defined]
    return loop


def layer(problem: Problem) -> Form:
    """Return a call of torch's layer, which runs all rows to the last step, and of ACT on its outputs."""
    config, cell, head, x = problem.config, problem.cell, problem.head, problem.x
    last, batch = config.max_steps, config.batch
    made = CELLS[config.cell][2](config.dim, config.dim).to(x.device)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(made, f"{name}_l0", getattr(cell, name))
    rows, count = torch.arange(batch, device=x.device), torch.arange(1, last + 1, device=x.device)[:, None]

    def call() -> Outcome:
        start = tuple(t[None] for t in problem.state)
        outputs: Tensor = made(x.expand(last, -1, -1), start[0] if len(start) == 1 else start)[0]
        if head is None:
            steps = problem.steps
            return Outcome(outputs[steps - 1, rows], steps, steps.to(x.dtype))
        halting = torch.sigmoid(head(outputs)).squeeze(-1)
        sums = halting.cumsum(0)
        steps = 1 + (sums[:-1] < ACT_THRESHOLD).sum(0)
        spent = F.pad(sums[:-1], (0, 0, 1, 0))
        remainder = 1 - spent[steps - 1, rows]
        weights = torch.where(count < steps, halting, torch.where(count == steps, remainder, 0.0))
        return Outcome(torch.einsum("mb,mbd->bd", weights, outputs), steps, steps + remainder)

    return call


def forms(problem: Problem, compiled: CompileCache | None) -> tuple[dict[str, Form], dict[str, RunPlan]]:
    """Return the forms that give a result, and the ways that AdaptiveHalt takes in those that call it.

    The compiled form is there only with a cache. To be called with gradients enabled or not, as the forms
    will be.
    """
    step, hoisted = Step(problem.cell), Hoisted(problem.cell)
    stepwise = problem.with_step(step, problem.x)
    plain = MaskedStep(stepwise.config.policy, step, stepwise.head)
    ours, way = adaptive(problem, problem.cell)
    loop, way_of_loop = adaptive(problem, looped(problem))
    calls: dict[str, Form] = {
        "ours": ours,
        "loop": loop,
        "hoisted": lambda: run_boolean(problem.with_step(hoisted, hoisted.product(problem.x))),
        "layer": layer(problem),
        "masked": partial(run_masked, stepwise, plain),
    }
    if compiled is not None:
        # The batch is a dynamic dimension, so that one compilation serves every B but 1.
        advance = compiled.get(problem.config.model_key, "masked", plain, dynamic=True)
        calls["masked_compile"] = partial(run_masked, stepwise, advance)
    return calls, {"ours": way, "loop": way_of_loop}


def steps_alone(problem: Problem) -> Callable[[], Any]:
    """Return cell and head on the rows that are active in each step: the lower bound of a loop of steps."""
    return halting_forms.lower_bound(problem.with_step(Step(problem.cell), problem.x))


def matmul(problem: Problem) -> Callable[[], Tensor]:
    """Return torch's matrix product of the shape of a step of all rows: B rows with the state's weights."""
    rows, weight = problem.x.detach(), problem.cell.weight_hh.detach()
    return partial(torch.mm, rows, weight.t(), out=rows.new_empty(len(rows), len(weight)))
