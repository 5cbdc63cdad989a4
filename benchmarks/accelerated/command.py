# SPDX-License-Identifier: BSD-3-Clause
"""Networks in the released form as they were written and under `dcd.accelerate`, beside their static twins.

A training step (forward, cross entropy, backward) and inference, on one thread, interleaved. README.md in
benchmarks/ says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from .. import environment, session

TASKS = {"training": (8,), "eval": (1, 8)}  # and the batch sizes
QUICK_TASKS = {"training": (8,), "eval": (1,)}
SECONDS = {"training": 36.0, "eval": 12.0}
QUICK_SECONDS = {"training": 5.0, "eval": 3.0}
SMALLEST_SIZE = 64


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dcd_kernels bench accelerated", description=__doc__)
    made.add_argument(
        "--networks",
        nargs="+",
        default=("mobilenet_v2_x0.5",),
        metavar="NAME",
        help="mobilenet_v2_x0.5 (default), _x1.0 or another width, resnet18, resnet50; all: these four",
    )
    made.add_argument("--task", nargs="+", choices=tuple(TASKS), help="default: both")
    made.add_argument(
        "--batch", nargs="+", type=int, default=(), metavar="N", help="default: training 8, eval 1 and 8"
    )
    made.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    made.add_argument("--classes", type=int, default=1000, help="of the classifier (default 1000)")
    made.add_argument(
        "--quick", action="store_true", help="less than a minute: few rounds, eval at batch 1 only, no memory"
    )
    made.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        help="peak memory, each in a process of its own (default, but not with --quick)",
    )
    seconds = f"{SECONDS['training']:.0f} in training, {SECONDS['eval']:.0f} in eval"
    # by name a backend would refuse what it has no kernel for; what is called is printed with every case
    session.add_options(made, seconds, backend="auto", backend_help="backend of the accelerated layers")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    made = parser()
    options = made.parse_args(given)
    tasks = options.task or list(TASKS)
    if "training" in tasks and 1 in options.batch:
        made.error("--batch: training needs at least 2, the classifier's norms have one value an image")
    if options.size < SMALLEST_SIZE or options.classes < 1:
        made.error(
            f"--size must be at least {SMALLEST_SIZE}, below which the last maps are single pixels, and "
            f"--classes at least 1, got {options.size} and {options.classes}"
        )
    cores = session.enter("accelerated", given, made, options)
    return run(options, cores, given)


def run(options: argparse.Namespace, cores: list[int], given: Sequence[str] = ()) -> int:
    # torch may be loaded only now that its environment is set
    from ..runner import Plan
    from ..suite import wrong_entries
    from . import report
    from .networks import NETWORKS, NetworkCase, factory, make_networks
    from .unit import run_case

    began = time.perf_counter()
    console = session.make_console()
    names = NETWORKS if "all" in options.networks else tuple(dict.fromkeys(options.networks))
    try:
        for name in names:
            factory(name)
    except ValueError as error:
        console.print(f"[red]--networks: {error}[/]")
        return 2
    used_isa, refusal = environment.use_isa(options.isa)
    if options.backend == "reference":
        refusal = "--backend reference: then nothing is accelerated"
    if refusal:
        console.print(f"[red]nothing is measured: {refusal}[/]")
        return 2
    clock = session.clock_of(options)
    run = environment.describe(options.isa, used_isa, options.threads, cores, options.backend, clock)
    session.print_setup(console, run, "gradients are dropped before every step")

    with_memory = options.memory if options.memory is not None else not options.quick
    batches = QUICK_TASKS if options.quick else TASKS
    seconds = QUICK_SECONDS if options.quick else SECONDS
    results, all_rows = [], []
    for name in names:
        networks = make_networks(name, options.size, options.classes, options.seed)
        for task in options.task or TASKS:
            plan = Plan(
                seconds=seconds[task] if options.seconds is None else options.seconds,
                min_rounds=3 if options.quick else 9,
                clock=clock,
                seed=options.seed,
            )
            for batch in options.batch or batches[task]:
                case = NetworkCase(name, task, batch, options.size, options.classes)
                result = run_case(case, networks, plan, options.isa, with_memory)
                results.append(result)
                all_rows += report.rows(result, run)
                report.print_case(console, result)
    report.print_summary(console, results)
    met = report.print_bars(console, results, options.threads)
    failed = [(result.case, entry) for result in results for entry in result.entries if entry.reason]
    for case, entry in failed:
        console.print(
            f"[red]{entry.status}: {entry.candidate.name}, {case.name}: {entry.reason}[/]", soft_wrap=True
        )
    session.print_noise(
        console, all_rows, lambda row: f"{row['network']} {row['task']}, batch {row['batch']}"
    )
    console.print(f"took {time.perf_counter() - began:.0f} s")
    session.finish(console, options, "accelerated", given, all_rows, run)
    return 1 if wrong_entries(results) or (options.check and not met) else 0
