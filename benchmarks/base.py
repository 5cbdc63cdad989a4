# SPDX-License-Identifier: BSD-3-Clause
"""`--base REV`: the same suite, with the same options, on another commit of this repository, beside this one.

The commit is checked out into a temporary worktree and built there. Only its package is measured: the
benchmarks are those that run now. Both runs are interleaved in themselves but not with each other: ours are
divided by how much the others' times changed from run to run, which is the machine's drift.
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from .environment import ROOT

OURS = ("ours", "accelerate", "accelerated")
CASE_KEYS = ("task", "network", "in_channels", "out_channels", "size", "batch", "dtype", "candidate")


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", metavar="REV", help="then build and measure that commit too, and print what changed since"
    )


def resolve(revision: str) -> str:
    """The commit of a revision.

    Raises:
        ValueError: git knows no such commit.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if answer.returncode:
        raise ValueError(f"--base must be a commit of this repository, got {revision!r}")
    return answer.stdout.strip()


def without_option(given: Sequence[str]) -> list[str]:
    """The arguments for the base: without --base itself, and without --check, which is about this commit."""
    kept, arguments = [], iter(given)
    for argument in arguments:
        if argument == "--base":
            next(arguments, None)
        elif not argument.startswith("--base=") and argument != "--check":
            kept.append(argument)
    return kept


def build(commit: str, tree: pathlib.Path) -> None:
    """Check ``commit`` out into ``tree``, with the benchmarks of this one, and build it there.

    Raises:
        RuntimeError: one of that failed; with the end of what it wrote.
    """
    _run(["git", "worktree", "add", "--detach", "--force", str(tree), commit], ROOT)
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=ignored)
    _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)


def measure(commit: str, suite: str, arguments: Sequence[str]) -> list[dict[str, str]]:
    """The rows of ``suite`` at ``commit``, as CSV has them.

    Raises:
        RuntimeError: it could not be built or measured.
    """
    with tempfile.TemporaryDirectory(prefix="dcd-base-") as folder:
        tree = pathlib.Path(folder) / "base"
        try:
            build(commit, tree)
            # wrong numbers make it exit with 1; the rows say so
            command = [sys.executable, str(tree / "benchmarks" / "run.py"), suite, *arguments, "--save"]
            _run(command, tree, allowed=(0, 1))
            written = sorted((tree / "benchmarks" / "results").glob("*.csv"))
            if not written:
                raise RuntimeError(f"{suite} at {commit[:12]} wrote no rows")
            with written[-1].open(newline="", encoding="utf-8") as stream:
                return list(csv.DictReader(stream))
        finally:
            command = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(command, cwd=ROOT, capture_output=True)


def _run(command: Sequence[str], folder: pathlib.Path, allowed: tuple[int, ...] = (0,)) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tools = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    arguments = f"{environment.get('DCD_CMAKE_ARGS', '')} -DDCD_CUDA=OFF".strip()
    environment |= {"PATH": tools, "DCD_CMAKE_ARGS": arguments}
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if answer.returncode not in allowed:
        end = "\n".join((answer.stdout + answer.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} failed with {answer.returncode}:\n{end}")


# ------------------------------------------------------------------------------------------------ comparison


def _times(rows: Sequence[dict]) -> dict[tuple[str, ...], tuple[dict, float]]:
    return {
        tuple(str(row.get(key, "")) for key in CASE_KEYS): (row, float(row["p50_us"]))
        for row in rows
        if row["p50_us"] not in (None, "")
    }


def _is_ours(row: dict) -> bool:
    return row["group"].split()[0].rstrip(",") in OURS


def changes(rows: Sequence[dict], base_rows: Sequence[dict]) -> Iterator[tuple[dict, float, float, float]]:
    """(row, its µs, µs at the base, ratio without the drift) of what both have of ours.

    The drift is the geometric mean of the ratios of everything else in the same case.
    """
    own, other = _times(rows), _times(base_rows)
    drifts: dict[tuple[str, ...], list[float]] = {}
    for key in own.keys() & other.keys():
        if not _is_ours(own[key][0]):
            drifts.setdefault(key[:-1], []).append(own[key][1] / other[key][1])
    for key, (row, time) in own.items():
        if key in other and _is_ours(row):
            drift = statistics.geometric_mean(drifts.get(key[:-1], [1.0]))
            yield row, time, other[key][1], time / other[key][1] / drift


def compare(console, revision: str, suite: str, given: Sequence[str], rows: Sequence[dict]) -> None:
    """Measure the base and print what changed; what cannot be built is said and nothing else is lost."""
    from rich.table import Table

    commit = resolve(revision)
    try:
        base_rows = measure(commit, suite, without_option(given))
    except RuntimeError as error:
        console.print(f"[red]--base {revision}: refused: {error}[/]", soft_wrap=True)
        return
    table = Table(title=f"this commit against {commit[:12]}", title_justify="left")
    for column in ("case", "candidate", "µs", "µs at the base", "this ÷ base, drift divided out"):
        table.add_column(column, justify="left" if column in ("case", "candidate") else "right")
    ratios = []
    for row, time, before, ratio in changes(rows, base_rows):
        case = " ".join(str(row[key]) for key in CASE_KEYS[:-2] if row.get(key) not in (None, ""))
        table.add_row(case, row["candidate"], f"{time:,.0f}", f"{before:,.0f}", f"{ratio:.3f}")
        ratios.append(ratio)
    console.print(table)
    if ratios:
        console.print(f"geometric mean: {statistics.geometric_mean(ratios):.3f} of the base's time")
    else:
        console.print("nothing of ours was measured at both commits")
