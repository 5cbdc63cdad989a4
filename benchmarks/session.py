# SPDX-License-Identifier: BSD-3-Clause
"""What suites on the CPU share around their measuring: options, the process, what is said of a run.

Nothing here imports torch at module level, as :mod:`benchmarks.environment` has to come first.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

from . import base, environment

RESULTS = environment.ROOT / "benchmarks" / "results"


def add_options(parser: argparse.ArgumentParser, seconds: str, backend: str, backend_help: str) -> None:
    """The options of every suite; ``seconds`` says what --seconds is by default."""
    parser.add_argument(
        "--isa",
        choices=environment.ISAS,
        default="native",
        help="instruction set of ours; avx2 and baseline restrict the peers too (default: by cpuid)",
    )
    parser.add_argument("--backend", default=backend, help=f"{backend_help} (default {backend})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", type=int, help="first core to pin to (default: the last ones allowed)")
    parser.add_argument("--seconds", type=float, help=f"measuring time a case (default {seconds})")
    parser.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        help="cpu: CPU time of the process, blind to other processes (default with one thread); wall",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save", action="store_true", help=f"write the rows under {RESULTS.name}/ as JSON lines and CSV"
    )
    base.add_option(parser)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a figure that must be met is missed"
    )


def enter(
    suite: str, given: list[str], parser: argparse.ArgumentParser, options: argparse.Namespace
) -> list[int]:
    """The process in its environment, see `environment.enter`, and on its cores, which are returned."""
    if min((options.threads, *options.batch)) < 1:
        parser.error(f"--threads and --batch must be positive, got {options.threads} and {options.batch}")
    if options.base:
        try:
            base.resolve(options.base)
        except ValueError as error:
            parser.error(str(error))
    environment.enter(suite, given, options.isa, options.threads, options.backend)
    try:
        return environment.pin(options.threads, options.core)
    except ValueError as error:
        parser.error(str(error))


def clock_of(options: argparse.Namespace) -> str:
    return options.clock or ("cpu" if options.threads == 1 else "wall")


def make_console():
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=150)


def print_setup(console, run: dict, remark: str) -> None:
    """The machine and its settings; ``remark`` ends the line about the settings."""
    console.print(
        f"[bold]{run['cpu']}[/], core {run['cores']}, {run['threads']} thread(s); torch {run['torch']}, "
        f"oneDNN {run['onednn']}, MKL {run['mkl']}; commit {run['commit']}; {run['date']}",
        soft_wrap=True,
    )
    console.print(
        f"ours on backend {run['backend']}; instruction set: asked {run['isa']}, "
        f"ours {run['ours_isa']}, ATen {run['aten_isa']}, oneDNN limit "
        f"{run['onednn_limit']}; clock: {run['clock']}; {remark}",
        soft_wrap=True,
    )
    console.print(
        f"GLIBC_TUNABLES set: {run['malloc']} (no page faults for outputs over 32 MB)", soft_wrap=True
    )


def print_noise(console, all_rows: Sequence[dict], name_of: Callable[[dict], str]) -> None:
    """How much the machine disturbed; ``name_of`` names the case of a row."""
    timed = [row for row in all_rows if row["p50_us"] is not None]
    if not timed:
        return
    preempted = sum(row["preempted"] * row["rounds"] for row in timed) / sum(row["rounds"] for row in timed)
    faults = max(timed, key=lambda row: row["faults_per_call"])
    rounds = [row["rounds"] for row in timed]
    console.print(
        f"noise: {preempted:.1%} of the blocks were preempted; rounds a case: "
        f"{min(rounds)} to {max(rounds)}; page faults a call at most {faults['faults_per_call']:.1f} "
        f"({faults['candidate']}, {name_of(faults)})",
        soft_wrap=True,
    )


def finish(
    console,
    options: argparse.Namespace,
    suite: str,
    given: Sequence[str],
    all_rows: Sequence[dict],
    run: dict,
) -> None:
    """What is left when all is measured: save the rows, and measure the base, as the options say."""
    if options.save:
        save(console, all_rows, suite, run, RESULTS)
    if options.base:
        base.compare(console, options.base, suite, given, all_rows)


def save(console, all_rows: Sequence[dict], suite: str, run: dict, folder: pathlib.Path) -> None:
    """Write the rows under a name of their own, and say where."""
    from . import report

    name = f"{suite}-{run['date'][:19].replace(':', '')}-{run['isa']}-{run['threads']}t"
    for path in report.save(all_rows, folder, name):
        console.print(f"saved {path.relative_to(folder.parent.parent)}")
