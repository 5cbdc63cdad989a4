# SPDX-License-Identifier: BSD-3-Clause
"""The bodies of pool.cu and branch.cu, compiled for the CPU and called on NumPy arrays."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2}
GATES = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4, "se": 5}
LAMS = {None: 0, "hardsigmoid2": 1, "sigmoid2": 2, "hardsigmoid": 3, "sigmoid": 4}
# streaming multiprocessors, shared memory of a block, clusters
H200 = (132, 227 * 1024, 1)
A100 = (108, 163 * 1024, 0)


def available() -> str:
    """Why they cannot be compiled here; empty where they can."""
    if COMPILER is None:
        return "no C++ compiler"
    return "" if (SOURCES / "cuda").is_dir() else "not a checkout: csrc/cuda is not there"


def build(folder: Path) -> ctypes.CDLL:
    library = folder / "branch_host.so"
    source = Path(__file__).with_name("branch_host.cpp")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    host = ctypes.CDLL(str(library))
    for name in ("host_pool", "host_quadrants", "host_branch"):
        getattr(host, name).restype = ctypes.c_char_p
    host.host_pool_tiles.restype = ctypes.c_int64
    host.host_pool_tiles.argtypes = [ctypes.c_int64]
    host.host_quadrant_tiles.restype = ctypes.c_int64
    host.host_quadrant_tiles.argtypes = [ctypes.c_int64, ctypes.c_int64]
    host.host_to_float.restype = ctypes.c_float
    host.host_to_float.argtypes = [ctypes.c_int, ctypes.c_uint32]
    return host


def encode(values: np.ndarray, element: str) -> np.ndarray:
    """The bits of float32 values in another type; bfloat16 cut off, for it is the values that matter here."""
    if element == "bfloat16":
        return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(element)


def decode(bits: np.ndarray, element: str) -> np.ndarray:
    """The exact values, in float64."""
    if element == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def pointer(array: np.ndarray | None, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data + offset)


def integers(*values: int):
    return (ctypes.c_int64 * len(values))(*map(int, values))


def check(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(message.decode())


class Guarded:
    """An output of NaN with numbers around it that nobody may touch."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.size = int(np.prod(shape))
        self.memory = np.full(self.size + 32, 777.0, np.float32)
        self.memory[16 : 16 + self.size] = np.nan

    @property
    def pointer(self) -> ctypes.c_void_p:
        return pointer(self.memory, 64)

    def value(self) -> np.ndarray:
        assert (self.memory[:16] == 777).all() and (self.memory[16 + self.size :] == 777).all()
        return self.memory[16 : 16 + self.size].reshape(self.shape)


@dataclass
class Image:
    """(N, C, P) somewhere in an allocation, with strides in elements."""

    allocation: np.ndarray  # of bytes
    offset: int
    strides: tuple[int, int, int]
    shape: tuple[int, int, int]
    element: str

    def array(self) -> np.ndarray:
        kind = np.uint16 if self.element == "bfloat16" else np.dtype(self.element)
        size = np.dtype(kind).itemsize
        flat = self.allocation[self.offset :]
        flat = flat[: flat.size // size * size].view(kind)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * size for s in self.strides])


def image(rng, element: str, shape, layout: str, shift: int = 0, spare: int = 0) -> Image:
    """Random, `shift` elements behind a multiple of 64 bytes, cut out of one with `spare` more channels."""
    n, c, p = shape
    size = 4 if element == "float32" else 2
    wide = c + spare
    strides = {"planes": (wide * p, p, 1), "pixels": (wide * p, 1, wide)}[layout]
    raw = np.zeros((n * wide * p + shift) * size + 128, np.uint8)
    offset = (-raw.ctypes.data) % 64 + shift * size
    made = Image(raw, offset, strides, shape, element)
    made.array()[...] = encode(rng.standard_normal(shape).astype(np.float32) + 0.5, element)
    return made


def pool(host, x: Image):
    """Channel sums (N, T, C), how often each element was read, and the plan."""
    n, c, p = x.shape
    sums = Guarded(n, host.host_pool_tiles(p), c)
    counts = np.zeros(x.allocation.size, np.uint8)
    plan = integers(*[0] * 5)
    begin = pointer(x.allocation, x.offset)
    check(
        host.host_pool(
            ELEMENTS[x.element],
            begin,
            integers(*x.strides),
            *map(ctypes.c_int64, x.shape),
            sums.pointer,
            pointer(x.allocation),
            ctypes.c_int64(x.allocation.size),
            pointer(counts),
            plan,
        )
    )
    return sums.value(), counts, dict(zip(("planes", "wide", "lanes", "blocks", "rows"), plan, strict=True))


def quadrants(host, x: Image, height: int, width: int):
    """Sums of the four bins (N, T, C, 2, 2) of an image of height·width pixels, and as for `pool`."""
    n, c, _ = x.shape
    sums = Guarded(n, host.host_quadrant_tiles(height, width), c, 2, 2)
    counts = np.zeros(x.allocation.size, np.uint8)
    plan = integers(*[0] * 5)
    check(
        host.host_quadrants(
            ELEMENTS[x.element],
            pointer(x.allocation, x.offset),
            integers(*x.strides),
            integers(n, c, height, width),
            sums.pointer,
            pointer(x.allocation),
            ctypes.c_int64(x.allocation.size),
            pointer(counts),
            plan,
        )
    )
    return sums.value(), counts, dict(zip(("planes", "wide", "lanes", "blocks", "rows"), plan, strict=True))


def branch(host, sums, scale, matrices, biases, lam_channels, gate, lam_activation, element, device=H200):
    """lam, phi and the plan; matrices and biases in the order squeeze, gate, expand, phi, or None."""
    assert sums.dtype == np.float32
    n, tiles, inputs = sums.shape
    hidden, outputs = matrices[0].shape[0], sum(m.shape[0] for m in matrices[2:] if m is not None)
    lam, phi = Guarded(n, lam_channels), Guarded(n, outputs - lam_channels)
    plan = integers(*[0] * 5)
    pointers = ctypes.c_void_p * 4
    check(
        host.host_branch(
            ELEMENTS[element],
            pointer(sums),
            ctypes.c_float(scale),
            pointers(*map(pointer, matrices)),
            pointers(*map(pointer, biases)),
            integers(n, tiles, inputs, hidden, outputs, lam_channels),
            (ctypes.c_int * 2)(GATES[gate], LAMS[lam_activation]),
            integers(*device),
            lam.pointer,
            phi.pointer,
            plan,
        )
    )
    names = ("samples", "ranks", "wide_squeeze", "wide_gate", "wide_expand")
    return lam.value(), phi.value(), dict(zip(names, plan, strict=True))
