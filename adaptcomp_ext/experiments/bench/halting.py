"""Time AdaptiveHalt against masking, boolean indexing, torch.compile and a lower bound.

Forms that are timed, after a check that they give the same outputs, steps and, in training, gradients:

- *masked*: all rows run until the last one has halted; `torch.where` freezes those that have.
- *masked compile*: the same with its step (core, head, masking) under `torch.compile(dynamic=True)`.
- *boolean indexing*: after every step `state = state[active]`, written the fast way, with index tensors.
- *auto*, *compact=True*, *compact=False*: `AdaptiveHalt` with this `compact`.
- *auto, compiled step*: `AdaptiveHalt(compact="auto")` around a compiled step.
- *lower bound*: core and head alone on tensors of each step's true number of active rows, without any
  bookkeeping.

When each row halts is drawn beforehand. A head runs for real, and a script in the state, on which all forms
spend the same time, sees to it that each row halts when it should. Ratios of times in the same round, median
over interleaved rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from . import harness
from .harness import Columns, Report, Row, Table
from .timing import Call, Times, clock, interleave, ratio, summary

__all__ = ["HaltingBenchmark"]

POLICIES = ("fixed", "confidence", "act")
ACT_THRESHOLD = 0.99
CONFIDENCE_THRESHOLD = 0.9
TOKENS, HEADS, CLASSES = 16, 4, 10
HALT_LOGIT = 20.0
TOLERANCE = 1e-3
"""Relative to the largest element: block shapes change how products are summed, step after step."""

State = tuple[Tensor, ...]


# --- configurations -----------------------------------------------------------------------------------------
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
        passes = 3 if self.training else 1
        work = passes * flops_per_row(self.core, self.dim) * self.batch * self.max_steps
        # Small operations cost 0.15 ms in each step.
        return work / (0.5 * flops) + 1.5e-4 * self.max_steps * passes


REQUIRED_SIZES = ((32, 64), (256, 128), (1024, 256), (4096, 256))
FRACTIONS = (0.1, 0.25, 0.5, 1.0)


def is_required(config: Config) -> bool:
    """Whether every full run reports this configuration."""
    if (config.core, config.max_steps, config.fraction) != ("gru", 16, 0.25):
        return False
    if config.training:
        return (config.batch, config.dim) in REQUIRED_SIZES[2:] and config.policy in ("fixed", "act")
    return (config.batch, config.dim) in REQUIRED_SIZES


def _grid(
    core: str,
    sizes: Iterable[tuple[int, int]],
    fractions: Sequence[float] = (0.25,),
    policies: Sequence[str] = ("fixed",),
    max_steps: int = 16,
    **others: bool,
) -> Iterator[Config]:
    for policy, (batch, dim), fraction in product(policies, sizes, fractions):
        yield Config(core, batch, dim, max_steps, fraction, policy, **others)


def required() -> Iterator[Config]:
    """The required configurations alone."""
    yield from _grid("gru", REQUIRED_SIZES, policies=POLICIES)
    yield from _grid("gru", REQUIRED_SIZES[2:], policies=("fixed", "act"), training=True)


def default() -> Iterator[Config]:
    """Every value of every axis several times, the most important first: some twenty minutes on two cores.

    The full product of the axes would take days. After the required configurations come all fractions at
    their sizes, up to 1.0, where no row ever leaves and compaction can only lose; then other cores, widths,
    batches and step limits, small ones included, where bookkeeping weighs most.
    """
    small, medium, large = REQUIRED_SIZES[:3]
    yield from required()
    yield from _grid("gru", REQUIRED_SIZES, FRACTIONS)
    yield from _grid("gru", REQUIRED_SIZES[:3], (0.1, 0.5, 1.0), ("act",))
    yield from _grid("gru", (medium, small), (0.5, 1.0), ("confidence",))
    for max_steps in (8, 32):
        yield from _grid("gru", (medium, large), max_steps=max_steps)
        yield from _grid("gru", (medium,), policies=("act",), max_steps=max_steps)
    yield from _grid("gru", ((32, 1024),))
    yield from _grid("gru", ((256, 1024),), (0.5,))
    yield from _grid("gru", ((256, 1024),), (1.0,), max_steps=8)
    yield from _grid("gru", ((4096, 64),), (0.25, 1.0))
    yield from _grid("gru", ((4096, 128),), max_steps=8)
    yield from _grid("gru", ((32, 256),), max_steps=32)

    yield from _grid("mlp", (small, medium, large, (4096, 128)), (0.25, 1.0))
    yield from _grid("mlp", (medium,), (0.25, 1.0), ("act",))
    yield from _grid("mlp", (large, (256, 1024)), (0.5,), max_steps=8)
    yield from _grid("mlp", (small, (1024, 64)), (0.1,), max_steps=32)
    yield from _grid("mlp", (medium,), (0.5,), ("confidence",))
    yield from _grid("mlp", ((1024, 128),), policies=("confidence",), max_steps=32)

    yield from _grid("transformer", (small, medium), (0.25, 1.0))
    yield from _grid("transformer", ((256, 64),), (0.1,), max_steps=32)
    yield from _grid("transformer", ((1024, 64),), (0.5,), max_steps=8)
    yield from _grid("transformer", ((32, 256), (256, 256)), max_steps=8)
    yield from _grid("transformer", ((32, 128),), (0.5,), ("act",))
    yield from _grid("transformer", (medium,), policies=("confidence",))

    yield from _grid("gru", (medium,), (0.25, 1.0), ("fixed", "act"), training=True)
    yield from _grid("gru", (small,), policies=("fixed", "act"), training=True)
    yield from _grid("gru", (large,), (0.5,), ("fixed", "act"), training=True)
    yield from _grid("gru", (large,), (0.1, 1.0), training=True)
    yield from _grid("mlp", (medium,), training=True)
    yield from _grid("mlp", ((1024, 128),), (0.5,), max_steps=8, training=True)
    yield from _grid("transformer", (small,), training=True)
    yield from _grid("transformer", ((256, 64),), max_steps=8, training=True)


def quick() -> Iterator[Config]:
    """A look at everything in a minute or two; only one model is compiled."""
    small, medium = REQUIRED_SIZES[:2]
    for (batch, dim), policy in product(REQUIRED_SIZES[:3], POLICIES):
        yield Config("gru", batch, dim, policy=policy, compiled=(policy, dim) == ("fixed", 128))
    for fraction in (0.1, 0.5, 1.0):
        yield from _grid("gru", (medium,), (fraction,))
        yield from _grid("gru", (small,), (fraction,), compiled=False)
    yield from _grid("gru", (medium,), policies=("fixed", "act"), training=True, compiled=False)
    yield from _grid("mlp", (medium,), compiled=False)
    yield from _grid("mlp", (small,), (1.0,), compiled=False)
    yield from _grid("transformer", (small,), compiled=False)


GRIDS = {"default": default, "quick": quick, "required": required}


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


def flops_per_row(core: str, dim: int) -> float:
    """Floating-point operations of the matrix products of one step on one row."""
    if core == "transformer":
        return TOKENS * (24.0 * dim * dim + 4.0 * TOKENS * dim)
    return (12.0 if core == "gru" else 16.0) * dim * dim


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
    last = int(steps.max()) if steps.numel() else 0
    return [int((steps >= n).sum()) for n in range(1, last + 1)]


@dataclass
class Problem:
    """What every form runs: built once for a configuration, shared by all of them."""

    config: Config
    step: ScriptedStep
    head: ScriptedHead | None
    state: State
    inputs: State
    steps: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What training differentiates: the weights, and h and x as if an encoder had made them."""
        modules = [self.step] if self.head is None else [self.step, self.head]
        return [p for m in modules for p in m.parameters()] + [self.state[0], *self.inputs]


Model = tuple[ScriptedStep, ScriptedHead | None]


def make_model(config: Config, device: torch.device, seed: int) -> Model:
    """Build the step and, for a policy that has one, the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        step = ScriptedStep(CORES[config.core](config.dim))
        width = {"fixed": 0, "confidence": CLASSES, "act": 1}[config.policy]
        head = ScriptedHead(config.dim, width) if width else None
    for module in (step, head):
        if module is not None:
            module.to(device).requires_grad_(config.training)
    return step, head


def make_problem(config: Config, model: Model, device: torch.device, seed: int) -> Problem:
    """Draw the tensors of one configuration."""
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
    return Problem(config, *model, state=state, inputs=tuple(inputs), steps=steps.to(device))


# --- the forms that are timed -------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What every form returns: output [B, …], steps int64 [B], cost [B]."""

    output: Tensor
    steps: Tensor
    cost: Tensor


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *(1,) * (like.dim() - 1))


def _sure(logits: Tensor) -> Tensor:
    return torch.softmax(logits.detach(), dim=-1).amax(dim=-1) >= CONFIDENCE_THRESHOLD


class MaskedStep(nn.Module):
    """One masked step of a policy, step, head and masking together: what is run as it is, or compiled."""

    def __init__(self, policy: str, step: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.decide = {"fixed": self._fixed, "confidence": self._confidence, "act": self._act}[policy]
        self.step, self.head = step, head

    def forward(
        self, state: State, inputs: State, active: Tensor, carry: State, threshold: Tensor
    ) -> tuple[State, Tensor, State]:
        new = self.step(state, *inputs)
        still_active, carry = self.decide(new, active, carry, threshold)
        frozen = tuple(torch.where(_wide(active, n), n, o) for n, o in zip(new, state, strict=True))
        return frozen, still_active, carry

    def _fixed(self, new: State, active: Tensor, carry: State, threshold: Tensor) -> tuple[Tensor, State]:
        left = carry[0] - 1
        return left > 0, (left,)

    def _confidence(
        self, new: State, active: Tensor, carry: State, threshold: Tensor
    ) -> tuple[Tensor, State]:
        output, steps = carry
        logits = self.head(new)  # type: ignore[misc]
        return active & ~_sure(logits), (torch.where(active[:, None], logits, output), steps + active)

    def _act(self, new: State, active: Tensor, carry: State, threshold: Tensor) -> tuple[Tensor, State]:
        spent, remainder, output, steps = carry
        total = spent + torch.sigmoid(self.head(new)).squeeze(-1)  # type: ignore[misc]
        halts = active & (total >= threshold)
        remainder = torch.where(halts, 1 - spent, remainder)
        weight = torch.where(halts, 1 - spent, total - spent) * active
        output = output + _wide(weight, new[0]) * new[0]
        return active & ~halts, (total, remainder, output, steps + active)


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
        state, active, carry = advance(
            state, problem.inputs, active, carry, threshold if n < last else at_last
        )
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
) -> Callable[[], Outcome]:
    """Return a call of AdaptiveHalt on the problem."""
    policy: nn.Module
    if problem.config.policy == "fixed":
        policy = ac.FixedSteps(problem.steps)
    elif problem.config.policy == "confidence":
        policy = ac.Confidence(CONFIDENCE_THRESHOLD)
    else:
        policy = ac.ACT(problem.head, threshold=ACT_THRESHOLD)
    readout = problem.head if problem.config.policy == "confidence" else None
    max_steps = problem.config.max_steps
    step = problem.step if step is None else step
    halt = ac.AdaptiveHalt(step, policy, max_steps=max_steps, readout=readout, compact=compact, **options)

    def call() -> Outcome:
        result = halt(problem.state, *problem.inputs)
        return Outcome(result.output, result.steps, result.cost)

    return call


def forms(problem: Problem, compiled: harness.CompileCache | None) -> dict[str, Callable[[], Outcome]]:
    """Return every form but the lower bound; the compiled ones only with a cache."""
    config = problem.config
    plain = MaskedStep(config.policy, problem.step, problem.head)
    calls: dict[str, Callable[[], Outcome]] = {
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


def loss(call: Callable[[], Outcome]) -> Tensor:
    """The loss of training: the mean of output², and a hundredth of the mean ponder cost."""
    result = call()
    return result.output.square().mean() + 0.01 * result.cost.mean()


def training(problem: Problem, call: Callable[[], Outcome]) -> Callable[[], tuple[Tensor, ...]]:
    """Return the forward and backward pass of a form."""
    leaves = problem.leaves
    return lambda: torch.autograd.grad(loss(call), leaves, allow_unused=True, materialize_grads=True)


def lower_bound(problem: Problem) -> tuple[Call, list[int]]:
    """Return a call that no implementation can beat, and its number of rows in each step.

    Core and head run on contiguous tensors of each step's true size, made beforehand as prefixes of one
    block, so that they are as warm in the caches as a well-kept active block. In training every step's
    gradient of its true size comes from outside as well, and every step returns those of h, x and the
    weights.
    """
    config, head = problem.config, problem.head
    counts = active_counts(problem.steps)

    def prefixes(tensor: Tensor) -> list[Tensor]:
        own = tensor.detach().clone()
        return [own[:n].detach().requires_grad_(tensor.requires_grad) for n in counts]

    states = list(zip(*(prefixes(t) for t in problem.state), strict=True))
    inputs = list(zip(*(prefixes(t) for t in problem.inputs), strict=True)) or [()] * len(counts)

    def forward() -> None:
        # Nothing is kept, so that every step finds the memory that the one before has freed.
        for state, context in zip(states, inputs, strict=True):
            new = problem.step(state, *context)
            if head is not None:
                head(new)

    if not config.training:
        return forward, counts

    def graph() -> list[Tensor]:
        outputs = []
        for state, context in zip(states, inputs, strict=True):
            new = problem.step(state, *context)
            outputs += [new[0]] if head is None else [new[0], head(new)]
        return outputs

    with torch.no_grad():
        gradients = [torch.randn_like(out) for out in graph()]
    leaves = [p for m in (problem.step, head) if m is not None for p in m.parameters()]
    leaves += [state[0] for state in states] + [x for context in inputs for x in context]
    return lambda: torch.autograd.grad(graph(), leaves, gradients), counts


def verify(
    problem: Problem, outcomes: dict[str, Outcome], gradients: dict[str, tuple[Tensor, ...]]
) -> dict[str, float]:
    """Compare all forms with the masked one, and their steps with the schedule."""
    for name, outcome in outcomes.items():
        if not torch.equal(outcome.steps, problem.steps):
            raise harness.DisagreementError(f"{name}: the steps are not the scripted ones")
    act = problem.config.policy == "act"
    results = {n: (o.output, o.cost) if act else (o.output,) for n, o in outcomes.items()}
    worst = {"output": harness.compare(results, ("output", "ponder cost")[: 1 + act], "masked", TOLERANCE)}
    if gradients:
        worst["gradient"] = harness.compare_gradients(gradients, "masked", TOLERANCE)
    return worst


def ratios(times: Times) -> dict[str, float]:
    """Return every form over the lower bound, auto over the better baseline, and each baseline over auto."""
    found = {f"{name}/limit": ratio(times, name, "limit") for name in times if name != "limit"}
    found["auto/best"] = max(ratio(times, "auto", "masked"), ratio(times, "auto", "boolean"))
    for baseline in ("masked", "boolean", "masked_compile"):
        if baseline in times:
            found[f"{baseline}/auto"] = ratio(times, baseline, "auto")
    return found


# --- sections of their own ----------------------------------------------------------------------------------
def memory_rows(
    core: str,
    device: torch.device,
    seed: int,
    sizes: Iterable[tuple[int, int]] = REQUIRED_SIZES[1:3],
    fractions: Sequence[float] = FRACTIONS,
) -> list[dict[str, Any]]:
    """Measure the bytes alive between forward and backward pass, for M = 16, ``fixed`` and ``act``.

    AdaptiveHalt should follow ``row_steps``, the sum of steps over all rows; the masked form B times the
    longest row.
    """
    found = []
    for policy, size, fraction in product(("fixed", "act"), sizes, fractions):
        config = Config(core, *size, fraction=fraction, policy=policy, training=True, compiled=False)
        problem = make_problem(config, make_model(config, device, seed), device, seed)
        kept = {
            name: harness.kept_and_peak(partial(loss, call), problem.leaves)["kept"]
            for name, call in forms(problem, None).items()
        }
        found.append(
            {
                "config": asdict(config),
                "row_steps": int(problem.steps.sum()),
                "masked_row_steps": config.batch * int(problem.steps.max()),
                "bytes": kept,
            }
        )
    return found


def median_ms(
    calls: Mapping[str, Call], device: torch.device, seconds: float, block: float = 0.0
) -> dict[str, float]:
    """Return the median time of each call; the calls take turns."""
    times = interleave(calls, clock(device), seconds, few=5, fewest=5, block=block)
    return {name: summary(values)["median"] for name, values in times.items()}


def bandwidth(
    device: torch.device,
    seconds: float = 1.0,
    block_bytes: int = 1 << 30,
    row_bytes: Sequence[int] = (4096, 16384, 65536),
    shares: Sequence[float] = (1.0, 0.5, 0.1),
) -> Iterator[dict[str, Any]]:
    """Measure the bytes per second of compaction and of the halting step against a device copy.

    These kernels move rows and do next to no arithmetic, so that the copy is what they can hope for. The
    block is far larger than a GPU's last-level cache. Counted are the bytes that have to move: a copy reads
    and writes the block; a compaction reads the kept rows and writes the whole padded block; a weighted
    halting step reads the readout, and reads and writes the output.
    """
    for size in row_bytes:
        rows = block_bytes // size
        block = torch.randn(rows, size // 4, device=device)
        other = torch.zeros_like(block)
        calls: dict[str, Call] = {"copy": partial(other.copy_, block)}
        about: dict[str, tuple[str, float, int]] = {"copy": ("copy", 1.0, 2 * block_bytes)}
        for share in shares:
            keep = torch.rand(rows, device=device) < share
            (packed,), _, count = ac.ops.compact_padded(keep, [block])
            if not torch.equal(packed[: int(count)], block[keep]):
                raise harness.DisagreementError(
                    f"compact_padded: the rows of {size} bytes are not the kept ones"
                )
            calls[f"compact {share:g}"] = partial(ac.ops.compact_padded, keep, [block])
            about[f"compact {share:g}"] = "compact_padded", share, int(keep.sum()) * size + block_bytes
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        status = torch.zeros(rows, dtype=torch.int8, device=device)
        results = ac.ops.halting.Results(steps=steps, status=status, leaves=[], output=other)
        goes_on = torch.zeros(rows, dtype=torch.bool, device=device)
        index, weight = torch.arange(rows, device=device), torch.full((rows,), 0.05, device=device)
        bounds: dict[str, Any] = {"step": 1, "min_steps": 1, "max_steps": 16}
        step = partial(
            ac.ops.halting.halt_rows, results, index, goes_on, [], **bounds, weight=weight, readout=block
        )
        calls["halt"], about["halt"] = step, ("halt_rows", 1.0, 3 * block_bytes)
        took = median_ms(calls, device, seconds, block=10.0)
        rate = {name: moved / took[name] / 1e6 for name, (_, _, moved) in about.items()}
        for name, (kernel, share, _) in list(about.items())[1:]:
            row = {"kernel": kernel, "row_bytes": size, "kept": share, "gb_per_s": rate[name]}
            row |= {"copy_gb_per_s": rate["copy"], "of_copy": rate[name] / rate["copy"]}
            yield {**row, "ms": {n: took[n] for n in ("copy", name)}}


def sync_rows(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """Run AdaptiveHalt where any wait of the host raises; ``error`` is None where it never waited."""
    found = []
    for policy in POLICIES:
        config = Config("gru", 1024, 256, policy=policy)
        problem = make_problem(config, make_model(config, device, seed), device, seed)
        with torch.inference_mode():
            calls = forms(problem, None)
            for name in ("auto", "compact", "mask"):
                for _ in range(3):
                    calls[name]()
                torch.cuda.synchronize(device)
                error = None
                torch.cuda.set_sync_debug_mode("error")
                try:
                    calls[name]()
                except RuntimeError as raised:
                    error = str(raised).splitlines()[0]
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                found.append({"policy": policy, "form": name, "error": error})
    return found


# --- report -------------------------------------------------------------------------------------------------
LABELS = {
    "auto": "auto",
    "compact": "compact=True",
    "mask": "compact=False",
    "auto_compile": "auto, compiled step",
    "boolean": "boolean indexing",
    "masked": "masked eager",
    "masked_compile": "masked compile",
}
STYLES = {
    "masked": ("tab:gray", "o-"),
    "masked_compile": ("black", "s--"),
    "boolean": ("tab:orange", "^-"),
    "compact": ("tab:cyan", "v:"),
    "auto": ("tab:blue", "D-"),
}
WORST = 12


def _inverse(row: Row, key: str) -> str:
    return f"{1 / row['ratios'][key]:.2f}" if key in row["ratios"] else "–"


BANDWIDTH = {
    "kernel": "{kernel}",
    "row bytes": "{row_bytes}",
    "kept": "{kept:g}",
    "GB/s": "{gb_per_s:.0f}",
    "copy GB/s": "{copy_gb_per_s:.0f}",
    "of copy": "{of_copy:.0%}",
}
SIZE = {
    "core": "{config[core]}",
    "policy": "{config[policy]}",
    "B": "{config[batch]}",
    "D": "{config[dim]}",
    "M": "{config[max_steps]}",
    "mean/M": "{config[fraction]:g}",
}
WHERE: Columns = {**SIZE, "mode": lambda row: Config(**row["config"]).mode}
OVER_BOUND: Columns = {
    **WHERE,
    "lower bound ms": "{times_ms[limit][median]:ms}",
    **{label: f"{{ratios[{name}/limit]:.2f}}" for name, label in LABELS.items()},
}
LOSES: Columns = {
    **WHERE,
    "auto / best of both": "{ratios[auto/best]:.2f}",
    "auto / masked eager": partial(_inverse, key="masked/auto"),
    "auto / boolean": partial(_inverse, key="boolean/auto"),
    "auto / masked compile": partial(_inverse, key="masked_compile/auto"),
}
TRAINING: Columns = {
    **SIZE,
    "auto ms": "{times_ms[auto][median]:ms}",
    "over masked eager": "{ratios[masked/auto]:.2f}",
    "over boolean": "{ratios[boolean/auto]:.2f}",
    "over masked compile": "{ratios[masked_compile/auto]:.2f}",
    "auto / lower bound": "{ratios[auto/limit]:.2f}",
}
MEMORY: Columns = {
    **SIZE,
    "sum of steps": "{row_steps}",
    "of masked": lambda r: f"{100 * r['row_steps'] / r['masked_row_steps']:.0f} %",
    **{f"{LABELS[n]} MB": f"{{bytes[{n}]:MB2}}" for n in ("masked", "boolean", "mask", "compact", "auto")},
    "auto B / row-step": lambda r: f"{r['bytes']['auto'] / r['row_steps']:.0f}",
    "masked / auto": lambda r: f"{r['bytes']['masked'] / r['bytes']['auto']:.2f}",
}


def _worst(rows: Sequence[Row]) -> str:
    """Return the sentences on the configurations at which auto is slowest."""

    def sentence(about: str, slowness: Callable[[Row], float], candidates: Sequence[Row]) -> str:
        row = max(candidates, key=slowness)
        return f"{about}: **{slowness(row):.2f}** times its time ({Config(**row['config']).label})."

    about = "Worst case of auto against the better of masked eager and boolean indexing"
    lines = [sentence(about, lambda row: row["ratios"]["auto/best"], rows)] if rows else []
    compiled = [row for row in rows if "masked_compile/auto" in row["ratios"]]
    if compiled:
        about = "Against masked torch.compile, whose compile time is not counted"
        lines.append(sentence(about, lambda row: 1 / row["ratios"]["masked_compile/auto"], compiled))
    return "\n".join([*lines, "", "Over 1 means that auto is slower."])


@dataclass(frozen=True)
class HaltingOptions(harness.Options):
    """The options of the halting benchmark."""

    out: str = harness.option("results/bench_halting", "Folder of the results.")
    quick: bool = harness.option(False, "The same as --grid quick: one or two minutes.")
    cores: str = harness.option(
        "gru,mlp,transformer", "Step networks to time, out of gru, mlp and transformer."
    )
    grid: str = harness.option("default", "Configurations to time: default, quick or required.")
    limit_seconds: float = harness.option(
        1.5,
        "Leave out configurations whose masked form takes longer; three times longer in training.",
        0.0,
    )
    compiled: bool = harness.option(True, "Whether compiled baselines take part.")
    memory: bool = harness.option(True, "Whether training memory is measured.")
    seed: int = harness.option(0, "Seed of weights, tensors and step counts.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.wanted or not set(self.wanted) <= set(CORES):
            raise ValueError(f"cores: expected names out of {', '.join(CORES)}, got {self.cores!r}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid: expected one of {', '.join(GRIDS)}, got {self.grid!r}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names in ``cores``."""
        return tuple(name.strip() for name in self.cores.split(",") if name.strip())


class HaltingBenchmark(harness.Benchmark):
    """AdaptiveHalt against masking, boolean indexing and a lower bound."""

    name = "halting"
    title = "Halting benchmark"
    help = "Time AdaptiveHalt against masking, boolean indexing and a lower bound."
    Options = HaltingOptions
    extra: ClassVar[dict[str, Any]] = {"memory": [], "cuda": None, "skipped": []}

    built: tuple[object, Any] = (None, None)
    """The model that the configurations around this one share, behind its key."""

    @cached_property
    def flops(self) -> float:
        """Rate of a middling matrix product, for estimates only."""
        a, b = torch.randn(512, 256, device=self.device), torch.randn(256, 1024, device=self.device)
        measure = clock(self.device)
        return 2 * 512 * 256 * 1024 / (1e-3 * min(measure(partial(torch.mm, a, b)) for _ in range(10)))

    def configs(self) -> list[Config]:
        """Return what fits into the time, configurations of one model side by side."""
        o = self.options
        grid = GRIDS["quick" if o.quick else o.grid]()
        chosen, skipped = select(grid, o.wanted, self.flops, o.limit_seconds)
        self.report["skipped"] = [asdict(config) for config in skipped]
        return chosen

    def weight(self, config: Config) -> float:
        """Return the seconds that a configuration takes."""
        return max(self.options.seconds, 8 * 5 * config.seconds(self.flops))

    def measure(self, config: Config) -> dict[str, Any]:
        """Verify and time one configuration."""
        o = self.options
        if self.built[0] != config.model_key:
            self.built = config.model_key, make_model(config, self.device, o.seed)
        problem = make_problem(config, self.built[1], self.device, o.seed)
        cache = self.cache if o.compiled and config.compiled else None
        # The lower bound makes leaves that require gradients, and inference tensors could not.
        bound, counts = lower_bound(problem)

        def agreement() -> dict[str, float]:
            outcomes = {name: call() for name, call in forward.items()}
            if counts != active_counts(outcomes["auto"].steps):
                raise harness.DisagreementError("limit: its rows per step are not those that ran")
            gradients = {name: call() for name, call in calls.items()} if config.training else {}
            return verify(problem, outcomes, gradients)

        with nullcontext() if config.training else torch.inference_mode():
            forward = forms(problem, cache)
            calls: dict[str, Call] = dict(forward)
            if config.training:
                calls = {name: training(problem, call) for name, call in forward.items()}
            if cache is not None:
                label = f"{config.core}/{config.dim}/{config.policy}/{config.mode}"
                for name in ("masked_compile", "auto_compile"):
                    cache.first_call(f"{label}/{name}", calls[name])
            row = {"config": asdict(config), "label": config.label, "rows": _rows(problem.steps)}
            return harness.timed_row(
                row, {**calls, "limit": bound}, agreement, ratios, self.device, o.seconds
            )

    def extras(self) -> None:
        """Measure training memory, and what only a GPU can show."""
        o = self.options
        if o.memory:
            self.report["memory"] = memory_rows(o.wanted[0], self.device, o.seed)
        if self.device.type == "cuda":
            rows, waits = list(bandwidth(self.device)), sync_rows(self.device, o.seed)
            self.report["cuda"] = {"bandwidth": rows, "synchronisation": waits}

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        """Yield the required configurations, where compaction loses, training, memory, and everything."""
        needed = [row for row in rows if is_required(Config(**row["config"]))]
        title = "Over the lower bound: the required points"
        yield Table.of(title, "Time over the lower bound's; 1 cannot be beaten.", needed, OVER_BOUND)
        ordered = sorted(rows, key=lambda row: -row["ratios"]["auto/best"])
        yield Table.of("Where auto loses", _worst(rows), ordered[:WORST], LOSES)
        text = "Forward and backward: how many times faster auto is; its time over the lower bound's."
        yield Table.of("Training", text, (row for row in rows if row["config"]["training"]), TRAINING)
        text = (
            "Bytes of the tensors alive between forward and backward pass, beyond weights and inputs. *Of "
            "masked*: the sum of steps as a share of B times the longest row."
        )
        yield Table.of("Training memory", text, report["memory"], MEMORY)
        if report["cuda"] is not None:
            text = "Bandwidth of the row kernels against a device copy of the same block."
            yield Table.of("On the GPU", text, report["cuda"]["bandwidth"], BANDWIDTH)
            text = 'Under `torch.cuda.set_sync_debug_mode("error")`:'
            lines = [
                [r["policy"], r["form"], r["error"] or "none"] for r in report["cuda"]["synchronisation"]
            ]
            yield Table("Waits of the host", text, ("policy", "compact", "host synchronisation"), lines)
        text = "Lower bound in milliseconds, all others over the lower bound."
        yield Table.of("All configurations", text, rows, OVER_BOUND, printed=False)
        text = "Once for each model, shared by all batch sizes; not in the times above."
        lines = [[name, f"{seconds:.1f}"] for name, seconds in report["compile_seconds"].items()]
        yield Table("Compile times", text, ("model", "s"), lines)
        lines = [[Config(**config).label] for config in report["skipped"]]
        yield Table("Left out", "The masked form would have taken too long.", ("configuration",), lines)

    @staticmethod
    def draw(report: Report, rows: Sequence[Row]) -> Any:
        """Draw time over the lower bound against mean/M for GRU, M = 16, fixed steps, inference."""
        shown = []
        for batch, dim in REQUIRED_SIZES:
            wanted = {
                "core": "gru",
                "batch": batch,
                "dim": dim,
                "max_steps": 16,
                "policy": "fixed",
                "training": False,
            }
            points = [row for row in rows if wanted.items() <= row["config"].items()]
            if len(points) > 1:
                shown.append((batch, dim, sorted(points, key=lambda row: row["config"]["fraction"])))
        if not shown:
            return None
        figure, axes = harness.panels(len(shown), 3.6)
        for axis, (batch, dim, points) in zip(axes, shown, strict=True):
            for name, (color, style) in STYLES.items():
                timed = [row for row in points if f"{name}/limit" in row["ratios"]]
                x = [row["config"]["fraction"] for row in timed]
                y = [row["ratios"][f"{name}/limit"] for row in timed]
                axis.plot(x, y, style, color=color, label=LABELS[name] if timed else None, markersize=4)
            axis.axhline(1, color="tab:green", linewidth=1)
            axis.set(title=f"B = {batch}, D = {dim}", xlabel="mean steps / M", yscale="log")
            axis.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.sharey(axes[0])
        axes[0].set_ylabel("time over the lower bound")
        harness.legend(figure, "GRU cell, M = 16, inference: what halting costs beyond the rows that run")
        return figure


def _rows(steps: Tensor) -> dict[str, Any]:
    mean, total = float(steps.double().mean()), int(steps.sum())
    return {
        "mean_steps": mean,
        "longest": int(steps.max()),
        "row_steps": total,
        "active": active_counts(steps),
    }


def select(
    configs: Iterable[Config], cores: Sequence[str], flops: float, limit_seconds: float
) -> tuple[list[Config], list[Config]]:
    """Return the configurations that fit, those of one model side by side, and those that do not.

    Training may take three times the limit. A required configuration always fits.
    """
    chosen: list[Config] = []
    skipped: list[Config] = []
    for config in dict.fromkeys(configs):
        if config.core in cores:
            fits = config.seconds(flops) <= limit_seconds * (3 if config.training else 1)
            (chosen if fits or is_required(config) else skipped).append(config)
    first_of = {config.model_key: i for i, config in reversed(list(enumerate(chosen)))}
    chosen.sort(key=lambda config: first_of[config.model_key])
    return chosen, skipped
