# SPDX-License-Identifier: BSD-3-Clause
"""What nvcc makes of the depthwise kernels, and what the library that it makes asks of torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from dcd_kernels import extension

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
LIBRARY = extension.CUDA_LIBRARY
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
# kernels of a source: kernel sizes × arrangements × modes
KERNELS = {"convolve": 3 * 2 * 3, "sums": 3 * 2 * 2}
TYPES = ("bfloat", "half", "float")
# of 65536: what lets so many blocks of 128 threads share a multiprocessor, by kernel size
MOST_REGISTERS = {
    "convolve": {3: 80, 5: 128, 7: 168},  # six, four, three
    "sums": {3: 80, 5: 128, 7: 255},  # six, four, two
}
_ENTRY = re.compile(r"_ZN3dcd4cuda2dw\d+(convolve|sums)_kernelI(\w*?)Lb([01])ELi(\d)ELNS1_4ModeE(\d)E")

needs_nvcc = pytest.mark.skipif(
    NVCC is None or not CUDA.is_dir(), reason="nvcc is not installed" if NVCC is None else "not a checkout"
)
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY.name} was not built")


def _tool(name: str) -> str | None:
    """From the CUDA toolkit, or from Triton's wheel."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(place) if place.exists() else None
    return found


CUOBJDUMP = _tool("cuobjdump")
needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None, reason="no cuobjdump: neither the CUDA toolkit nor Triton"
)


def _described(name: str) -> tuple[str, int] | None:
    """Family and kernel size of a mangled name, None for another kernel."""
    found = _ENTRY.match(name)
    return (found[1], int(found[4])) if found else None


def _report(source: str, target: str, folder: Path) -> str:
    flags = ["-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    code = f"-gencode=arch={TARGETS[target]},code={target}"
    command = [NVCC, *flags, code, "-cubin", str(CUDA / f"{source}.cu"), "-o", str(folder / "out.cubin")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def _check_report(report: str, family: str) -> None:
    entries = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.findall(r"Used (\d+) registers", report)
    assert len(entries) == len(spills) == len(registers) == KERNELS[family]
    for name, spill, count in zip(entries, spills, registers, strict=True):
        assert spill == ("0", "0", "0"), name
        assert int(count) <= MOST_REGISTERS[family][_described(name)[1]], name


@needs_nvcc
def test_compiles_without_warnings_and_spills(tmp_path):
    _check_report(_report("depthwise_convolve_bfloat", "sm_90a", tmp_path), "convolve")


@pytest.mark.full
@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("type_", TYPES)
def test_every_source_compiles_without_warnings_and_spills(tmp_path, type_, family, target):
    _check_report(_report(f"depthwise_{family}_{type_}", target, tmp_path), family)


@pytest.mark.full
@needs_nvcc
@pytest.mark.parametrize("family", KERNELS)
def test_ptx_for_later_devices(tmp_path, family):
    source = CUDA / f"depthwise_{family}_half.cu"
    target = tmp_path / "out.ptx"
    subprocess.run(
        [NVCC, "-std=c++17", "-ptx", "-arch=compute_80", str(source), "-o", str(target)], check=True
    )
    ptx = target.read_text()
    assert ptx.count(".entry") == KERNELS[family]
    assert "cp.async.cg.shared.global" in ptx and ".local" not in ptx


# The library as it was built, all kernels and targets in it


@needs_library
@needs_cuobjdump
def test_resources_of_the_built_library():
    listed = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", str(LIBRARY)], capture_output=True, text=True
    )
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listed.stdout)
    counted = defaultdict(int)
    for name, registers, stack, local in found:
        kind = _described(name)
        if kind is None:
            continue
        counted[kind[0]] += 1
        assert int(stack) == int(local) == 0, f"{name} spills"
        assert int(registers) <= MOST_REGISTERS[kind[0]][kind[1]], name
    assert counted == {family: count * len(TYPES) * len(TARGETS) for family, count in KERNELS.items()}


@needs_library
@needs_cuobjdump
@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.full), "sm_90a"])
def test_wide_copies_and_no_local_memory(target):
    """16 bytes at a time from global to shared memory, without registers in between."""
    dump = subprocess.run([CUOBJDUMP, "-sass", "-arch", target, str(LIBRARY)], capture_output=True, text=True)
    parts = re.split(r"Function : (\w+)", dump.stdout)
    codes = {name: code for name, code in zip(parts[1::2], parts[2::2], strict=True) if _described(name)}
    if not codes:
        pytest.skip(f"cuobjdump cannot disassemble: {dump.stderr[:200]}")
    assert len(codes) == sum(KERNELS.values()) * len(TYPES)
    for name, code in codes.items():
        assert re.search(r"LDGSTS\.E\.(\w+\.)*128", code), f"{name} has no 16-byte copies"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        if "Lb1E" in name and "float" not in name and "IfLb" not in name:
            # a pair of channels is one access to shared memory, never two halves
            assert "LDS.U16" not in code, name


def _dynamic(option: str) -> str:
    return subprocess.run(["readelf", option, "--wide", str(LIBRARY)], capture_output=True, text=True).stdout


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_needs_only_what_a_cuda_torch_has():
    headers = _dynamic("-d")
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", headers))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    system = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so.*|ld-linux.*"
    assert all(re.fullmatch(rf"libtorch_cpu\.so|libtorch_cuda\.so|{system}", name) for name in needed), needed
    assert "RPATH" not in headers and "RUNPATH" not in headers


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_undefined_symbols_are_of_the_stable_interface():
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    torch_names = [name for name in names if re.match(r"aoti_torch_|torch_", name)]
    others = [name for name in names if name not in torch_names]
    # C and C++ runtimes have versioned names; nothing of CUDA's runtime, which is inside
    assert all(
        "@" in name or name.startswith(("_ITM_", "__gmon_start__", "__cxa_finalize")) for name in others
    ), others
    assert not any(name.startswith("cuda") for name in names)
    # what a CPU build of torch lacks is known, the rest is found in its libraries
    cpu = "\n".join(
        subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True).stdout
        for path in (Path(torch.__file__).parent / "lib").glob("libtorch*.so")
    )
    defined = {line.split()[-1].partition("@")[0] for line in cpu.splitlines() if line.strip()}
    missing = {name for name in torch_names if name not in defined}
    assert missing <= {"aoti_torch_get_current_cuda_stream"}, missing
