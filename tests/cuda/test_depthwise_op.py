# SPDX-License-Identifier: BSD-3-Clause
"""ops_cuda_depthwise.cpp without a GPU: compiled with launches that run the kernels' bodies on the CPU.

What is registered for CUDA tensors is registered for the CPU's there, in a process of its own, and passes the
tests that the CPU's op passes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import depthwise_kernels as kernels
import pytest
import torch

from dcd_kernels import extension

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@pytest.mark.skipif(bool(kernels.unavailable()), reason=kernels.unavailable())
@pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)
def test_the_op_passes_the_tests_of_the_cpu(tmp_path):
    library = tmp_path / "rehearsal.so"
    flags = ["-std=c++17", "-O1", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += ["-DDCD_CUDA_LIBRARY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{kernels.SOURCES}", "-isystem", str(TORCH / "include")]
    source = str(HERE / "depthwise_rehearsal.cpp")
    linked = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([kernels.COMPILER, *flags, source, "-o", str(library), *linked], check=True)
    environment = os.environ | {
        "DCD_REHEARSAL": str(library),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(kernels.ROOT)]),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "rehearsal_depthwise.py"),
    ]
    run = subprocess.run(command, env=environment, cwd=kernels.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout
