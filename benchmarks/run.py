# SPDX-License-Identifier: BSD-3-Clause
"""Entry of all benchmarks: `python benchmarks/run.py [suite] [options]`; `dcd_kernels bench` calls it."""

from __future__ import annotations

import importlib
import pathlib
import sys

# name on the command line -> module with main(arguments), and what it measures; the first is the default
SUITES = {
    "pointwise": (
        "benchmarks.pointwise",
        "the operator on the CPU against every way of writing it in PyTorch",
    ),
    "accelerated": ("benchmarks.accelerated", "networks of the released form, as written and accelerated"),
    "networks": ("benchmarks.networks", "whole networks on every runtime, training, the paper's protocol"),
    "gpu": ("benchmarks.gpu", "the operator and a network on a GPU"),
    "complexity": ("benchmarks.complexity", "parameters and multiply-adds beside the paper's tables"),
}


def _usage() -> str:
    lines = [f"  {name:<13}{what}" for name, (_, what) in SUITES.items()]
    return "\n".join(
        [
            "usage: python -m dcd_kernels bench [suite] [options]",
            "",
            "suites (the first by default; `bench SUITE --help` lists the options of one):",
            *lines,
        ]
    )


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(_usage())
        return 0
    name, rest = next(iter(SUITES)), arguments
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
    if name not in SUITES:
        print(f"unknown suite {name!r}, known are: {', '.join(SUITES)}", file=sys.stderr)
        return 2
    return importlib.import_module(SUITES[name][0]).main(rest)


if __name__ == "__main__":
    # run by its path, the first entry is this folder, whose module names are too common to be importable
    here = pathlib.Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != here)]
    sys.exit(main(sys.argv[1:]))
