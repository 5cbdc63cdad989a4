# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks, static and dynamic, on the CPU: PyTorch, torch.compile, ONNX Runtime, OpenVINO and ours.

Inference, a training step, and the protocol of the paper's Section 5.5, interleaved in one process. README.md
in benchmarks/ says what is measured and how.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .. import environment, session

if TYPE_CHECKING:
    from .unit import NetworkResult

INFERENCE, TRAINING, PROTOCOL = TASKS = ("inference", "training", "protocol")
BATCHES = {INFERENCE: (1, 8), TRAINING: (8,), PROTOCOL: (1,)}
SECONDS, QUICK_SECONDS = 30.0, 8.0
IMAGES, QUICK_IMAGES = 300, 50
# The weights of a network are megabytes, and one call after those of forty others does not bring them back to
# where a network that is in use has them.
BLOCK_SECONDS = 0.02
SMALLEST_SIZE = 64
DEFAULT = "mobilenet_v2_x0.5"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dcd_kernels bench networks", description=__doc__)
    made.add_argument(
        "--networks",
        nargs="+",
        default=(),
        metavar="NAME",
        help=f"{DEFAULT}, _x1.0 or another width, resnet18, resnet50; all: these (default: what the task "
        "is about; --quick: the first)",
    )
    made.add_argument("--task", nargs="+", choices=TASKS, help="default: all, --quick: inference")
    made.add_argument(
        "--batch",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help="in inference (default 1 8, --quick: 1)",
    )
    made.add_argument(
        "--runtimes", nargs="+", default=(), metavar="NAME", help="only these: ours OpenVINO 'ONNX Runtime' …"
    )
    made.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    made.add_argument("--classes", type=int, default=1000, help="of the classifier (default 1000)")
    made.add_argument(
        "--images", type=int, help=f"of the protocol (default {IMAGES}, --quick: {QUICK_IMAGES})"
    )
    made.add_argument(
        "--quick", action="store_true", help="a minute or two: no torch.compile, bf16, baselines or memory"
    )
    session.add_options(
        made, f"{SECONDS:.0f}", backend="auto", backend_help="backend of layers that are ours"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    made = parser()
    options = made.parse_args(given)
    if options.size < SMALLEST_SIZE or options.classes < 1:
        made.error(
            f"--size must be at least {SMALLEST_SIZE}, below which the last maps are single pixels, and "
            f"--classes at least 1, got {options.size} and {options.classes}"
        )
    if options.images is not None and options.images < 1:
        made.error(f"--images must be positive, got {options.images}")
    cores = session.enter("networks", given, made, options)
    return run(options, cores, given)


def run(options: argparse.Namespace, cores: list[int], given: Sequence[str] = ()) -> int:
    # torch may be loaded only now that its environment is set
    from ..accelerated.networks import NETWORKS, factory
    from ..accelerated.report import print_bars
    from ..suite import wrong_entries
    from . import candidates as registry
    from . import report, runtimes

    began = time.perf_counter()
    console = session.make_console()
    if "all" in options.networks:
        options.networks = NETWORKS
    try:
        for name in options.networks:
            factory(name)
    except ValueError as error:
        console.print(f"[red]--networks: {error}[/]")
        return 2
    if unknown := set(options.runtimes) - set(registry.RUNTIMES):
        console.print(f"[red]--runtimes: unknown {sorted(unknown)}, known are {registry.RUNTIMES}[/]")
        return 2
    used_isa, refusal = environment.use_isa(options.isa)
    clock = session.clock_of(options)
    run = environment.describe(options.isa, used_isa, options.threads, cores, options.backend, clock)
    run |= runtimes.versions()
    session.print_setup(console, run, "weights are random, norms settled")
    console.print("runtimes: " + ", ".join(f"{name} {run[name]}" for name in runtimes.PACKAGES))
    if refusal:
        console.print(f"[yellow]ours is not measured: {refusal}[/]")

    results, all_rows = [], []
    for result, images in measured(options, clock, refusal):
        results.append(result)
        all_rows += report.rows(result, run, images)
        report.print_case(console, result)
    report.print_summary(console, results)
    met = print_bars(console, results, options.threads, report.BARS, report.FIGURES)
    failed = [(result.case, entry) for result in results for entry in result.entries if entry.reason]
    for case, entry in failed:
        console.print(
            f"[red]{entry.status}: {entry.candidate.name}, {case.name}: {entry.reason}[/]", soft_wrap=True
        )
    session.print_noise(
        console, all_rows, lambda row: f"{row['network']} {row['task']}, batch {row['batch']}"
    )
    console.print(f"took {time.perf_counter() - began:.0f} s")
    session.finish(console, options, "networks", given, all_rows, run)
    return 1 if wrong_entries(results) or (options.check and not met) else 0


def measured(
    options: argparse.Namespace, clock: str, refusal: str | None
) -> Iterator[tuple[NetworkResult, int]]:
    """What came of every case, one after the other, and how many images its candidates saw in turn."""
    from ..accelerated.networks import NETWORKS, NetworkCase
    from ..runner import Plan
    from . import candidates as registry
    from . import training, unit, written

    quick, threads = options.quick, options.threads
    seconds = (QUICK_SECONDS if quick else SECONDS) if options.seconds is None else options.seconds
    plan = Plan(
        seconds=seconds,
        min_rounds=3 if quick else 5,
        block_seconds=BLOCK_SECONDS,
        clock=clock,
        seed=options.seed,
    )
    images = options.images or (QUICK_IMAGES if quick else IMAGES)
    # a sample is one image, after another one that is not timed
    one_by_one = dataclasses.replace(
        plan, seconds=0.0, min_rounds=images, max_rounds=images, block_seconds=0.0
    )
    refusals = dict.fromkeys(registry.THIS_PACKAGE, refusal) if refusal else {}
    every = {INFERENCE: NETWORKS, TRAINING: (DEFAULT,), PROTOCOL: NETWORKS[:2]}
    for task in options.task or ((INFERENCE,) if quick else TASKS):
        how, seen = (one_by_one, images) if task == PROTOCOL else (plan, 1)
        forms, runtimes = registry.scope(task, quick)
        for name in options.networks or ((DEFAULT,) if quick else every[task]):
            case = NetworkCase(name, task, BATCHES[task][-1], options.size, options.classes)
            if task == TRAINING:
                yield training.run_case(case, how, options.isa, not quick, refusal), seen
                continue
            networks = written.make_written(name, options.size, options.classes, options.seed, forms)
            chosen = registry.candidates(name, threads, tuple(options.runtimes) or runtimes, forms)
            batches = options.batch if task == INFERENCE else ()
            for batch in batches or (BATCHES[task][:1] if quick else BATCHES[task]):
                case = dataclasses.replace(case, batch=batch)
                yield unit.run_case(case, networks, chosen, how, threads, seen, refusals), seen
