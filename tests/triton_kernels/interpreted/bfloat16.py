# SPDX-License-Identifier: BSD-3-Clause
"""bfloat16 made right in Triton's interpreter.

The interpreter keeps bfloat16 in NumPy's uint16 and, in 3.6 and 3.9, computes on the integers: products,
sums, comparisons and reductions are silently wrong, and a cast from float32 truncates. Inside of
`right_bfloat16()` every operation on it widens to float32, computes, and rounds to nearest even once, as the
hardware does.
Operations that only move elements are left alone. What is neither (atomics, for one) raises, so that no test
can pass on garbage; padding a descriptor's loads with NaN is the one thing that is not caught.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle, _ir

ARITHMETIC = (
    *("fadd", "fmul", "fdiv", "frem", "fsub", "fneg", "precise_divf", "approx_divf", "fma", "clampf"),
    *("minimumf", "minnumf", "maximumf", "maxnumf"),
    *(f"fcmp{kind}{order}" for kind in "OU" for order in ("LT", "GT", "LE", "GE", "EQ", "NE")),
    *("exp", "exp2", "log", "log2", "cos", "sin", "erf", "sqrt", "rsqrt", "precise_sqrt", "floor", "ceil"),
)
MOVES = (
    *("load", "store", "masked_load", "masked_store", "descriptor_store", "descriptor_scatter", "print"),
    *("select", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "cat", "join", "split"),
    *("gather", "bitcast", "fabs"),
)
CASTS = ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_to_fp", "int_cast")


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of the same values."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, of two equally near ones the even; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def truncate(values: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _is_bfloat16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(value):
    return TensorHandle(widen(value.data), tl.float32) if _is_bfloat16(value) else value


def _arithmetic(original):
    def operation(self, *args, **kwargs):
        if not any(map(_is_bfloat16, args)):
            return original(self, *args, **kwargs)
        result = original(self, *map(_widened, args), **kwargs)
        if result.data.dtype != np.float32:  # a comparison's truth values
            return result
        return TensorHandle(narrow(result.data), tl.bfloat16)

    return operation


def _dot(original):
    def operation(self, a, b, d, *args, **kwargs):
        return original(self, _widened(a), _widened(b), d, *args, **kwargs)

    return operation


def _cast(original):
    def operation(self, source, target):
        source = _widened(source)
        if target.scalar != tl.bfloat16:
            return original(self, source, target)
        return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)

    return operation


def _float_to_float(original):
    def operation(self, source, target, rounding):
        if not _is_bfloat16(source) and target.scalar != tl.bfloat16:
            return original(self, source, target, rounding)
        if target.scalar == tl.bfloat16 and rounding == _ir.ROUNDING_MODE.RTZ:
            return TensorHandle(truncate(source.data.astype(np.float32)), tl.bfloat16)
        if target.scalar in (tl.bfloat16, tl.float16, tl.float32, tl.float64):
            return self.cast_impl(source, target)
        raise NotImplementedError(f"the interpreter's cast of {source.dtype} to {target} is not corrected")

    return operation


def _refused(name, original):
    def operation(self, *args, **kwargs):
        if any(map(_is_bfloat16, args)):
            raise NotImplementedError(f"the interpreter's {name} on bfloat16 is not corrected")
        return original(self, *args, **kwargs)

    return operation


def _reduction(original):
    """For ReduceOps.sum, ReduceOps.min_max, ScanOps.cumsum and ScanOps.cumprod."""

    def narrowed(result):
        if isinstance(result, (tuple, list)):
            return type(result)(map(narrowed, result))
        if result.dtype != tl.float32:  # an index
            return result
        kind = result.type.with_element_ty(tl.bfloat16) if result.type.is_block() else tl.bfloat16
        return tl.core.tensor(TensorHandle(narrow(result.handle.data), tl.bfloat16), kind)

    def operation(self, input, *args, **kwargs):
        given = input[0] if isinstance(input, tuple) else input
        if given.dtype != tl.bfloat16:
            return original(self, input, *args, **kwargs)
        kind = given.type.with_element_ty(tl.float32) if given.type.is_block() else tl.float32
        wide = tl.core.tensor(_widened(given.handle), kind)
        return narrowed(original(self, wide, *args, **kwargs))

    return operation


def _replacements() -> Iterator[tuple[type, str, object]]:
    for name, original in vars(InterpreterBuilder).items():
        operation = name.removeprefix("create_")
        if name == "cast_impl":
            yield InterpreterBuilder, name, _cast(original)
        elif operation == "dot":
            yield InterpreterBuilder, name, _dot(original)
        elif operation == "fp_to_fp":
            yield InterpreterBuilder, name, _float_to_float(original)
        elif operation in ARITHMETIC:
            yield InterpreterBuilder, name, _arithmetic(original)
        elif operation != name and operation not in MOVES and operation not in CASTS:
            yield InterpreterBuilder, name, _refused(operation, original)
    for owner, names in ((ReduceOps, ("sum", "min_max")), (ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            yield owner, name, _reduction(vars(owner)[name])


@contextmanager
def right_bfloat16() -> Iterator[None]:
    """See the module's page."""
    replacements = list(_replacements())
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replacements]
    assert interpreter.interpreter_builder.__class__ is InterpreterBuilder
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
