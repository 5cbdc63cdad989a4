# SPDX-License-Identifier: BSD-3-Clause
"""What all tests share: poisoned outputs, the seed of the session, the backends that are there."""

from __future__ import annotations

import cases
import pytest
import torch

import dcd_kernels as dcd
from dcd_kernels import extension


def pytest_report_header() -> list[str]:
    kernels = "compiled kernels loaded" if extension.LOADED else f"NO compiled kernels: {extension.REASON}"
    return [f"dcd_kernels: {kernels}; DCD_KERNELS_TEST_SEED={cases.SEED}"]


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is NaN: whatever a kernel forgets to write is seen.

    Torch fills uninitialised memory (with NaN, the largest value for integers) only while deterministic
    algorithms are asked for, which these tests may as well be; the compiled operators have their own switch.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if extension.LOADED:
        torch.ops.dcd_kernels._poison(True)
    yield
    if extension.LOADED:
        torch.ops.dcd_kernels._poison(False)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """torch.compile from nothing: the parametrised tests share their code, and recompilations are limited."""
    torch._dynamo.reset()


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """A test under each backend of this machine, chosen by name: one that cannot run a call raises."""
    if request.param == "cpu" and not extension.LOADED:
        pytest.skip(extension.REASON)
    with dcd.use_backend(request.param):
        yield request.param
