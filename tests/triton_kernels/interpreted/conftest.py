# SPDX-License-Identifier: BSD-3-Clause
"""For all interpreted tests: bfloat16 as the hardware computes it, and the ops on the Triton kernels."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

# About 3 ms each: what keeps the interpreted tests short enough for every run.
MOST_PROGRAMS = 300
OPS = ("pointwise", "pointwise_pooled", "pointwise_backward", "apply", "apply_backward", "latent_moments")


@pytest.fixture(scope="session", autouse=True)
def right_bfloat16():
    import bfloat16

    with bfloat16.right_bfloat16():
        yield


@pytest.fixture(autouse=True)
def no_multiprocessors(monkeypatch):
    """The CPU has none to keep busy, and few large tiles are interpreted faster than many small ones."""
    from dcd_kernels.backends.triton import tuning

    monkeypatch.setattr(tuning, "MULTIPROCESSORS", 0)


@pytest.fixture(scope="session")
def triton_on_cpu():
    """CPU tensors go to the Triton kernels: autograd, checks and callers are those of every backend."""
    from dcd_kernels.backends.triton import entry

    library = torch.library.Library("dcd_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name in OPS:
            library.impl(name, getattr(entry, name), "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture
def launches(triton_on_cpu, request):
    """(kernel, programs) of every launch; the test must make some, and few enough programs."""
    from patching import replaced

    from dcd_kernels.backends.triton import launch

    original = launch.launch
    made: list[tuple[str, int]] = []

    def counting(kernel, grid, *args, **kwargs):
        made.append((kernel.fn.__name__, math.prod(grid)))
        original(kernel, grid, *args, **kwargs)

    with replaced(original, counting):
        yield made
    assert made, "nothing ran on Triton"
    largest = max(programs for _, programs in made)
    assert largest <= MOST_PROGRAMS, f"{largest} programs in one launch: a smaller case proves the same"
