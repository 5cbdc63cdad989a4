# SPDX-License-Identifier: BSD-3-Clause
"""Entry of all benchmarks: `python benchmarks/run.py [suite] [options]`; `dcd_kernels bench` calls it."""

from __future__ import annotations

import importlib
import pathlib
import sys

# name on the command line -> module with main(arguments); the first is the default
SUITES = {
    "pointwise": "benchmarks.pointwise",
    "accelerated": "benchmarks.accelerated",
    "networks": "benchmarks.networks",
    "gpu": "benchmarks.gpu",
    "complexity": "benchmarks.complexity",
}


def main(arguments: list[str]) -> int:
    name, rest = next(iter(SUITES)), arguments
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
    if name not in SUITES:
        print(f"unknown suite {name!r}, known are: {', '.join(SUITES)}", file=sys.stderr)
        return 2
    return importlib.import_module(SUITES[name]).main(rest)


if __name__ == "__main__":
    # run by its path, the first entry is this folder, whose module names are too common to be importable
    here = pathlib.Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != here)]
    sys.exit(main(sys.argv[1:]))
