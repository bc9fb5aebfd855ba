"""What the halting benchmark times: steps and heads whose rows halt as a script says, and how to run them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from .harness import CompileCache, both_passes
from .timing import Call

ACT_THRESHOLD = 0.99
CONFIDENCE_THRESHOLD = 0.9
TOKENS, HEADS, CLASSES = 16, 4, 10
HALT_LOGIT = 20.0

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Config:
    """A point of the grid: B rows of width D; at most M steps, of which a row takes a fraction on average."""

    core: str
    batch: int
    dim: int
    max_steps: int = 16
    fraction: float = 0.25
    policy: str = "fixed"
    training: bool = False
    compiled: bool = True

    @property
    def mode(self) -> str:
        """Forward pass only, or both passes."""
        return "train" if self.training else "infer"

    @property
    def model_key(self) -> tuple[str, int, str, bool]:
        """What needs weights and a compilation of its own; B, M and the fraction share them."""
        return (self.core, self.dim, self.policy, self.training)

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        size = f"B={self.batch} D={self.dim} M={self.max_steps}"
        return f"{self.core} {size} mean/M={self.fraction:g} {self.policy} {self.mode}"

    def seconds(self, flops: float) -> float:
        """Estimate the time of one masked call at half this rate of operations."""
        square = self.dim * self.dim
        products = {  # operations of one step on one row
            "gru": 12 * square,
            "mlp": 16 * square,
            "transformer": TOKENS * (24 * square + 4 * TOKENS * self.dim),
        }
        passes = 3 if self.training else 1
        work = passes * products[self.core] * self.batch * self.max_steps
        # Small operations cost 0.15 ms in each step.
        return work / (0.5 * flops) + 1.5e-4 * self.max_steps * passes


# --- steps and heads ----------------------------------------------------------------------------------------
class GRUCore(nn.GRUCell):
    """GRU cell D → D: h [B, D] is the state, x [B, D] the row's context."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, h)


class MLPCore(nn.Sequential):
    """Pre-norm residual block D → 4D → D."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


class TransformerCore(nn.Module):
    """Pre-norm transformer block over the tokens of one row, state [B, T, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = MLPCore(dim)

    def forward(self, h: Tensor) -> Tensor:
        rows, tokens, dim = h.shape
        q, k, v = self.qkv(self.norm(h)).view(rows, tokens, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mlp(h + self.out(mixed.transpose(1, 2).reshape(rows, tokens, dim)))


CORES: dict[str, Callable[[int], nn.Module]] = {
    "gru": lambda dim: GRUCore(dim, dim),
    "mlp": MLPCore,
    "transformer": TransformerCore,
}


class ScriptedStep(nn.Module):
    """Apply the core to h and count the script down: ``(h,) → (h,)`` or ``(h, script) → (h, script)``."""

    tick: Tensor

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("tick", torch.tensor([1.0, 0.0]))

    def forward(self, state: State, *inputs: Tensor) -> State:
        h = self.core(state[0], *inputs)
        return (h,) if len(state) == 1 else (h, state[1] - self.tick)


class ScriptedHead(nn.Module):
    """Linear of h (mean over tokens), plus the scripted logit on output 0: ``(h, script) → [B, width]``.

    The Linear's weights are small, so that it is computed and trained but never decides.
    """

    first: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width)
        nn.init.normal_(self.linear.weight, std=0.02 / dim**0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("first", (torch.arange(width) == 0).float())

    def forward(self, state: State) -> Tensor:
        h, script = state
        pooled = h.mean(dim=1) if h.dim() == 3 else h
        left, running = script[:, :1], script[:, 1:]
        return self.linear(pooled) + torch.where(left < 0.5, HALT_LOGIT, running) * self.first


def scripted_steps(batch: int, max_steps: int, fraction: float, seed: int = 0) -> Tensor:
    """Draw how many steps each row runs: int64 [batch], from 1 to max_steps, mean fraction · max_steps.

    The law is a clipped geometric one, as if every row halted with the same probability at every step and
    were cut off at ``max_steps``: most rows are short, a few are long, which is what learned halting looks
    like. The values are stratified quantiles in a random order, so that the mean does not depend on the seed.
    """
    mean = fraction * max_steps
    if not 1.0 <= mean <= max_steps:
        raise ValueError(
            f"fraction: expected a mean of 1 to {max_steps} steps, got {fraction} * {max_steps} = {mean:g}"
        )
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    if mean in (1.0, max_steps):
        return torch.full((batch,), int(mean), dtype=torch.int64)
    low, high = 1e-9, 1.0  # bisect for p: min(Geometric(p), M) has the mean (1 - (1 - p)^M) / p
    for _ in range(80):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** max_steps) / p > mean else (low, p)
    u = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    quantiles = torch.ceil(torch.log1p(-u) / math.log1p(-(low + high) / 2))
    return quantiles.clamp(1, max_steps).to(torch.int64)[order]


def active_counts(steps: Tensor) -> list[int]:
    """How many rows take part in step 1, 2, … up to the longest row's last step."""
    return [int((steps >= n).sum()) for n in range(1, int(steps.max()) + 1)]


@dataclass
class Problem:
    """What every form runs: built once for a configuration, shared by all of them."""

    config: Config
    step: nn.Module
    head: nn.Module | None
    state: State
    inputs: State
    steps: Tensor

    @property
    def weights(self) -> list[Tensor]:
        """Parameters of step and head."""
        return [p for m in (self.step, self.head) if m is not None for p in m.parameters()]

    @property
    def leaves(self) -> list[Tensor]:
        """What training differentiates: the weights, and h and x as if an encoder had made them."""
        return [*self.weights, self.state[0], *self.inputs]


@lru_cache(maxsize=1)
def make_model(
    core: str, dim: int, policy: str, training: bool, device: torch.device, seed: int
) -> tuple[ScriptedStep, ScriptedHead | None]:
    """Build the step and, for a policy that has one, the head; configurations side by side share them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        step = ScriptedStep(CORES[core](dim))
        width = {"fixed": 0, "confidence": CLASSES, "act": 1}[policy]
        head = ScriptedHead(dim, width) if width else None
    for module in (step, head):
        if module is not None:
            module.to(device).requires_grad_(training)
    return step, head


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Build the model and draw the tensors of one configuration."""
    step, head = make_model(*config.model_key, device, seed)
    generator = torch.Generator().manual_seed(seed)
    steps = scripted_steps(config.batch, config.max_steps, config.fraction, seed)
    tokens = (TOKENS,) if config.core == "transformer" else ()
    shapes = [(config.batch, *tokens, config.dim), *[(config.batch, config.dim)] * (config.core == "gru")]
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    h, *inputs = (t.requires_grad_(config.training) for t in drawn)
    state: State = (h,)
    if config.policy != "fixed":
        left = steps.to(torch.float32)
        running = torch.full_like(left, -HALT_LOGIT)
        if config.policy == "act":
            # h_n ≈ 0.8/N: the weights spread over all N steps, N - 1 of which stay clear of the threshold.
            running = torch.logit(0.8 / left.clamp(min=2))
        state = (h, torch.stack([left, running], dim=1).to(device))
    return Problem(config, step, head, state, tuple(inputs), steps.to(device))


# --- the forms that are timed -------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What every form returns: output [B, …], steps int64 [B], cost [B]."""

    output: Tensor
    steps: Tensor
    cost: Tensor


Form = Callable[[], Outcome]


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (like.dim() - 1))


def _sure(logits: Tensor) -> Tensor:
    return torch.softmax(logits.detach(), dim=-1).amax(dim=-1) >= CONFIDENCE_THRESHOLD


class MaskedStep(nn.Module):
    """One masked step of a policy, step, head and masking together: what is run as it is, or compiled."""

    def __init__(self, policy: str, step: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.policy, self.step, self.head = policy, step, head

    def forward(
        self, state: State, inputs: State, active: Tensor, carry: State, threshold: Tensor
    ) -> tuple[State, Tensor, State]:
        new = self.step(state, *inputs)
        if self.head is None:
            left = carry[0] - 1
            still_active, carry = left > 0, (left,)
        elif self.policy == "confidence":
            output, steps = carry
            logits = self.head(new)
            still_active = active & ~_sure(logits)
            carry = torch.where(active[:, None], logits, output), steps + active
        else:
            spent, remainder, output, steps = carry
            total = spent + torch.sigmoid(self.head(new)).squeeze(-1)
            halts = active & (total >= threshold)
            remainder = torch.where(halts, 1 - spent, remainder)
            weight = torch.where(halts, 1 - spent, total - spent) * active
            output = output + _wide(weight, new[0]) * new[0]
            still_active, carry = active & ~halts, (total, remainder, output, steps + active)
        frozen = tuple(torch.where(_wide(active, n), n, o) for n, o in zip(new, state, strict=True))
        return frozen, still_active, carry


def run_masked(problem: Problem, advance: Callable[..., tuple[State, Tensor, State]]) -> Outcome:
    """Run all rows until the last one has halted, with a `MaskedStep`."""
    policy, rows, last = problem.config.policy, problem.config.batch, problem.config.max_steps
    state, h = problem.state, problem.state[0]
    active = torch.ones(rows, dtype=torch.bool, device=h.device)
    # A tensor, so that the compiled step serves the last step too, at which every row halts.
    threshold, at_last = h.new_full((), ACT_THRESHOLD), h.new_full((), float("-inf"))
    carry: State
    if policy == "fixed":
        carry, last = (problem.steps,), int(problem.steps.max())
    else:
        steps = torch.zeros(rows, dtype=torch.int64, device=h.device)
        nothing = h.new_zeros(rows)
        confident = (h.new_zeros(rows, CLASSES), steps)
        carry = confident if policy == "confidence" else (nothing, nothing, torch.zeros_like(h), steps)
    for n in range(1, last + 1):
        limit = threshold if n < last else at_last
        state, active, carry = advance(state, problem.inputs, active, carry, limit)
        if policy != "fixed" and n < last and not active.any():
            break
    if policy == "fixed":
        return Outcome(state[0], problem.steps, problem.steps.to(h.dtype))
    output, steps = carry[-2:]
    return Outcome(output, steps, steps.to(h.dtype) if policy == "confidence" else steps + carry[1])


class _Exits:
    """Collects rows as they halt and puts them back in order."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.out: list[Tensor] = []
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, index: Tensor, *values: Tensor) -> None:
        if torch.is_grad_enabled():
            # Writing in place would cost a whole gradient buffer for each step.
            self.parts.append((index, *values))
            return
        self.out = self.out or [v.new_empty(self.rows, *v.shape[1:]) for v in values]
        for out, v in zip(self.out, values, strict=True):
            out.index_copy_(0, index, v)

    def result(self) -> list[Tensor]:
        if self.out:
            return self.out
        index, *columns = (torch.cat(column) for column in zip(*self.parts, strict=True))
        order = index.argsort()
        return [column.index_select(0, order) for column in columns]


def _take(index: Tensor, *tensors: Tensor) -> State:
    return tuple(t.index_select(0, index) for t in tensors)


def run_boolean(problem: Problem) -> Outcome:
    """Run the active rows, with ``index_select``: on a CPU several times faster than indexing by a mask."""
    config, head = problem.config, problem.head
    state, inputs, h = problem.state, problem.inputs, problem.state[0]
    rows = torch.arange(config.batch, device=h.device)
    fixed, act = config.policy == "fixed", config.policy == "act"
    steps = problem.steps if fixed else torch.empty_like(rows)
    carry: State = (h.new_zeros(config.batch), torch.zeros_like(h)) if act else (steps,) * fixed
    exits = _Exits(config.batch)
    for n in range(1, config.max_steps + 1):
        state = problem.step(state, *inputs)
        leaving: State  # what a row takes along that halts here
        if fixed:
            halts, leaving = carry[0] <= n, (state[0],)
        elif head is not None and not act:
            logits = head(state)
            halts, leaving = _sure(logits), (logits,)
        elif head is not None:
            spent, output = carry
            total = spent + torch.sigmoid(head(state)).squeeze(-1)
            halts = total >= (ACT_THRESHOLD if n < config.max_steps else float("-inf"))
            remainder = 1 - spent
            weight = torch.where(halts, remainder, total - spent)
            output = output + _wide(weight, output) * state[0]
            leaving, carry = (output, remainder), (total, output)
        gone = halts.nonzero().squeeze(1)
        if len(gone) == len(rows) or n == config.max_steps:
            if not fixed:
                steps[rows] = n
            exits.add(rows, *leaving)
            break
        if len(gone):
            left, *values = _take(gone, rows, *leaving)
            if not fixed:
                steps[left] = n
            exits.add(left, *values)
            kept = (~halts).nonzero().squeeze(1)
            state, inputs, carry = _take(kept, *state), _take(kept, *inputs), _take(kept, *carry)
            (rows,) = _take(kept, rows)
    result = exits.result()
    return Outcome(result[0], steps, steps + result[1] if act else steps.to(h.dtype))


def adaptive(
    problem: Problem, compact: bool | str, step: Callable[..., Any] | None = None, **options: Any
) -> Form:
    """Return a call of AdaptiveHalt on the problem."""
    policies: dict[str, Callable[[], ac.Policy]] = {
        "fixed": lambda: ac.FixedSteps(problem.steps),
        "confidence": lambda: ac.Confidence(CONFIDENCE_THRESHOLD),
        "act": lambda: ac.ACT(problem.head, threshold=ACT_THRESHOLD),
    }
    halt = ac.AdaptiveHalt(
        problem.step if step is None else step,
        policies[problem.config.policy](),
        max_steps=problem.config.max_steps,
        readout=problem.head if problem.config.policy == "confidence" else None,
        compact=compact,
        **options,
    )

    def call() -> Outcome:
        result = halt(problem.state, *problem.inputs)
        return Outcome(result.output, result.steps, result.cost)

    return call


def forms(problem: Problem, compiled: CompileCache | None) -> dict[str, Form]:
    """Return every form but the lower bound; the compiled ones only with a cache."""
    config = problem.config
    plain = MaskedStep(config.policy, problem.step, problem.head)
    calls: dict[str, Form] = {
        "masked": partial(run_masked, problem, plain),
        "boolean": partial(run_boolean, problem),
        "auto": adaptive(problem, "auto"),
        "compact": adaptive(problem, True),
        "mask": adaptive(problem, False),
    }
    if compiled is not None:
        # The batch is a dynamic dimension, so that one compilation serves every B and M.
        advance = compiled.get(config.model_key, "masked", plain, dynamic=True)
        calls["masked_compile"] = partial(run_masked, problem, advance)
        step = compiled.get(config.model_key, "step", problem.step, dynamic=True)
        calls["auto_compile"] = adaptive(problem, "auto", step)
    return calls


def loss(call: Form) -> Tensor:
    """The loss of training: the mean of output², and a hundredth of the mean ponder cost."""
    result = call()
    return result.output.square().mean() + 0.01 * result.cost.mean()


def training(problem: Problem, call: Form) -> Callable[[], tuple[Tensor, ...]]:
    """Return the forward and backward pass of a form."""
    return partial(both_passes, partial(loss, call), problem.leaves)


def lower_bound(problem: Problem) -> Call:
    """Return a call that no implementation can beat.

    Core and head run on contiguous tensors of each step's true size, made beforehand as prefixes of one
    block, so that they are as warm in the caches as a well-kept active block. In training every step's
    gradient of its true size comes from outside as well, and every step returns those of h, x and the
    weights.
    """
    step, head, counts = problem.step, problem.head, active_counts(problem.steps)

    def prefixes(tensors: State) -> list[State]:
        own = [t.detach().clone() for t in tensors]
        return [
            tuple(c[:n].detach().requires_grad_(t.requires_grad) for c, t in zip(own, tensors, strict=True))
            for n in counts
        ]

    states, inputs = prefixes(problem.state), prefixes(problem.inputs)

    def outputs() -> Iterator[Tensor]:
        for state, context in zip(states, inputs, strict=True):
            new = step(state, *context)
            yield new[0]
            if head is not None:
                yield head(new)

    def forward() -> None:
        for _ in outputs():
            pass  # nothing is kept, so that every step finds the memory that the one before has freed

    if not problem.config.training:
        return forward
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in outputs()]
    leaves = [*problem.weights, *(state[0] for state in states), *(x for context in inputs for x in context)]
    return lambda: torch.autograd.grad(list(outputs()), leaves, upstream)
