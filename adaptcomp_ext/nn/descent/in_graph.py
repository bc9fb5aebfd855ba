"""`EnergyDescent` in a graph of torch.compile: what the compiler needs to know of its result beforehand."""

from __future__ import annotations

from typing import Any

from adaptcomp_ext.nn._in_graph import Known, constant, uses_foreign_tensors
from adaptcomp_ext.ops.opaque import Field, enrolled


@constant
def known_of(
    number: int, call: str, forms: tuple[tuple[Any, ...], ...], settings: tuple[Any, ...]
) -> Known | None:
    """Return what is known of a descent's result before it runs; None if that is not enough for a graph."""
    try:
        descend = enrolled(number)
    except RuntimeError:
        return None
    held = {id(p) for p in descend.parameters()}
    if uses_foreign_tensors(descend, [("energy", descend.energy)]) or any(
        getattr(value, "requires_grad", False) and id(value) not in held
        for value in (descend.step_size, descend.noise)
    ):
        return None
    shape, dtype, _ = forms[0]
    number_dtype = "float64" if dtype == "float64" else "float32"
    fields = [Field(shape, dtype), Field((), number_dtype), Field((), "int64"), Field((), "int8")]
    trace = []
    if descend.keep_trace:
        trace = [Field(shape, dtype, False), Field((), "float32", False), *[Field((), "int64", False)] * 2]
    unused = ("step_size", "noise") if descend.gradient in ("implicit", "detached") else ()
    return Known(repr([tuple(field) for field in [*fields, *trace]]), False, len(trace), unused)
