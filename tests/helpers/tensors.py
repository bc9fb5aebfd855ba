"""Cases and comparisons that the tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext.ops import _backend

ROWS = (0, 1, 2, 31, 32, 33, 255, 256, 257, 1000)
FEW_ROWS = (0, 1, 33, 257)
WIDTHS = (1, 3, 7, 8, 15, 16, 17, 64, 257)
PATTERNS = ("all", "none", "alternating", "random")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.bool, torch.uint8, torch.complex64)
LAYOUTS = ("transposed", "strided", "misaligned", "expanded", "reversed")

SYNCHRONISED = "called a synchronizing CUDA operation"
"""What torch warns of at each wait. Switching these warnings on gives another, once in a process, in similar
words."""


def on_cuda(device: str | torch.device) -> bool:
    """Whether tensors on `device` take CUDA's code paths, as CPU tensors do under the emulator."""
    return _backend.on_cuda(torch.device(device))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask(pattern: str, rows: int, device: str = "cpu", seed: int = 0) -> Tensor:
    if pattern == "random":
        chosen = torch.rand(rows, generator=generator(seed)) < 0.4
    elif pattern == "alternating":
        chosen = torch.arange(rows) % 2 == 1
    else:
        chosen = torch.full((rows,), pattern == "all")
    return chosen.to(device)


def values(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Return random values; no row is all zero."""
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(*shape, dtype=wide, generator=generator(seed)).to(dtype).to(device)
    return (
        torch.randint(0, 2 if dtype == torch.bool else 200, tuple(shape), generator=generator(seed))
        .to(dtype)
        .to(device)
    )


def laid_out(
    layout: str, rows: int, width: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Return a tensor [rows, width] that is not contiguous or not aligned."""
    if layout == "transposed":
        return values((width, rows), dtype, device, seed).t()
    if layout == "strided":
        return values((2 * rows, 3 * width), dtype, device, seed)[::2, 1::3]
    if layout == "misaligned":  # contiguous, but one element off every vector boundary
        return values((rows * width + 1,), dtype, device, seed)[1:].view(rows, width)
    if layout == "expanded":
        return values((rows, 1), dtype, device, seed).expand(rows, width)
    assert layout == "reversed"  # a slice from the middle of a larger batch, columns in the middle too
    return values((rows + 3, width + 2), dtype, device, seed)[2 : rows + 2, 1 : width + 1]


def bits(t: Tensor) -> Tensor:
    flat = t.detach().resolve_conj().reshape(-1).contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # one element may have any stride


def assert_bitwise(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert torch.equal(bits(got), bits(expected))


def assert_as_good_as_torch(
    got: Tensor,
    torch_same_dtype: Tensor,
    exact: Tensor,
    rounding: float = 2.0,
    scale: float = 0.0,
    computed_in: torch.dtype = torch.float64,
) -> None:
    """Require |got − exact| <= 2·max|torch in the same dtype − exact| + rounding, `exact` being float64.

    The rounding is `rounding` units (of `got`'s dtype, or of the coarser one it was `computed_in`) of the
    result, or of `scale`, the size of the terms it is the difference of."""
    assert got.shape == exact.shape
    assert got.dtype == torch_same_dtype.dtype
    if got.numel() == 0:
        return
    got, torch_same_dtype, exact = got.detach(), torch_same_dtype.detach().double(), exact.detach().double()
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(computed_in).eps)
    allowed = 2 * (torch_same_dtype - exact).abs().max() + rounding * eps * exact.abs().clamp(min=scale)
    allowed = allowed + torch.finfo(got.dtype).tiny
    error = (got.double() - exact).abs()
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"element {worst}: got {got.reshape(-1)[worst].item()}, exact {exact.reshape(-1)[worst].item()}, "
        f"torch {torch_same_dtype.reshape(-1)[worst].item()}"
    )


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Call ``torch.autograd.grad``, with zeros for inputs that the outputs do not depend on."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


class Unchanged:
    """Assert at the end of the block that the tensors have not changed."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors

    def __enter__(self) -> None:
        self._before = [t.detach().clone() for t in self._tensors]

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            for t, before in zip(self._tensors, self._before, strict=True):
                assert_bitwise(t, before)
