# SPDX-License-Identifier: BSD-3-Clause
"""Tests that need a GPU: `make gpu-check`, or `python -m pytest tests/gpu -q -m gpu`.

DCD_KERNELS_TEST_DEVICE names the device, by default 'cuda'. 'cpu' is a rehearsal: the same tests on the CPU
kernels, without those that mean nothing there. Nothing here imports dcd_kernels._core, so that a source tree
with only the op libraries beside it can be tested under another Python.
"""

from __future__ import annotations

import os
import pathlib
import random
import time

import cases
import pytest
import torch
from on_device import DEVICE, IEEE, LEAST_CAPABILITY, unusable

HERE = pathlib.Path(__file__).resolve().parent
# run.py sets these: after so many seconds nothing more is started; which part of the tests, 'index/count'
BUDGET = float(os.environ.get("DCD_KERNELS_TEST_SECONDS", "inf"))
PART = os.environ.get("DCD_KERNELS_TEST_PART", "")
if DEVICE.type == "cuda":
    # cuBLAS reads it once; without it a deterministic matrix product raises
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_began = time.monotonic()
_left_out: list[str] = []


def pytest_report_header() -> list[str]:
    if DEVICE.type != "cuda" or unusable():
        return [f"gpu tests on {DEVICE}: {unusable() or 'a rehearsal, without a GPU'}"]
    found = torch.cuda.get_device_properties(DEVICE)
    return [f"gpu tests on {found.name} ({found.major}.{found.minor}), torch {torch.__version__}"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = unusable()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    if PART:
        # shuffled, so that a run that is cut short has seen something of everything
        random.Random(cases.SEED).shuffle(items)
        index, count = map(int, PART.split("/"))
        items[:] = items[index::count]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and time.monotonic() - _began > BUDGET:
        _left_out.append(item.nodeid)
        pytest.skip("not run: the time of this run is spent")


def pytest_terminal_summary(terminalreporter) -> None:
    if _left_out:
        terminalreporter.write_line(f"{len(_left_out)} tests not run: the time was spent", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that was cut short has not shown what it was asked for."""
    if _left_out and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def untuned(monkeypatch) -> None:
    """Hundreds of shapes: measuring tiles for each of them would take most of the time. See `tuned`."""
    monkeypatch.setenv("DCD_KERNELS_TUNE", "0")


@pytest.fixture
def tuned(untuned, monkeypatch, tmp_path) -> None:
    """Tiles are measured, from nothing, and remembered in a folder of the test's own."""
    monkeypatch.setenv("DCD_KERNELS_TUNE", "1")
    monkeypatch.setenv("DCD_KERNELS_CACHE", str(tmp_path))


@pytest.fixture(autouse=True)
def ieee():
    """float32 products are float32, unless a test asks for tf32."""
    with IEEE():
        yield


@pytest.fixture
def cuda() -> torch.device:
    """For what means nothing on the CPU."""
    if DEVICE.type != "cuda":
        pytest.skip(f"needs a CUDA device of capability {LEAST_CAPABILITY} or later, this run is on {DEVICE}")
    return DEVICE


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is NaN, as in the other tests; torch's own peers may still choose their algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.ops.dcd_kernels._poison(True)
    yield
    torch.ops.dcd_kernels._poison(False)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def errors_show_up_here(request):
    """A kernel's error is found at the next synchronisation: that shall be in the test it belongs to."""
    yield
    if DEVICE.type == "cuda" and not unusable():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            request.session.shouldfail = "the CUDA context is lost: no further test of this process can pass"
            raise
