"""The compiled module, csrc/bindings.cpp. What a list or a tuple holds is said there."""

from collections.abc import Iterator, Sequence
from typing import Any

CPU: int
EMULATED: bool
MAX_LEAVES: int
STATUS: dict[str, int]
MAX_SUMS: int

def is_ordinary(tensor: Any, shape: tuple[int, ...], /) -> bool: ...
def are_ordinary(tensors: list[Any], shapes: list[tuple[int, ...]], /) -> bool: ...
def ordinary_rows(tensor: Any, /) -> int: ...
def own_parameters(
    module: Any, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], dtype: int, /
) -> tuple[Any, ...] | None: ...
def known_tensors(
    known: KnownRun, halt: Any, state: Any, inputs: tuple[Any, ...], /
) -> tuple[Any, ...] | None: ...
def are_ordinary_rows(state: list[Any], inputs: list[Any], /) -> bool: ...
def compact_index(arguments: list[Any], /) -> int: ...
def compact_temp_bytes(rows: int, /) -> int: ...
def check_blocks(tensors: Sequence[Any], rows: int, name: str, /) -> None: ...
def gather_rows(tensors: Sequence[Any], index: Any, device: int, stream: int, /) -> list[Any]: ...
def scatter_rows(tensors: Sequence[Any], index: Any, rows: int, device: int, stream: int, /) -> list[Any]: ...
def all_positive(arguments: list[Any], /) -> bool: ...
def in_order(arguments: list[Any], /) -> bool: ...
def merge_rows(
    rows: Sequence[Any], otherwise: Sequence[Any], index: Any, size: int, device: int, stream: int, /
) -> list[Any]: ...
def split_rows(
    grads: Sequence[Any], index: Any, size: int, with_rows: bool, device: int, stream: int, /
) -> list[Any]: ...
def act_step(arguments: list[Any], threshold: float, /) -> None: ...
def act_step_backward(arguments: list[Any], threshold: float, /) -> None: ...
def pondernet_step(arguments: list[Any], log_prior: float, log_epsilon: float, /) -> None: ...
def pondernet_step_backward(arguments: list[Any], log_prior: float, log_epsilon: float, /) -> None: ...
def bernoulli_step(arguments: list[Any], /) -> None: ...
def bernoulli_step_backward(arguments: list[Any], /) -> None: ...
def uniform_draws(arguments: list[Any], /) -> None: ...
def confidence(arguments: list[Any], /) -> None: ...
def convergence_step(arguments: list[Any], tolerance: float, /) -> None: ...
def linear(arguments: list[Any], /) -> None: ...
def recurrence(arguments: list[Any], /) -> None: ...
def recurrence_scratch(arguments: list[Any], /) -> int: ...
def recurrence_trace(arguments: list[Any], /) -> None: ...
def recurrence_backward(arguments: list[Any], /) -> None: ...

class KnownRun:
    def __init__(
        self,
        own: type,
        settings: list[tuple[str, Any]],
        children: dict[str, Any],
        modules: list[Any],
        formulas: int,
        methods: list[tuple[type, str]],
        tables: list[tuple[Any, ...]],
        form: tuple[int, ...],
        /,
    ) -> None: ...

class RecurrenceTape:
    def __init__(self, rows: int, /) -> None: ...
    @property
    def bytes(self) -> int: ...

def plan_packing(arguments: list[Any], /) -> None: ...
def halt_rows(
    tensors: tuple[Any, ...],
    leaves: Sequence[Any],
    results: Sequence[Any],
    increments: Sequence[Any],
    totals: Sequence[Any],
    moving: Sequence[Any],
    integers: list[int],
    threshold: float,
    /,
) -> tuple[int, Any, Any, list[Any] | None]: ...
def halt_node_forward(context: Any, node: HaltNode, /, *tensors: Any) -> tuple[Any, ...]: ...
def halt_node_backward(
    node: HaltNode, saved: tuple[Any, ...], gradients: tuple[Any, ...], /
) -> tuple[Any, ...]: ...
def halt_backward(
    tensors: tuple[Any, ...],
    g_results: Sequence[Any],
    g_packed: Sequence[Any],
    g_totals: Sequence[Any],
    readout_dtype: Any,
    shared: bool,
    integers: list[int],
    threshold: float,
    /,
) -> tuple[Any, Any, list[Any], list[Any]]: ...
def use_torch(
    tensor: Any,
    parameter: Any,
    plain: Any,
    empty: Any,
    use_count: Any,
    exchange: Any,
    dtypes: list[Any],
    /,
) -> None: ...
def flops_per_row(weights: int, state: Any, /) -> float: ...
def make_schedule(
    weights: int,
    state: Sequence[Any],
    inputs: Sequence[Any],
    packing: float,
    per_tensor: float,
    per_byte: float,
    per_flop: float,
    /,
) -> Schedule: ...

class Emulation:
    order: str
    seed: int
    multiprocessors: int
    resident_blocks: int
    shared_memory: int
    launches: int

emulation: Emulation  # where EMULATED

class Schedule:
    fixed: float
    move: float
    row: float
    def __init__(self, fixed: float, move: float, row: float, /) -> None: ...
    def least(self, rows: int, /) -> int: ...
    def kept(self, halted: int, /) -> None: ...
    def packed(self) -> None: ...

class StateLike:
    def __init__(self, state: list[Any], form: int, /) -> None: ...
    def take(self, tree: Any, rows: int, /) -> list[Any] | None: ...

class HaltNode:
    row: list[int]
    place: list[int]
    flag: list[int]
    act: bool
    bounds: tuple[int, int, int]
    threshold: float
    has_readout: bool
    shared: bool
    readout_dtype: Any
    totals: int
    leaves: int
    inputs: int
    has_results: bool
    has_next: bool

class HaltRun:
    running: int
    inputs_replaced: bool
    has_broken: bool
    def use_first(self, leaves: list[Any], readout: Any, output: Any, /) -> None: ...
    def advance(
        self, rows: int, step: int, leaves: list[Any], readout: Any, logits: Any, stream: int, /
    ) -> int: ...
    def go_on(
        self,
        steps: Iterator[Any],
        rows: int,
        state: Any,
        arguments: tuple[Any, ...],
        read: Any,
        head: Any,
        python: Any,
        /,
    ) -> None: ...
    def change_shapes(self, state: StateLike, results: list[Any], /) -> None: ...
    def set_rows(self, row: Any, carry: Any, /) -> None: ...

class KnownLoop:
    def run(
        self,
        steps: Iterator[Any],
        state: Any,
        inputs: tuple[Any, ...],
        read: Any,
        head: Any,
        threshold: float,
        signal: Any,
        parameter: int,
        carry: Any,
        inference_mode: bool,
        apply: Any,
        most: int,
        python: Any,
        /,
    ) -> tuple[list[Any], Any, Any, Any, Any, bool] | None: ...

class SlotBlock:
    room: int
    def configure(self, arguments: list[Any], /) -> None: ...
    def use_totals(self, cost: Any, log_prob: Any, /) -> None: ...
    def use_first(self, leaves: list[Any], readout: Any, output: Any, weighted: bool, /) -> None: ...
    def put(self, sample: Any, key: int, sample_id: int, /) -> bool: ...
    def put_leaves(self, leaves: list[Any], key: int, sample_id: int, /) -> bool: ...
    def settle(self) -> int: ...
    def blocks(self) -> list[Any]: ...
    def carried(self) -> list[Any]: ...
    def clear(self) -> None: ...
    def advance(
        self,
        leaves: list[Any],
        readout: Any,
        logits: Any,
        decision: Any,
        carry: list[Any],
        inference_mode: bool,
        /,
    ) -> Any: ...

class DescentRun:
    accepted: int
    broken: int
    def advance(
        self, point: Any, value: Any, gradient: Any, accepted: Any, step: int, stream: int, /
    ) -> Any: ...
    def set_rows(self, row: Any, /) -> None: ...
    def index(self) -> Any: ...

def descent_update(
    tensors: tuple[Any, ...], step_size: Any, integers: list[int], numbers: list[float], /
) -> None: ...
def descent_normals(arguments: list[Any], /) -> None: ...
def mlp_descent(arguments: list[Any], numbers: list[float]) -> None: ...
def mlp_descent_backward(arguments: list[Any], numbers: list[float]) -> None: ...
def mlp_descent_scratch(arguments: list[Any]) -> int: ...
def hopfield_descent(arguments: list[Any], numbers: list[float]) -> None: ...
def hopfield_descent_backward(arguments: list[Any], numbers: list[float]) -> None: ...
def hopfield_descent_scratch(arguments: list[Any]) -> int: ...
def quadratic_descent(arguments: list[Any], numbers: list[float]) -> None: ...
def quadratic_descent_backward(arguments: list[Any], numbers: list[float]) -> None: ...
def quadratic_descent_scratch(arguments: list[Any]) -> int: ...
def use_isa(name: str) -> None: ...
def build_info() -> dict[str, Any]: ...
def halt_run(
    *,
    state: StateLike,
    schedule: Schedule,
    results: list[Any],
    inputs: list[Any],
    rows: int,
    row: Any,
    flag: Any,
    steps: Any,
    status: Any,
    wide: bool,
    min_steps: int,
    max_steps: int,
    policy: int,
    has_head: bool,
    reads_logits: bool,
    threshold: float,
    signal: Any,
    parameter: int,
    sample_ids: Any,
    carry: Any,
    cost: Any,
    running: Any,
    inference_mode: bool,
    apply: Any,
    device: int,
) -> HaltRun: ...
def slot_block(*, blocks: list[Any], trees: list[int], leaves: int, slots: int) -> SlotBlock: ...
def known_loop(
    *,
    state: StateLike,
    inputs: list[Any],
    schedule: Schedule,
    readout: Any,
    apart: bool,
    weighted: bool,
    wide: bool,
    policy: int,
    has_head: bool,
    reads_logits: bool,
    min_steps: int,
    max_steps: int,
) -> KnownLoop: ...
def descent_run(
    *,
    y: Any,
    energy: Any,
    steps: Any,
    status: Any,
    kept: Any,
    velocity: Any,
    moving: Any,
    scale: Any,
    sample_ids: Any,
    row: Any,
    flag: Any,
    running: Any,
    step_size: Any,
    sigma: Any,
    rule: tuple[list[int], list[float]],
    device: int,
) -> DescentRun: ...
