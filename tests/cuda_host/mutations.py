"""Faults that the tests have to notice: each is put into a copy of a kernel file, and the smallest tests run.

    python -m tests.cuda_host.mutations [words of a name ...]

prints which are caught. A mutation rebuilds only the CUDA files named in it; all others come from the build
without a fault."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.cuda_host.host_build import ROOT, Build
from tests.cuda_host.run import environment, pytest_command

SECONDS = 300  # a kernel without an end is a fault that was noticed


class Mutation(NamedTuple):
    """`before` becomes `after` in a file of csrc, once; then `tests` have to fail in the order `order`."""

    name: str
    file: str
    before: str
    after: str
    objects: tuple[str, ...]
    tests: tuple[str, ...]
    order: str = "up"


HALTING, GRADIENTS, DESCENT, WHOLE = (
    "tests/ops/test_halting.py",
    "tests/ops/test_halting_gradients.py",
    "tests/ops/test_descent.py",
    "tests/nn/test_whole_descent.py",
)
ACROSS_A_BLOCK = (HALTING, "-k", "take_a_whole_block")
BARRIER = "__syncthreads();\n"

MUTATIONS = (
    # --- common/cuda.cuh: the group of threads that owns a row
    Mutation(
        "sum over a block: the barrier before the warps' sums are read, backward",
        "common/cuda.cuh",
        "if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;\n      __syncthreads();",
        "if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;",
        ("halting_backward_cuda",),
        ACROSS_A_BLOCK,
    ),
    Mutation(
        "sum over a block: the last warp is lost",
        "common/cuda.cuh",
        "for (int w = 1; w < G / 32; ++w) x += slots[w];",
        "for (int w = 1; w < G / 32 - 1; ++w) x += slots[w];",
        ("halting_backward_cuda",),
        ACROSS_A_BLOCK,
    ),
    Mutation(
        "sum over a warp: the last two lanes do not meet",
        "common/cuda.cuh",
        "for (int d = width / 2; d > 0; d /= 2) x += __shfl_down_sync",
        "for (int d = width / 2; d > 1; d /= 2) x += __shfl_down_sync",
        ("halting_backward_cuda",),
        (GRADIENTS, "-k", "gradients_match and float32"),
    ),
    Mutation(
        "broadcast over a block: the barrier before the value is read",
        "common/cuda.cuh",
        "if (threadIdx.x == 0) slot = x;\n      __syncthreads();",
        "if (threadIdx.x == 0) slot = x;",
        ("halting_cuda",),
        ACROSS_A_BLOCK,
        "down",
    ),
    Mutation(
        "any of a group: the votes of another group",
        "common/cuda.cuh",
        "<< (threadIdx.x % 32 / G * G)",
        "<< 0",
        ("halting_cuda",),
        (HALTING, "-k", "harms_no_neighbour or who_ends"),
    ),
    Mutation(
        "move_row: the tail",
        "common/cuda.cuh",
        "for (int64_t k = lane; k < n; k += G) out[k] = in[k];",
        "for (int64_t k = lane; k + 1 < n; k += G) out[k] = in[k];",
        ("halting_cuda", "halting_backward_cuda"),  # the linker takes one of the two copies
        (HALTING, "-k", "small_cases"),
    ),
    # --- act, pondernet, confidence
    Mutation(
        "act: the last row",
        "act/act_cuda.cu",
        "if (i < a.rows) act_step_row<S>(a, i);",
        "if (i + 1 < a.rows) act_step_row<S>(a, i);",
        ("act_cuda",),
        ("tests/ops/test_act.py", "-k", "small_cases"),
    ),
    Mutation(
        "act backward: a row too many",
        "act/act_cuda.cu",
        "if (i < a.rows) act_step_backward_row<S>(a, i);",
        "if (i <= a.rows) act_step_backward_row<S>(a, i);",
        ("act_cuda",),
        ("tests/ops/test_act.py", "-k", "gradients_match and running"),
    ),
    Mutation(
        "pondernet: a row too many",
        "pondernet/pondernet_cuda.cu",
        "if (i < a.rows) pondernet_step_row<S>(a, i);",
        "if (i <= a.rows) pondernet_step_row<S>(a, i);",
        ("pondernet_cuda",),
        ("tests/ops/test_pondernet.py", "-k", "every_size"),
    ),
    Mutation(
        "pondernet backward: the last row",
        "pondernet/pondernet_cuda.cu",
        "if (i < a.rows) pondernet_step_backward_row<S>(a, i);",
        "if (i + 1 < a.rows) pondernet_step_backward_row<S>(a, i);",
        ("pondernet_cuda",),
        ("tests/ops/test_pondernet.py", "-k", "gradients_match"),
    ),
    Mutation(
        "bernoulli: the last row",
        "bernoulli/bernoulli_cuda.cu",
        "if (i < a.rows) bernoulli_step_row<S>(a, i);",
        "if (i + 1 < a.rows) bernoulli_step_row<S>(a, i);",
        ("bernoulli_cuda",),
        ("tests/ops/test_bernoulli.py", "-k", "every_size"),
    ),
    Mutation(
        "convergence of long rows: the last element",
        "convergence/warp.cuh",
        "for (int64_t k = lane; k < n; k += 32) movement.add(load(now[k]), load(last[k]));",
        "for (int64_t k = lane; k + 1 < n; k += 32) movement.add(load(now[k]), load(last[k]));",
        ("convergence_cuda",),
        ("tests/ops/test_convergence.py", "-k", "last_element"),
    ),
    Mutation(
        "confidence of many classes: the first class",
        "confidence/warp.cuh",
        "for (int64_t c = lane; c < classes; c += 32) {\n    const C x = load(logits[c]);",
        "for (int64_t c = lane + 1; c < classes; c += 32) {\n    const C x = load(logits[c]);",
        ("confidence_cuda",),
        ("tests/ops/test_confidence.py", "-k", "every_size and float32"),
    ),
    Mutation(
        "confidence of many classes: half of the lanes",
        "confidence/warp.cuh",
        "for (int d = 16; d > 0; d /= 2) {\n    s.sum",
        "for (int d = 8; d > 0; d /= 2) {\n    s.sum",
        ("confidence_cuda",),
        ("tests/ops/test_confidence.py", "-k", "every_size and float32"),
    ),
    # --- compaction, route
    Mutation(
        "compaction: the first column of the next row",
        "compaction/compaction_cuda.cu",
        "if (column >= per_row) {",
        "if (column > per_row) {",
        ("compaction_cuda",),
        ("tests/ops/test_compaction.py", "-k", "small_cases"),
    ),
    Mutation(
        "compaction: the tail of the index is not set",
        "compaction/compaction_cuda.cu",
        "cuda_check(cudaMemsetAsync(index, 0xff, static_cast<size_t>(n) * sizeof(int64_t), on),\n"
        '             "compact_index (tail)");',
        "",
        ("compaction_cuda",),
        ("tests/ops/test_compaction.py", "-k", "matches_indexing and float32"),
    ),
    Mutation(
        "scatter: the other rows are not zero",
        "compaction/compaction_cuda.cu",
        "if (bytes == 0) continue;",
        "if (bytes >= 0) continue;",
        ("compaction_cuda",),
        ("tests/ops/test_compaction.py", "-k", "scatter_needs or backward_pass_is_exact"),
    ),
    Mutation(
        "route: the barrier before the bounds are read",
        "route/route_cuda.cu",
        BARRIER + "  const int64_t low",
        "const int64_t low",
        ("route_cuda",),
        ("tests/ops/test_route.py", "-k", "small_cases"),
        "down",
    ),
    Mutation(
        "route: the last row of a tile",
        "route/route_cuda.cu",
        "last / per_row + 1, index",
        "last / per_row, index",
        ("route_cuda",),
        ("tests/ops/test_route.py", "-k", "small_cases"),
    ),
    # --- halting, packing
    Mutation(
        "halting: whoever ends by the readout is not copied",
        "halting/halting_cuda.cu",
        "for (int64_t l = !weighted && a.readout.block ? -1 : 0; l < a.n_leaves; ++l)",
        "for (int64_t l = 0; l < a.n_leaves; ++l)",
        ("halting_cuda",),
        (HALTING, "-k", "small_cases"),
    ),
    Mutation(
        "halting: the last element is not tested",
        "halting/halting_cuda.cu",
        f"for (int64_t k = lane; k < n / E; k += G) {{\n{' ' * 27}const Pack<T, E> pack = packs[k];",
        f"for (int64_t k = lane; k + 1 < n / E; k += G) {{\n{' ' * 27}const Pack<T, E> pack = packs[k];",
        ("halting_cuda",),
        (HALTING, "-k", "wherever_it_is"),
    ),
    Mutation(
        "halting backward: padding is not zero",
        "halting/halting_backward_cuda.cu",
        "live ? static_cast<const S*>(a.sums[s].g_total)[r] : S(0);",
        "live ? static_cast<const S*>(a.sums[s].g_total)[r] : S(1);",
        ("halting_backward_cuda",),
        (GRADIENTS, "-k", "gradients_match and float32"),
    ),
    Mutation(
        "packing: the barrier before the warps' counts are read",
        "halting/packing_cuda.cu",
        "if (lane == 0) of_warp[warp] = sum;\n  __syncthreads();",
        "if (lane == 0) of_warp[warp] = sum;",
        ("packing_cuda",),
        (HALTING, "-k", "the_plan_is"),
    ),
    Mutation(
        "packing: the barrier before the rows are dealt out",
        "halting/packing_cuda.cu",
        "if (on) going[r++] = static_cast<int16_t>(first + e);\n  }\n  __syncthreads();",
        "if (on) going[r++] = static_cast<int16_t>(first + e);\n  }",
        ("packing_cuda",),
        (HALTING, "-k", "the_plan_is"),
        "down",
    ),
    Mutation(
        "packing: a rejected row counts as one that goes on",
        "halting/packing_cuda.cu",
        "flags.v[w] >> 1 | flags.v[w] >> 2)",
        "flags.v[w] >> 1)",
        ("packing_cuda",),
        (HALTING, "-k", "the_plan_is"),
    ),
    Mutation(
        "packing: an own row counts as one before it",
        "halting/packing_cuda.cu",
        "if (i < begin) before += n;",
        "if (i <= begin) before += n;",
        ("packing_cuda",),
        (HALTING, "-k", "the_plan_is"),
    ),
    # --- the steps of a descent
    Mutation(
        "descent step: the first element is not tested",
        "descent/descent_cuda.cu",
        "for (int64_t k = lane; k < n; k += G) finite &= is_finite(point[k]);",
        "for (int64_t k = lane + 1; k < n; k += G) finite &= is_finite(point[k]);",
        ("descent_cuda",),
        ("tests/nn/test_energy_descent.py", "-k", "does_not_see_it"),
    ),
    Mutation(
        "descent update: the tail",
        "descent/descent_cuda.cu",
        "for (int64_t k = Group<G>::lane(); k < n; k += G)\n    propose",
        "for (int64_t k = Group<G>::lane(); k + 1 < n; k += G)\n    propose",
        ("descent_cuda",),
        (DESCENT, "-k", "every_size and float32"),
    ),
    Mutation(
        "noise: the last block of four",
        "descent/descent_cuda.cu",
        "const int64_t blocks = (a.elements + 3) / 4;\n  const int64_t at",
        "const int64_t blocks = (a.elements + 2) / 4;\n  const int64_t at",
        ("descent_cuda",),
        (DESCENT, "-k", "noise_by_hand or standard_normal"),
    ),
    # --- whole descents
    Mutation(
        "whole descent: the barrier after the first rows were taken",
        "descent/tile.cuh",
        "fill(a, slot, next); });\n    __syncthreads();",
        "fill(a, slot, next); });",
        ("mlp_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and mlp"),
    ),
    Mutation(
        "whole descent: the barrier after the rows have advanced",
        "descent/tile.cuh",
        "if (!advance(a, slot)) fill(a, slot, next);\n      });\n      __syncthreads();",
        "if (!advance(a, slot)) fill(a, slot, next);\n      });",
        ("quadratic_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and quadratic"),
    ),
    Mutation(
        "whole descent backward: the barrier before the waiting rows are dealt out",
        "descent/tile.cuh",
        "const unsigned empty = full() & ~held;\n        __syncthreads();",
        "const unsigned empty = full() & ~held;",
        ("quadratic_energy_cuda",),
        (WHOLE, "-k", "gradient_modes and quadratic or neighbours"),
    ),
    Mutation(
        "whole descent backward: a slot takes the next one's row",
        "descent/tile.cuh",
        "__popc(empty & ((1u << slot) - 1))",
        "__popc(empty & ((2u << slot) - 1))",
        ("quadratic_energy_cuda",),
        (WHOLE, "-k", "gradient_modes and quadratic and plain"),
    ),
    Mutation(
        "whole descent backward: the block's sums are not zero at first",
        "descent/tile.cuh",
        "block.own[i] = C(0);",
        "static_cast<void>(i);",
        ("hopfield_energy_cuda",),
        (WHOLE, "-k", "gradient_modes and hopfield and plain"),
    ),
    Mutation(
        "whole descent backward: the sums of the last block",
        "common/tile_launch.cuh",
        "for (int64_t block = 0; block < blocks; ++block) sum += from[block * size];",
        "for (int64_t block = 0; block + 1 < blocks; ++block) sum += from[block * size];",
        ("hopfield_energy_cuda",),
        (WHOLE, "-k", "gradient_modes and hopfield and plain"),
    ),
    Mutation(
        "noise of a whole descent: the last block of four",
        "descent/tile.cuh",
        "Warp::each((dim + 3) / 4, [&](int block) {",
        "Warp::each((dim + 2) / 4, [&](int block) {",
        ("mlp_energy_cuda",),
        (WHOLE, "-k", "matches_the_reference_in_double and noise and mlp"),
    ),
    Mutation(
        "tile: what the lanes write, one lane may not see",
        "common/tiles.cuh",
        "for (int i = lane(); i < n; i += kWarp) f(i);\n    __syncwarp();",
        "for (int i = lane(); i < n; i += kWarp) f(i);",
        ("mlp_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and mlp or matches_the_reference_in_double and mlp and noise"),
        "down",
    ),
    Mutation(
        "product: the last term",
        "common/tiles.cuh",
        "for (; k < matrix.inner(); ++k) {",
        "for (; k + 1 < matrix.inner(); ++k) {",
        ("quadratic_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and quadratic"),
    ),
    Mutation(
        "outer product: the rows of the last slot",
        "common/tiles.cuh",
        "slot < slots.count; ++slot) {\n        if (!slots.holds(slot)) continue;\n        const auto left",
        "slot + 1 < slots.count; ++slot) {\n"
        "        if (!slots.holds(slot)) continue;\n        const auto left",
        ("hopfield_energy_cuda",),
        (WHOLE, "-k", "no_slot_of_a_tile_is_empty and hopfield"),
    ),
    # --- the energies
    Mutation(
        "quadratic: the barrier between gradient and energy",
        "quadratic_energy/quadratic_energy_cuda.cu",
        "linear(slots, slot)[j]; });\n    __syncthreads();",
        "linear(slots, slot)[j]; });",
        ("quadratic_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and quadratic"),
    ),
    Mutation(
        "quadratic: the energy counts the linear term once too little",
        "quadratic_energy/quadratic_energy_cuda.cu",
        "Warp::dot(at, b, dim_)",
        "Warp::dot(at, b, dim_ - 1)",
        ("quadratic_energy_cuda",),
        (WHOLE, "-k", "matches_the_reference_in_double and quadratic"),
    ),
    Mutation(
        "hopfield: the barrier between scores and softmax",
        "hopfield_energy/hopfield_energy_cuda.cu",
        "scores(slots, y, p_);\n    __syncthreads();",
        "scores(slots, y, p_);",
        ("hopfield_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and hopfield"),
    ),
    Mutation(
        "hopfield backward: the last pattern",
        "hopfield_energy/hopfield_energy_cuda.cu",
        "Warp::dot(p, t, n_)",
        "Warp::dot(p, t, n_ - 1)",
        ("hopfield_energy_cuda",),
        (WHOLE, "-k", "gradient_modes and hopfield and plain"),
    ),
    Mutation(
        "mlp: the barrier between the first layer and its activation",
        "mlp_energy/mlp_energy_cuda.cu",
        "into_first(slots, y, first_.all(kA));\n      __syncthreads();\n      last_layer",
        "into_first(slots, y, first_.all(kA));\n      last_layer",
        ("mlp_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and mlp"),
    ),
    Mutation(
        "mlp: the last hidden unit",
        "mlp_energy/mlp_energy_cuda.cu",
        "last_layer(slots, first_, n1_, y, e);",
        "last_layer(slots, first_, n1_ - 1, y, e);",
        ("mlp_energy_cuda",),
        (WHOLE, "-k", "sizes_and_one_step and mlp"),
    ),
    Mutation(
        "mlp backward: the context's gradient is not zero at first",
        "mlp_energy/mlp_energy_cuda.cu",
        "Warp::zero(static_cast<C*>(grad_.context) + row * n1_, n1_);",
        "static_cast<void>(row);",
        ("mlp_energy_cuda",),
        (WHOLE, "-k", "no_slot_of_a_tile_is_empty and mlp"),
    ),
)


def apply(mutation: Mutation, folder: Path) -> Path:
    """Write the mutated copy, which replaces the file of csrc, to a folder, and return it."""
    text = (ROOT / "csrc" / mutation.file).read_text()
    if (times := text.count(mutation.before)) != 1:
        raise ValueError(
            f"{mutation.name}: expected the text once in {mutation.file}, found it {times} times"
        )
    copy = folder / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text(text.replace(mutation.before, mutation.after))
    return folder


def outcome(tests: tuple[str, ...], order: str, module: Path) -> tuple[bool, str]:
    """Return whether all tests passed, and their last line of output."""
    command = pytest_command(["-q", "-x", "--tb=line", "--full", *tests])
    try:
        done = subprocess.run(
            command,
            env=environment(module, {"order": order}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {SECONDS} s"
    last = (done.stdout.strip() or done.stderr.strip() or str(done.returncode)).splitlines()[-1]
    if done.returncode not in (0, 1) and done.returncode >= 0:
        raise RuntimeError(f"{' '.join(command)} did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0, last


def caught(mutation: Mutation) -> tuple[bool, str]:
    """Return whether the tests catch a mutation, and their last line of output."""
    with tempfile.TemporaryDirectory() as folder:
        module = Build(overlay=apply(mutation, Path(folder)), changed=mutation.objects).module()
        passed, last = outcome(mutation.tests, mutation.order, module)
    return not passed, last


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if all(word in m.name for word in words)]
    healthy, seen = Build().module(), set()
    escaped = 0
    for mutation in chosen:
        if (mutation.tests, mutation.order) not in seen:
            passed, last = outcome(mutation.tests, mutation.order, healthy)
            if not passed:
                print(f"{mutation.name}: {' '.join(mutation.tests)} fail without the fault, too: {last}")
                return 2
            seen.add((mutation.tests, mutation.order))
        noticed, last = caught(mutation)
        escaped += not noticed
        print(f"{'caught ' if noticed else 'ESCAPED'}  {mutation.name}  ({last})", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} caught")
    return min(escaped, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
