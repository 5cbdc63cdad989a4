# SPDX-License-Identifier: BSD-3-Clause
"""Rows, tables and bars of whole networks."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..accelerated.networks import NETWORKS, PAPER
from ..accelerated.report import Bar, cell, milliseconds, peak_figures, print_candidates
from ..candidates import STATIC, TRAINING
from ..report import RUN_KEYS, entry_row
from ..runner import paired_ratio
from .candidates import (
    ACCELERATED,
    IN_BF16,
    INFERENCE,
    OPENVINO,
    OURS,
    OURS_ALONE,
    OURS_BF16,
    PEERS,
    PEERS_DCD,
    PEERS_DCD_BF16,
    PEERS_STATIC,
    PROTOCOL,
)
from .runtimes import FLOAT32, PACKAGES
from .unit import NetworkResult, mean
from .written import DCD, FOLDED

CASE_KEYS = ("task", "network", "size", "batch", "classes", "dtype")
RESULT_KEYS = (
    *("candidate", "group", "runtime", "form", "variant", "layout", "status", "reason", "error"),
    *("p20_us", "p50_us", "p80_us", "mean_us", "wall_p50_us", "rounds", "calls_per_block", "images"),
    *(
        "faults_per_call",
        "preempted",
        "ratio_to_best_static",
        "ratio_to_best_other_static",
        "ratio_to_best_other_dcd",
    ),
    *("peak_mib", "peak_to_static"),
)
ROW_KEYS = (*RUN_KEYS, *PACKAGES, *CASE_KEYS, *RESULT_KEYS)


def rows(result: NetworkResult, run: dict, images: int = 1) -> list[dict]:
    """One row a candidate with every key of ROW_KEYS; without a time, every figure is None."""
    made = []
    bases = {
        "ratio_to_best_static": result.best(STATIC),
        "ratio_to_best_other_static": result.best(PEERS_STATIC),
        "ratio_to_best_other_dcd": result.best(PEERS_DCD),
    }
    for entry in result.entries:
        candidate, timing = entry.candidate, entry.timing
        row = entry_row(ROW_KEYS, run, result.case, entry, images=images)
        row.update({key: getattr(candidate, key, None) for key in ("runtime", "form", "variant")})
        row["dtype"] = getattr(candidate, "precision", FLOAT32)
        if timing:
            row["mean_us"] = mean(timing) * 1e6
            row.update(
                {key: paired_ratio(timing, base.timing) if base else None for key, base in bases.items()}
            )
        row.update(peak_figures(result, candidate.name))
        made.append(row)
    return made


# ---------------------------------------------------------------------------------------------------- bars

OURS_DCD, OURS_STATIC = f"{OURS} {DCD}", f"{OURS} {STATIC}"
OPENVINO_STATIC, OPENVINO_FOLDED = f"{OPENVINO} {STATIC}", f"{OPENVINO} {FOLDED}"


def _figure(numerator: str, denominator: str):
    return lambda result: result.ratio(numerator, denominator)


TO_STATIC = f"{OURS_DCD} ÷ best {STATIC} of any runtime"
TO_OTHER_STATIC = f"{OURS_DCD} ÷ {PEERS_STATIC}"
OVER_FOLDED = f"{OPENVINO_FOLDED} ÷ {OURS_DCD}"
TO_OTHERS = f"{OURS_DCD} ÷ {PEERS_DCD}"
TO_OTHERS_BF16 = f"{OURS_BF16} {DCD} ÷ {PEERS_DCD_BF16}"
OWN_STATIC = f"{OURS_STATIC} ÷ {OPENVINO_STATIC}"
THREADS = f"{OURS_DCD}: one thread ÷ two"
STEP = f"step, paper's form on {OURS} ÷ {STATIC}"
STEP_MEMORY = f"peak memory of a step, {OURS} ÷ {STATIC}"
FIGURES = {
    TO_STATIC: _figure(OURS_DCD, STATIC),
    TO_OTHER_STATIC: _figure(OURS_DCD, PEERS_STATIC),
    OVER_FOLDED: _figure(OPENVINO_FOLDED, OURS_DCD),
    TO_OTHERS: _figure(OURS_DCD, PEERS_DCD),
    TO_OTHERS_BF16: _figure(f"{OURS_BF16} {DCD}", PEERS_DCD_BF16),
    OWN_STATIC: _figure(OURS_STATIC, OPENVINO_STATIC),
    THREADS: _figure(f"{OURS_ALONE} {DCD}", OURS_DCD),
    STEP: _figure(PAPER, STATIC),
    STEP_MEMORY: lambda result: result.memory_ratio(PAPER),
}
HALF, FULL, *RESNETS = NETWORKS
MOBILENETS = (HALF, FULL)
BARS = (
    *(Bar("must", 1.20, True, name, INFERENCE, n, TO_STATIC) for name in MOBILENETS for n in (1, 8)),
    *(Bar("must", 1.20, True, name, INFERENCE, n, TO_OTHER_STATIC) for name in MOBILENETS for n in (1, 8)),
    *(Bar("must", 1.50, False, name, INFERENCE, n, OVER_FOLDED) for name in MOBILENETS for n in (1, 8)),
    *(Bar("must", 1.00, True, name, INFERENCE, n, TO_OTHERS) for name in RESNETS for n in (1, 8)),
    *(Bar("must", 1.70, False, name, INFERENCE, 8, THREADS, threads=2) for name in NETWORKS),
    Bar("must", 1.12, True, HALF, TRAINING, 8, STEP),
    *(Bar("aim", 1.09, True, name, INFERENCE, n, TO_STATIC) for name in MOBILENETS for n in (1, 8)),
    *(Bar("aim", 1.05, True, name, INFERENCE, n, TO_STATIC) for name in RESNETS for n in (1, 8)),
    *(Bar("aim", 1.02, True, name, INFERENCE, n, OWN_STATIC) for name in MOBILENETS for n in (1, 8)),
    *(Bar("aim", 1.00, True, name, INFERENCE, n, TO_OTHERS_BF16) for name in NETWORKS for n in (1, 8)),
)


# -------------------------------------------------------------------------------------------------- tables

COLUMNS = {STATIC: STATIC, DCD: DCD, FOLDED: "folded\nby hand"}


def print_case(console: Console, result: NetworkResult) -> None:
    """All candidates of a case, and for the paper's protocol the means that it reports."""
    print_candidates(console, result)
    if result.case.task != PROTOCOL:
        return
    for runtime in (*PEERS, ACCELERATED, OURS):
        above, below = (result.best(f"{runtime} {form}") for form in (DCD, STATIC))
        below = below or (result.best(f"{PEERS[0]} {STATIC}") if runtime == ACCELERATED else None)
        if above and below:
            slow, fast = mean(above.timing), mean(below.timing)
            console.print(
                f"mean over the images, {runtime}: {STATIC} {1e3 * fast:.2f} ms, {DCD} {1e3 * slow:.2f} ms, "
                f"{100 * (slow / fast - 1):+.0f} %"
            )


def print_summary(console: Console, results: Sequence[NetworkResult]) -> None:
    """A line per case and runtime: the best variants, and what dynamic costs there and everywhere."""
    table = Table(title="ms a call, best variant of each; paired ratios", title_justify="left")
    for column in ("case", "runtime"):
        table.add_column(column, no_wrap=True)
    for column in (*COLUMNS.values(), f"{DCD}\n÷ own {STATIC}", f"{DCD}\n÷ best {STATIC}"):
        table.add_column(column, justify="right")
    for result in results:
        runtimes = dict.fromkeys(getattr(entry.candidate, "runtime", None) for entry in result.entries)
        for runtime in filter(None, runtimes):
            best = {form: result.best(f"{runtime} {form}") for form in COLUMNS}
            if not any(best.values()):
                continue
            dynamic = min(
                (best[form] for form in (DCD, FOLDED) if best[form]),
                key=lambda entry: entry.timing.median,
                default=None,
            )
            ratios = (
                paired_ratio(dynamic.timing, base.timing) if dynamic and base else None
                for base in (best[STATIC], result.best(STATIC))
            )
            table.add_row(
                result.case.name,
                runtime,
                *(milliseconds(entry.timing.median) if entry else "-" for entry in best.values()),
                *(cell(ratio, ".2f") for ratio in ratios),
                style="bold" if runtime == OURS else "dim" if runtime in IN_BF16 else None,
            )
        table.add_section()
    if table.row_count:
        console.print(table)
