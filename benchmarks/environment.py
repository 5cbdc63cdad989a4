# SPDX-License-Identifier: BSD-3-Clause
"""The measuring environment: what must be set before torch is loaded, and what a row says of the machine.

Nothing here imports torch at module level. oneDNN, ATen, MKL and glibc read their settings once, when they
are loaded, so `enter` puts them into the environment and starts the interpreter again.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

ISAS = ("native", "baseline", "avx2", "avx512")

# What each instruction set means to the libraries behind torch. avx512 and native leave them free: their
# own best is the peer. MKL follows its variable on Intel only; on AMD it chooses for itself.
PEER_LIMITS = {
    "native": {},
    "avx512": {},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "baseline": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
PEER_VARIABLES = tuple(PEER_LIMITS["avx2"])

# Above glibc's largest dynamic threshold (32 MB) every output would be mapped and page-fault anew on each
# call, which costs more than the kernel; with these the heap keeps the memory and every candidate reuses it.
MALLOC_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=68719476736"


def wanted_variables(isa: str, threads: int, backend: str) -> dict[str, str | None]:
    """Environment variables a measuring process needs; None means that the variable must be absent."""
    wanted: dict[str, str | None] = dict.fromkeys(PEER_VARIABLES)
    wanted.update(PEER_LIMITS[isa])
    wanted["GLIBC_TUNABLES"] = MALLOC_TUNABLES
    wanted["OMP_NUM_THREADS"] = str(threads)
    wanted["MKL_NUM_THREADS"] = str(threads)
    wanted["DCD_KERNELS_BACKEND"] = backend
    wanted["DCD_KERNELS_ISA"] = None  # set by set_cpu_isa once the extension is loaded
    return wanted


def enter(suite: str, arguments: list[str], isa: str, threads: int, backend: str) -> None:
    """Return if the environment is right, else replace the process by `run.py suite arguments` in it."""
    wanted = wanted_variables(isa, threads, backend)
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    variables = {name: value for name, value in os.environ.items() if name not in wanted}
    variables.update({name: value for name, value in wanted.items() if value is not None})
    sys.stdout.flush()
    program = str(ROOT / "benchmarks" / "run.py")
    os.execve(sys.executable, [sys.executable, program, suite, *arguments], variables)


def pin(threads: int, core: int | None) -> list[int]:
    """Pin the process to `threads` cores, the last allowed unless `core` names the first; return them."""
    allowed = sorted(os.sched_getaffinity(0))
    first = len(allowed) - threads if core is None else allowed.index(core) if core in allowed else -1
    chosen = allowed[first : first + threads] if first >= 0 else []
    if len(chosen) < threads:
        raise ValueError(f"core={core}, threads={threads}: this process may run on cores {allowed} only")
    os.sched_setaffinity(0, chosen)
    import torch

    torch.set_num_threads(threads)
    return chosen


def processor() -> str:
    """Model name of the CPU with family and model numbers, since virtual machines often shorten the name."""
    fields: dict[str, str] = {}
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def commit() -> str:
    """Short commit of the working tree, with '+' when tracked files differ from it; 'unknown' without git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _libc_version() -> str:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        return libc.gnu_get_libc_version().decode()
    except (OSError, AttributeError):
        return "unknown"


def use_isa(isa: str) -> tuple[str, str | None]:
    """Set the instruction set of our kernels. Return the one in use and, if ours cannot run, the reason."""
    import torch

    try:
        from dcd_kernels import extension
    except ImportError as error:
        return "none", f"dcd_kernels cannot be imported: {error}"
    if not extension.LOADED:
        return "none", extension.REASON
    if isa != "native":
        try:
            torch.ops.dcd_kernels.set_cpu_isa(isa)
        except RuntimeError as error:
            return "none", str(error).splitlines()[0]
    used = torch.ops.dcd_kernels.cpu_isa()
    if isa not in ("native", used):
        return used, f"asked for {isa}, the extension uses {used}"
    return used, None


def _versions() -> dict[str, str]:
    import torch

    config = torch.__config__.show()
    found = {"python": platform.python_version(), "torch": torch.__version__, "glibc": _libc_version()}
    for name, mark in (("onednn", "MKL-DNN v"), ("mkl", "Math Kernel Library Version ")):
        found[name] = config.split(mark)[1].split()[0] if mark in config else "unknown"
    try:
        found["dcd_kernels"] = importlib.metadata.version("dcd-kernels")
    except importlib.metadata.PackageNotFoundError:
        found["dcd_kernels"] = "source tree"
    return found


def describe(isa: str, used_isa: str, threads: int, cores: list[int], backend: str, clock: str) -> dict:
    """Everything about the run that a row repeats."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": "cpu",
        "cpu": processor(),
        "cores": ",".join(map(str, cores)),
        "threads": threads,
        "isa": isa,
        "ours_isa": used_isa,
        "aten_isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", "none"),
        "backend": backend,
        "clock": clock,
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        **_versions(),
    }
