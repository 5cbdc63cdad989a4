# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``python -m dcd_kernels info | demo | bench``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

# module to import -> name of the package that brings it
DEMO_PACKAGES = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
}


def positive(text: str) -> int:
    """An argument type: a whole number of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def missing_packages(wanted: dict[str, str]) -> list[str]:
    """Names, as an installer takes them, of the packages in ``wanted`` that are not installed."""
    return [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]


def run_info(options: argparse.Namespace) -> int:
    from dcd_kernels import info

    print(info.support_table_markdown() if options.support_table else info.report())
    return 0


def run_demo(options: argparse.Namespace) -> int:
    missing = missing_packages(DEMO_PACKAGES)
    if missing:
        print(
            f"the demo needs {', '.join(missing)}: python -m pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    from dcd_kernels.demo import run

    return run(options)


def benchmarks_folder() -> Path:
    """Where ``benchmarks/`` lies when the package runs from a checkout (or an editable install of one)."""
    return Path(__file__).resolve().parent.parent / "benchmarks"


def run_bench(arguments: Sequence[str]) -> int:
    entry = benchmarks_folder() / "run.py"
    if not entry.is_file():
        print(
            f"the benchmarks are part of the source tree, not of the installed package (no {entry}): "
            "run `make bench` in a checkout",
            file=sys.stderr,
        )
        return 2
    # what `python benchmarks/run.py …` would see, so that one program serves both ways in
    sys.argv = [str(entry), *arguments]
    sys.path.insert(0, str(entry.parent.parent))
    runpy.run_path(str(entry), run_name="__main__")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m dcd_kernels", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="info | demo | bench")

    info = commands.add_parser(
        "info", help="versions, CPU features, what is built, which backend serves what"
    )
    info.add_argument(
        "--support-table",
        action="store_true",
        help="only the support table, as Markdown",
    )
    info.set_defaults(run=run_info)

    demo = commands.add_parser(
        "demo",
        help="photographs through DCD-MobileNetV2, and digits learnt from scratch",
    )
    demo.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="a photograph (repeatable)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where pictures go",
    )
    demo.add_argument("--only", choices=("photographs", "digits"), help="one of the two parts")
    demo.add_argument(
        "--rounds",
        type=positive,
        default=15,
        help="timed rounds a formulation (default 15)",
    )
    demo.add_argument(
        "--epochs",
        type=positive,
        default=15,
        help="passes over the digits (default 15)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of every random draw (default 0)")
    demo.set_defaults(run=run_demo)

    commands.add_parser("bench", help="run the benchmarks of a checkout: `bench --help` lists them")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given[:1] == ["bench"]:  # all that follows is for the benchmarks' own parser, --help too
            return run_bench(given[1:])
        options = parser().parse_args(given)
        return options.run(options)
    except BrokenPipeError:
        # the reader, `| head` say, has what it wanted; what is left in the buffer must not fail at exit again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
