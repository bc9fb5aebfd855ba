"""Faults that the emulator notices: barriers that not all threads reach, and uninitialised memory."""

from __future__ import annotations

import ctypes
import math

import pytest

THREADS = 256
ORDERS = {"up": 0, "down": 1, "together": 2, "random": 3}


@pytest.fixture(scope="session")
def check(emulated_module):
    """Return check(name, blocks, order), which returns the error and the threads' output."""
    function = ctypes.CDLL(str(emulated_module)).emulator_check
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_float)]

    def run(name: str, blocks: int = 1, order: str = "up") -> tuple[str, list[float]]:
        out = (ctypes.c_float * (blocks * THREADS))()
        return function(name.encode(), blocks, ORDERS[order], out).decode(), list(out)

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel_gives_the_same_in_every_order(check, order):
    wrong, out = check("exchange", 20, order)
    assert not wrong
    assert out == [(t + 32) % THREADS for t in range(THREADS)] * 20


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["exchange without a barrier", "exchange in a warp"])
def test_without_a_barrier_threads_read_what_nobody_has_written(check, name, order):
    wrong, out = check(name, 1, order)
    assert not wrong and any(math.isnan(x) for x in out)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["reads static", "reads dynamic"])
def test_every_block_finds_its_shared_memory_poisoned(check, name, order):
    wrong, out = check(name, 3, order)
    assert not wrong and all(math.isnan(x) for x in out)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("leaves early", ["__syncthreads (", "emulator_check.cu:", "thread 77 has left the kernel"]),
        ("half a mask", ["__shfl_sync (", "with a mask that is not full"]),
        ("different calls", ["arrives at __syncthreads (", "where others wait at __syncthreads ("]),
        ("different operations", ["__all_sync (", "__ballot_sync (", "where others wait at"]),
        ("warp and block", ["__syncthreads (", "__syncwarp (", "for ever"]),
        ("writes past the end", ["block 0 has written past the end of its dynamic shared memory"]),
    ],
)
def test_what_a_kernel_must_not_do_is_named(check, name, says, order):
    wrong, _ = check(name, 1, order)
    assert wrong.startswith(f"adaptcomp_ext: {name} failed on the CUDA device: ")
    for words in says:
        assert words in wrong
