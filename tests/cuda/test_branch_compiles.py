# SPDX-License-Identifier: BSD-3-Clause
"""What nvcc makes of pool.cu and branch.cu: no warnings, no spills, wide loads, clusters where they exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="not a checkout: csrc/cuda is not there"),
]

TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
# the build itself compiles for both; one of them is looked at in every run of the tests
EACH_TARGET = [pytest.param("sm_80", marks=pytest.mark.full), "sm_90a"]
KERNELS = {"pool": 24, "branch": 12}  # kernels of a source, all element types together


def _run(*command) -> str:
    run = subprocess.run([NVCC, *map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(source, target): the PTX and what ptxas says of it, made once."""
    folder = tmp_path_factory.mktemp("cuda")
    known = {}

    def compile_(source: str, target: str) -> tuple[str, str]:
        if (source, target) not in known:
            ptx = folder / f"{source}-{target}.ptx"
            flags = ["-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
            _run(*flags, "-ptx", f"-arch={TARGETS[target]}", CUDA / f"{source}.cu", "-o", ptx)
            code = f"-gencode=arch={TARGETS[target]},code={target}"
            report = _run("-cubin", code, "-Xptxas", "-v", ptx, "-o", ptx.with_suffix(".cubin"))
            known[source, target] = ptx.read_text(), report
        return known[source, target]

    return compile_


def kernels(ptx: str) -> dict[str, str]:
    """PTX of each kernel by its mangled name."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("source", KERNELS)
def test_no_spills_and_registers_for_a_block(compiled, source, target):
    report = compiled(source, target)[1]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == KERNELS[source]
    assert all(found == ("0", "0", "0") for found in spills), report
    # of 65536 registers: four blocks of the kernels that wait for memory, one of the largest of the others
    assert max(registers) <= (64 if source == "pool" else 255)


@pytest.mark.parametrize("target", EACH_TARGET)
@pytest.mark.parametrize("source", KERNELS)
def test_wide_loads(compiled, source, target):
    """16 bytes at a time from global memory, but in the kernels for images that cannot be read so."""
    for name, code in kernels(compiled(source, target)[0]).items():
        narrow = "pixels_kernel" in name and "Li1E" in name
        assert bool(re.search(r"ld\.global\.nc\.v4", code)) != narrow, name


@pytest.mark.parametrize("target", EACH_TARGET)
def test_vectors_are_read_from_shared_memory_in_fours(compiled, target):
    for name, code in kernels(compiled("branch", target)[0]).items():
        assert "ld.shared.v4" in code, name


@pytest.mark.parametrize("target", EACH_TARGET)
def test_clusters_where_the_device_has_them(compiled, target):
    """Their barrier is in the code for 9.0 and in no other: branch.cu asks which one was loaded."""
    for name, code in kernels(compiled("branch", target)[0]).items():
        assert ("barrier.cluster" in code) == (target == "sm_90a"), name
        assert ("mapa" in code) == (target == "sm_90a"), name
