# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise operator against every way of writing it in PyTorch: `python -m benchmarks.pointwise`.

Run from the root of the repository. README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys

from . import environment, session

QUICK_SECONDS, FULL_SECONDS = 0.6, 5.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dcd_kernels bench pointwise", description=__doc__)
    made.add_argument(
        "--quick", action="store_true", help="about half a minute, forward only unless --task is given"
    )
    made.add_argument(
        "--task",
        nargs="+",
        choices=("forward", "training", "normalised"),
        help="default: all, --quick: forward",
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
        "--consumer", action="store_true", help="time each call together with a sum over its output"
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of every tensor (default float32)",
    )
    made.add_argument("--brief", action="store_true", help="no table per case, only the summary")
    # the fused kernels by name, so that ours cannot run on the reference unnoticed
    session.add_options(made, str(FULL_SECONDS), backend="cpu", backend_help="backend that ours must use")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    made = parser()
    options = made.parse_args(given)
    cores = session.enter("pointwise", given, made, options)
    return _run(options, cores, given)


def _run(options: argparse.Namespace, cores: list[int], given: list[str]) -> int:
    # torch may be loaded only now that its environment is set
    from rich.console import Console
    from rich.progress import track

    from . import report
    from .candidates import FORWARD, NORMALISED, OURS, REGISTRY, TRAINING
    from .cases import POINTWISE_SHAPES, pointwise_cases
    from .runner import Plan
    from .suite import run_case, wrong_entries

    console = session.make_console()
    try:
        cases = pointwise_cases(tuple(options.batch), options.shapes, options.dtype)
    except ValueError as error:
        console.print(f"[red]{error}[/]")
        return 2
    groups = {candidate.group for candidate in REGISTRY}
    if unknown := set(options.groups) - groups:
        console.print(f"[red]--groups: unknown {sorted(unknown)}, known are {sorted(groups)}[/]")
        return 2
    clock = session.clock_of(options)
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
    products = options.isa
    if options.dtype == "bfloat16" and refusal is None and options.backend != "reference":
        import torch

        products = torch.ops.dcd_kernels.cpu_products()
        used_isa += f", bf16 by {products}"
    if options.backend == "auto":
        refusal = None  # then the reference is what the user would get, and what is measured
    refusals = {OURS: refusal} if refusal else {}
    run = environment.describe(options.isa, used_isa, options.threads, cores, options.backend, clock)
    tasks = options.task or ([FORWARD] if options.quick else [FORWARD, TRAINING, NORMALISED])
    session.print_setup(console, run, f"{'with' if plan.consumer else 'without'} a consumer")
    console.print(
        "caches: one untimed call before every timed block, the same operands in every call; no subnormal "
        "operands; every candidate is compared with float64 before it is timed",
        soft_wrap=True,
    )
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
    met = report.print_bars(console, results, products, complete)
    wrong = wrong_entries(results)
    for case, entry in wrong:
        console.print(
            f"[red]wrong numbers: {entry.candidate.name} at {case.name}: {entry.reason}[/]", soft_wrap=True
        )
    session.print_noise(console, all_rows, _shape_of)
    session.finish(console, options, "pointwise", given, all_rows, run)
    return 1 if wrong or (options.check and not met) else 0


def _shape_of(row: dict) -> str:
    return f"{row['in_channels']}→{row['out_channels']}@{row['size']} batch {row['batch']}"


if __name__ == "__main__":
    sys.exit(main())
