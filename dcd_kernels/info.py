# SPDX-License-Identifier: BSD-3-Clause
"""What this installation is: versions, processor, what was built, which backend serves which form.

Plain text and no package beyond the required ones: this is run, and sent along, when something is broken.
"""

from __future__ import annotations

import importlib
import platform
from pathlib import Path

import torch

from dcd_kernels import __version__, extension
from dcd_kernels.backends import cpu
from dcd_kernels.explain import support_table_markdown


def processor() -> str:
    """The CPU's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The instruction set the CPU kernels use; 'no kernels' without the extension."""
    return torch.ops.dcd_kernels.cpu_isa() if extension.LOADED else "no kernels"


def one_line() -> str:
    """Versions and processor, for the head of a table or a picture."""
    return f"dcd-kernels {__version__}, torch {torch.__version__}, {processor()}, {instruction_set()}"


def _core() -> tuple[object | None, str]:
    try:
        return importlib.import_module("dcd_kernels._core"), ""
    except ImportError as error:
        return None, str(error)


def _built() -> list[tuple[str, str]]:
    core, error = _core()
    if core is None:
        return [("built", f"dcd_kernels._core is missing: {error}")]
    build = core.build_info()
    cuda = f"; CUDA kernels {build['cuda']}" if build["cuda"] else ""
    rows = [
        ("built", f"CPU kernels {', '.join(build['cpu_kernels'])}{cuda}; {build['compiler']}"),
        ("left out", f"CUDA kernels: {build['cuda_left_out']}" if build["cuda_left_out"] else "nothing"),
    ]
    if build["sanitizers"]:
        rows.append(("sanitizers", build["sanitizers"]))
    able = [f"{name} {'yes' if runs else 'no'}" for name, runs in core.cpu_features().items()]
    return [*rows, ("this CPU runs", ", ".join(able))]


def _products() -> list[tuple[str, str]]:
    """How the CPU kernels multiply in bfloat16 and in float32, and why not in a better way."""
    used = torch.ops.dcd_kernels.cpu_products()
    precision = f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()!r}"
    if torch.ops.dcd_kernels.cpu_splits_float32():
        single = f"pointwise layers split float32 into three products of bf16: {precision}"
    elif used == "amx":
        single = f"exact: {precision}; 'high' would split it into three products of bf16"
    else:
        single = "exact: only AMX would split it into three products of bf16"
    return [("bf16", "; ".join([used, *cpu.better_products()])), ("float32", single)]


def facts() -> list[tuple[str, str]]:
    """Name and value of everything but the support table."""
    rows = [
        ("dcd-kernels", __version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", processor()),
        *_built(),
        ("kernels", f"loaded, running {instruction_set()}" if extension.LOADED else "NOT LOADED"),
    ]
    if extension.LOADED:
        rows += _products()
    if not extension.LOADED:
        rows.append(("reason", extension.REASON))
    rows.append(
        ("CUDA kernels", "loaded" if extension.CUDA_LOADED else f"not loaded: {extension.CUDA_REASON}")
    )
    return rows


def aligned(table: str) -> str:
    """A Markdown table as plain columns, for a terminal; other lines as they are."""
    lines = table.splitlines()
    cells = {place: line.strip("| ").split(" | ") for place, line in enumerate(lines) if line.startswith("|")}
    widths = [max(map(len, column)) for column in zip(*cells.values(), strict=True)]
    for place, row in cells.items():
        ruled = (width * "-" if cell == "---" else cell for cell, width in zip(row, widths, strict=True))
        lines[place] = "  ".join(map(str.ljust, ruled, widths)).rstrip()
    return "\n".join(lines)


def report() -> str:
    """The whole text of ``python -m dcd_kernels info``."""
    return "\n".join(
        [
            *(f"{name + ':':<15}{value}" for name, value in facts()),
            "",
            "Which backend serves which form ('auto' takes the first that can, from the left):",
            "",
            aligned(support_table_markdown()),
        ]
    )
