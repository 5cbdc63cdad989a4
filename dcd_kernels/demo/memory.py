# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of one call, in a process of its own: ``python -m dcd_kernels.demo.memory FILE NAME``.

What PyTorch counts as its own allocations would leave out the kernels' working memory, so the system's count
of resident memory is read: its high-water mark after the call less its value before. Three things keep that
free of noise: a fresh process for each formulation; a first call with a small image, in which code is loaded
and libraries set themselves up; an allocator told to return every freed block from 64 KiB on to the system.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

ALLOCATOR = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"


def status(field: str) -> int:
    """``field`` of this process in bytes, from Linux's ``/proc``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def can_measure() -> bool:
    """Whether this system has the counters that :func:`peak_of_one_call` reads."""
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def peak_of_one_call(call) -> int:
    """Bytes of resident memory that ``call()`` takes at its peak, above what was resident before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = status("VmRSS")
    kept = call()
    peak = status("VmHWM")
    del kept
    return peak - before


def peak_in_fresh_process(module: str, *arguments: str, folder: Path | None = None) -> int:
    """What ``python -m module arguments`` prints last, a number of bytes; single-threaded, run in ``folder``.

    Raises:
        RuntimeError: the process failed; with what it wrote to its standard error.
    """
    environment = {**os.environ, "GLIBC_TUNABLES": ALLOCATOR, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    answer = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"measuring the memory of {' '.join(arguments)!r} failed:\n{answer.stderr}")
    return int(answer.stdout.split()[-1])


def peak_of(network_file: Path, formulation: str) -> int:
    """Peak memory of one forward pass of ``formulation`` over the images of a saved subject, in bytes."""
    return peak_in_fresh_process("dcd_kernels.demo.memory", str(network_file), formulation)


def main(network_file: str, formulation: str) -> None:
    from dcd_kernels.demo.comparison import Subject, calls

    subject: Subject = torch.load(network_file, weights_only=False)
    torch.set_num_threads(1)
    call = calls(subject)[formulation]
    with torch.inference_mode():
        call(subject.images[:, :, ::7, ::7].contiguous())
        print(peak_of_one_call(lambda: call(subject.images)))


if __name__ == "__main__":
    main(*sys.argv[1:])
