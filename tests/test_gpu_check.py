# SPDX-License-Identifier: BSD-3-Clause
"""`make gpu-check` without a GPU: it says so, and rehearsals on the CPU keep the GPU tests alive."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from dcd_kernels import extension

PROGRAM = pathlib.Path(__file__).resolve().parent / "gpu" / "run.py"
needs_kernels = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)


def check(*options: str) -> tuple[int, str]:
    plain = {name: value for name, value in os.environ.items() if name != "DCD_KERNELS_TEST_DEVICE"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options], capture_output=True, text=True, env=plain, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run():
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check_run", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    status, said = check()
    assert status == 2
    assert "not yet run on hardware" in said and "make gpu-check PYTHON=" in said


@needs_kernels
def test_a_rehearsal_of_a_few():
    """One file in one process; its skips say what a CPU cannot show."""
    file = PROGRAM.with_name("test_gpu_execution.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs", str(file)],
        cwd=PROGRAM.parent.parent.parent,
        env={**os.environ, "DCD_KERNELS_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "16 passed" in done.stdout and "needs a CUDA device" in done.stdout


@pytest.mark.full
@needs_kernels
def test_a_rehearsal_of_all(tmp_path):
    status, said = check("--device", "cpu", "--minutes", "30", "--logs", str(tmp_path))
    assert status == 0, said
    assert "gpu-check passed" in said and " 0 failed" in said


@pytest.mark.full
@needs_kernels
def test_what_was_not_run_is_not_passed(tmp_path):
    options = ("--device", "cpu", "--minutes", "0", "--jobs", "1", "--logs", str(tmp_path))
    status, said = check(*options, "-k", "test_empty")
    assert status == 1, said
    assert "gpu-check incomplete: 0 passed" in said and "skipped 5: not run" in said


def test_outcomes_are_read(run, tmp_path):
    (tmp_path / "part.xml").write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.gpu.test_a" name="one"/>'
        '<testcase classname="tests.gpu.test_a" name="two"><failure message="1 != 2&#10;more"/></testcase>'
        '<testcase classname="tests.gpu.test_a" name="three"><skipped message="no tool"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = run.read(tmp_path / "part.xml", "part", tmp_path)
    assert (found.passed, found.failures, dict(found.skips)) == (
        1,
        [("test_a::two", "1 != 2")],
        {"no tool": 1},
    )
    assert run.report_total(found, 1.0) == 1


def test_a_process_that_died_is_a_failure(run, tmp_path):
    (tmp_path / "part.log").write_text("CUDA error: an illegal memory access was encountered\n")
    found = run.read(tmp_path / "part.xml", "part", tmp_path)
    assert found.passed == 0 and "illegal memory access" in found.failures[0][1]
