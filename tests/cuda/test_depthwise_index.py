# SPDX-License-Identifier: BSD-3-Clause
"""The index arithmetic of the CUDA depthwise kernels, looped over for whole images of awkward sizes."""

from __future__ import annotations

import ctypes
import itertools
import random
import subprocess
from pathlib import Path

import depthwise_kernels as kernels
import pytest
from cases import SEED

pytestmark = pytest.mark.skipif(bool(kernels.unavailable()), reason=kernels.unavailable())

SAME, DOWN, UP = range(3)
SIZES = [(1, 1), (7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224), (33, 31), (1, 1000), (500, 3),
         (13, 129), (65, 257)]  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    library = tmp_path_factory.mktemp("index") / "index.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{kernels.SOURCES}"]
    source = Path(__file__).with_name("depthwise_index.cpp")
    subprocess.run([kernels.COMPILER, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.index_check.restype = ctypes.c_char_p
    loaded.index_wrong_divisions.restype = ctypes.c_int64
    loaded.index_parts_are_even.argtypes = [ctypes.c_int64, ctypes.c_int]
    return loaded


def problem(mode, kernel, channels, size, padding, vector):
    """Numbers of index_check for an input of this size; the output of UP is that input."""
    step = 1 if mode == SAME else 2
    out = [(length + 2 * pad - kernel) // step + 1 for length, pad in zip(size, padding, strict=True)]
    if min(out) < 1:
        return None
    output, input = (size, out) if mode == UP else (out, size)
    return mode, kernel, channels, *output, *input, *padding, vector


def check(index, numbers, type_, last, beside=0):
    wrong = index.index_check((ctypes.c_int * 10)(*numbers), type_, int(last), beside)
    assert wrong is None, (wrong.decode(), numbers, type_, last)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", (SAME, DOWN, UP))
def test_usual_layers(index, mode, size):
    for kernel, last, type_, beside in itertools.product((3, 5, 7), (True, False), (0, 1), (0, 1)):
        numbers = problem(mode, kernel, 40, size, (kernel // 2,) * 2, 8 >> (1 - type_))
        if numbers and not (beside and mode == UP):
            check(index, numbers, type_, last, beside)


def test_random_geometry(index):
    generator = random.Random(SEED)
    for _ in range(400):
        kernel, type_ = generator.choice((3, 5, 7)), generator.randrange(2)
        size = generator.choice(((40, 40), (8, 150), (150, 8), (3, 3)))
        size = tuple(generator.randint(1, length) for length in size)
        padding = generator.randrange(kernel + 3), generator.randrange(kernel + 3)
        mode = generator.randrange(3)
        if mode == SAME and generator.random() < 0.3:  # a gradient's padding may be negative
            padding = tuple(kernel - 1 - pad for pad in padding)
        vector = generator.choice((1, 2, 4) if type_ == 0 else (1, 2, 4, 8))
        numbers = problem(mode, kernel, generator.randint(1, 100), size, padding, vector)
        if numbers:
            check(index, numbers, type_, generator.random() < 0.5)


def test_division(index):
    generator = random.Random(SEED)
    divisors = [*range(1, 300), 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]
    divisors += [generator.randrange(1, 2**31) for _ in range(100)]
    for divisor in divisors:
        assert index.index_wrong_divisions(divisor, 1000) == 0, divisor


def test_shares(index):
    for count, parts in itertools.product((1, 2, 7, 256, 2**40 + 3), (1, 2, 3, 7, 64)):
        if parts <= count:
            assert index.index_parts_are_even(count, parts)
