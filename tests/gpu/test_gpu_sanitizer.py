# SPDX-License-Identifier: BSD-3-Clause
"""compute-sanitizer over a few calls of every kernel: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from on_device import DEVICE

SCRIPT = pathlib.Path(__file__).with_name("sanitized.py")
FOUND = 86  # exit status of the tool when it has found something; Python has no such status
SECONDS = 300
REFUSALS = ("Device not supported", "not supported on this device", "LibraryNotLoaded", "Unable to")


def tool() -> str | None:
    """compute-sanitizer, also where a CUDA toolkit is installed but not on the path."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    extra = os.pathsep.join(str(pathlib.Path(home, "bin")) for home in homes if home)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=extra)


def environment() -> dict[str, str]:
    # every allocation its own, so that the tool knows where each tensor ends
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DCD_KERNELS_TUNE": "0"}
    paths = [str(pathlib.Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}


def run(command: list[str], seconds: float) -> tuple[int, str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain_run():
    """Without the tool the calls run; Triton's kernels are compiled and on disk after it."""
    status, text = run([sys.executable, str(SCRIPT), DEVICE.type], 200)
    assert status == 0 and "finished" in text, text[-3000:]


def test_the_calls_run(plain_run):
    pass


@pytest.mark.parametrize("check", ("memcheck", "racecheck"))
def test_sanitizer_finds_nothing(check, plain_run, cuda):
    program = tool()
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", check, "--error-exitcode", str(FOUND), sys.executable, str(SCRIPT)]
    try:
        status, text = run(command, SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{check} did not end within {SECONDS} seconds")
    if status and "finished" not in text and any(refusal in text for refusal in REFUSALS):
        line = next(line for line in text.splitlines() if any(refusal in line for refusal in REFUSALS))
        pytest.skip(f"compute-sanitizer refuses this device: {line.strip('= ')}")
    assert status == 0 and "finished" in text, text[-3000:]
