# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise operator against every way of writing it in PyTorch: `python -m benchmarks.pointwise`.

Run from the root of the repository. README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from . import environment

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
QUICK_SECONDS, FULL_SECONDS = 0.6, 5.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.pointwise", description=__doc__)
    made.add_argument(
        "--quick", action="store_true", help="about half a minute, forward only unless --task is given"
    )
    made.add_argument(
        "--task", nargs="+", choices=("forward", "training"), help="default: both, --quick: forward"
    )
    made.add_argument(
        "--shapes", default="", metavar="TEXT", help="only shapes whose name has TEXT: '384->96', '@14'"
    )
    made.add_argument(
        "--batch", nargs="+", type=int, default=(1, 8), metavar="N", help="batch sizes (default 1 8)"
    )
    made.add_argument(
        "--groups", nargs="+", default=(), help="only these groups: static ours 'factored eager' …"
    )
    made.add_argument(
        "--isa",
        choices=environment.ISAS,
        default="native",
        help="instruction set of ours; avx2 and baseline restrict the peers too (default: by cpuid)",
    )
    made.add_argument(
        "--backend", default="cpu", help="backend that ours must use (default cpu: the fused kernels)"
    )
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--core", type=int, help="first core to pin to (default: the last ones allowed)")
    made.add_argument("--seconds", type=float, help=f"measuring time a case (default {FULL_SECONDS})")
    made.add_argument(
        "--clock",
        choices=("cpu", "wall"),
        help="cpu: CPU time of the process, blind to other processes (default with one thread); wall",
    )
    made.add_argument(
        "--consumer", action="store_true", help="time each call together with a sum over its output"
    )
    made.add_argument("--brief", action="store_true", help="no table per case, only the summary")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--save", action="store_true", help=f"write the rows under {RESULTS.name}/ as JSON lines and CSV"
    )
    made.add_argument(
        "--check", action="store_true", help="exit with 1 if a figure that must be met is missed"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    made = parser()
    options = made.parse_args(given)
    if options.threads < 1 or min(options.batch) < 1:
        made.error(f"--threads and --batch must be positive, got {options.threads} and {options.batch}")
    environment.enter("pointwise", given, options.isa, options.threads, options.backend)
    try:
        cores = environment.pin(options.threads, options.core)
    except ValueError as error:
        made.error(str(error))
    return _run(options, cores)


def _run(options: argparse.Namespace, cores: list[int]) -> int:
    # torch may be loaded only now that its environment is set
    from rich.console import Console
    from rich.progress import track

    from . import report
    from .candidates import FORWARD, OURS, REGISTRY, TRAINING
    from .cases import POINTWISE_SHAPES, pointwise_cases
    from .runner import Plan
    from .suite import run_case, wrong_entries

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    try:
        cases = pointwise_cases(tuple(options.batch), options.shapes)
    except ValueError as error:
        console.print(f"[red]{error}[/]")
        return 2
    groups = {candidate.group for candidate in REGISTRY}
    if unknown := set(options.groups) - groups:
        console.print(f"[red]--groups: unknown {sorted(unknown)}, known are {sorted(groups)}[/]")
        return 2
    clock = options.clock or ("cpu" if options.threads == 1 else "wall")
    plan = Plan(
        seconds=options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS),
        min_rounds=3 if options.quick else 9,
        clock=clock,
        consumer=options.consumer,
        seed=options.seed,
    )
    used_isa, refusal = "none", None
    if options.backend != "reference":
        used_isa, refusal = environment.use_isa(options.isa)
    if options.backend == "auto":
        refusal = None  # then the reference is what the user would get, and what is measured
    refusals = {OURS: refusal} if refusal else {}
    run = environment.describe(options.isa, used_isa, options.threads, cores, options.backend, clock)
    tasks = options.task or ([FORWARD] if options.quick else [FORWARD, TRAINING])
    _print_setup(console, run, plan)
    if refusal:
        console.print(f"[yellow]ours is not measured: {refusal}[/]")

    results, all_rows = [], []
    work = [(task, case) for task in tasks for case in cases]
    for task, case in track(work, "measuring", console=Console(stderr=True), transient=True):
        result = run_case(case, task, plan, tuple(options.groups), refusals)
        results.append(result)
        all_rows += report.rows(result, run, plan.consumer)
        if not (options.brief or options.quick):
            report.print_case(console, result)
    for task in tasks:
        report.print_summary(console, results, task)
    complete = len(cases) == len(POINTWISE_SHAPES) * 2 and sorted(set(options.batch)) == [1, 8]
    met = report.print_bars(console, results, options.isa, complete)
    wrong = wrong_entries(results)
    for case, entry in wrong:
        console.print(
            f"[red]wrong numbers: {entry.candidate.name} at {case.name}: {entry.reason}[/]", soft_wrap=True
        )
    _print_noise(console, all_rows)
    if options.save:
        name = f"pointwise-{run['date'][:19].replace(':', '')}-{options.isa}-{options.threads}t"
        for path in report.save(all_rows, RESULTS, name):
            console.print(f"saved {path.relative_to(environment.ROOT)}")
    return 1 if wrong or (options.check and not met) else 0


def _print_setup(console, run: dict, plan) -> None:
    console.print(
        f"[bold]{run['cpu']}[/], core {run['cores']}, {run['threads']} thread(s); torch {run['torch']}, "
        f"oneDNN {run['onednn']}, MKL {run['mkl']}; commit {run['commit']}; {run['date']}",
        soft_wrap=True,
    )
    console.print(
        f"ours on backend {run['backend']}; instruction set: asked {run['isa']}, "
        f"ours {run['ours_isa']}, ATen {run['aten_isa']}, oneDNN limit "
        f"{run['onednn_limit']}; clock: {run['clock']}; {'with' if plan.consumer else 'without'} a consumer",
        soft_wrap=True,
    )
    console.print(
        f"GLIBC_TUNABLES set: {run['malloc']} (no page faults for outputs over 32 MB)", soft_wrap=True
    )
    console.print(
        "caches: one untimed call before every timed block, the same operands in every call; no subnormal "
        "operands; every candidate is compared with float64 before it is timed",
        soft_wrap=True,
    )


def _print_noise(console, all_rows: list[dict]) -> None:
    timed = [row for row in all_rows if row["p50_us"] is not None]
    if not timed:
        return
    preempted = sum(row["preempted"] * row["rounds"] for row in timed) / sum(row["rounds"] for row in timed)
    faults = max(timed, key=lambda row: row["faults_per_call"])
    rounds = [row["rounds"] for row in timed]
    console.print(
        f"noise: {preempted:.1%} of the blocks were preempted; rounds a case: "
        f"{min(rounds)} to {max(rounds)}; page faults a call at most {faults['faults_per_call']:.1f} "
        f"({faults['candidate']}, {faults['in_channels']}→{faults['out_channels']}@{faults['size']} "
        f"batch {faults['batch']})",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
