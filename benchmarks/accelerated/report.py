# SPDX-License-Identifier: BSD-3-Clause
"""Rows, tables and bars of accelerated networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..candidates import STATIC, TRAINING
from ..report import RUN_KEYS, Limit, entry_row
from ..runner import paired_ratio
from ..suite import RIGHT
from .networks import ACCELERATED, EVAL, UNPATCHED, WIDTH
from .unit import NetworkResult

CASE_KEYS = ("task", "network", "size", "batch", "classes", "dtype")
RESULT_KEYS = (
    *("candidate", "group", "layout", "status", "reason", "error"),
    *(
        "p20_us",
        "p50_us",
        "p80_us",
        "wall_p50_us",
        "rounds",
        "calls_per_block",
        "faults_per_call",
        "preempted",
    ),
    *("ratio_to_best_static", "ratio_to_best_unpatched", "peak_mib", "peak_to_static"),
    *("dynamic_layers", "layers_taken", "operators"),
)
ROW_KEYS = (*RUN_KEYS, *CASE_KEYS, *RESULT_KEYS)
MEBI = 2**20


def rows(result: NetworkResult, run: dict) -> list[dict]:
    """One row a candidate with every key of ROW_KEYS; without a time, every figure is None."""
    case, made = result.case, []
    bases = {
        "ratio_to_best_static": result.best(STATIC),
        "ratio_to_best_unpatched": result.best(UNPATCHED),
    }
    for entry in result.entries:
        candidate, timing = entry.candidate, entry.timing
        row = entry_row(ROW_KEYS, run, case, entry)
        if candidate.group == ACCELERATED:
            taken = result.taken
            row.update(dynamic_layers=taken.layers, layers_taken=taken.taken, operators=taken.operators)
        if timing:
            row.update(
                {key: paired_ratio(timing, base.timing) if base else None for key, base in bases.items()}
            )
        row.update(peak_figures(result, candidate.name))
        made.append(row)
    return made


def peak_figures(result: NetworkResult, candidate: str) -> dict:
    """What a row says of the memory of a candidate, if that was measured."""
    peak, static = result.peaks.get(candidate), result.peak(STATIC)
    if peak is None:
        return {}
    return {"peak_mib": peak / MEBI, "peak_to_static": peak / static if static else None}


# ---------------------------------------------------------------------------------------------------- bars


def _ratio(numerator: str, denominator: str) -> Callable[[NetworkResult], float | None]:
    return lambda result: result.ratio(numerator, denominator)


SPEEDUP = f"{UNPATCHED} ÷ {ACCELERATED}"
TO_STATIC = f"{ACCELERATED} ÷ {STATIC}"
MEMORY = f"peak memory, {ACCELERATED} ÷ {STATIC}"
FIGURES: dict[str, Callable[[NetworkResult], float | None]] = {
    SPEEDUP: _ratio(UNPATCHED, ACCELERATED),
    TO_STATIC: _ratio(ACCELERATED, STATIC),
    MEMORY: lambda result: result.memory_ratio(ACCELERATED),
}


BAR_SIZE = 224


@dataclass(frozen=True)
class Bar(Limit):
    """A figure of one case to meet, at 224 × 224, with ``threads``."""

    network: str
    task: str
    batch: int
    figure: str
    threads: int = 1

    def is_about(self, result: NetworkResult, threads: int) -> bool:
        case = result.case
        about = (self.network, self.task, self.batch, BAR_SIZE, self.threads)
        return (case.network, case.task, case.batch, case.size, threads) == about


HALF = f"{WIDTH}0.5"
BARS = (
    Bar("must", 1.4, False, HALF, TRAINING, 8, SPEEDUP),
    Bar("must", 1.7, False, HALF, EVAL, 1, SPEEDUP),
    Bar("aim", 1.12, True, HALF, TRAINING, 8, TO_STATIC),
    Bar("aim", 1.10, True, HALF, TRAINING, 8, MEMORY),
    Bar("aim", 1.15, True, "resnet18", TRAINING, 8, TO_STATIC),
    Bar("aim", 1.15, True, "resnet50", TRAINING, 8, TO_STATIC),
)


def print_bars(
    console: Console,
    results: Sequence[NetworkResult],
    threads: int,
    bars: Sequence[Bar] = BARS,
    figures: dict[str, Callable[[NetworkResult], float | None]] = FIGURES,
) -> bool:
    """A line per bar about a case that ran. Return whether every must among them is met."""
    table = Table(title="bars", title_justify="left")
    for column in ("", "case", "figure", "bar", "got", ""):
        table.add_column(column, justify="right" if column in ("bar", "got") else "left")
    all_met = True
    for bar in bars:
        for result in results:
            if not bar.is_about(result, threads):
                continue
            value = figures[bar.figure](result)
            met = value is not None and bar.meets(value)
            all_met &= met or bar.kind != "must"
            table.add_row(
                bar.kind.upper() if bar.kind == "must" else bar.kind,
                f"{bar.network} {bar.task}, batch {bar.batch}",
                bar.figure,
                str(bar).removeprefix(bar.kind).strip(),
                "-" if value is None else f"{value:.3f}",
                "[green]met[/]" if met else "not measured" if value is None else "[red]missed[/]",
                style="bold" if bar.kind == "must" else None,
            )
    if table.row_count:
        console.print(table)
    else:
        console.print(
            f"no bar is about these cases: bars are at {BAR_SIZE} × {BAR_SIZE}, mostly on one thread"
        )
    return all_met


# -------------------------------------------------------------------------------------------------- tables


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{1 if seconds > 0.02 else 2}f}"


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_candidates(console: Console, result: NetworkResult) -> None:
    """All candidates of one case, the fastest of each group in bold."""
    table = Table(title=result.case.name, title_justify="left")
    for column in ("candidate", "p50 ms", "p20", "p80", f"÷ {STATIC}", "error", "peak MiB", f"÷ {STATIC}"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    static = result.best(STATIC)
    fastest = {id(result.best(entry.candidate.group)) for entry in result.entries}
    peak_of_static = result.peak(STATIC)
    for entry in result.entries:
        name = entry.candidate.name
        if entry.status != RIGHT:
            table.add_row(name, f"[red]{entry.status}[/]")
            continue
        timing, peak = entry.timing, result.peaks.get(name)
        table.add_row(
            name,
            *(
                f"{1e3 * seconds:.{1 if seconds > 0.02 else 2}f}"
                for seconds in (timing.median, *map(timing.quantile, (0.2, 0.8)))
            ),
            cell(paired_ratio(timing, static.timing) if static else None, ".3f"),
            cell(entry.error, ".1e"),
            cell(peak and peak / MEBI, ".1f"),
            cell(peak / peak_of_static if peak and peak_of_static else None, ".3f"),
            style="bold" if id(entry) in fastest else None,
        )
    console.print(table)


def print_case(console: Console, result: NetworkResult) -> None:
    """All candidates of one case, and what the dynamic layers call."""
    print_candidates(console, result)
    taken = result.taken
    console.print(
        f"{taken.taken} of {taken.layers} dynamic layers taken; one step calls {taken.operators}",
        soft_wrap=True,
    )


def print_summary(console: Console, results: Sequence[NetworkResult]) -> None:
    """A line per case: the ratios of the fastest layouts."""
    table = Table(title="fastest layout of each, paired ratios", title_justify="left")
    table.add_column("case", no_wrap=True)
    columns = {
        f"{UNPATCHED}\n÷ {STATIC}": _ratio(UNPATCHED, STATIC),
        f"{ACCELERATED}\n÷ {STATIC}": FIGURES[TO_STATIC],
        f"{UNPATCHED}\n÷ {ACCELERATED}": FIGURES[SPEEDUP],
        f"peak memory,\n{UNPATCHED} ÷ {STATIC}": lambda result: result.memory_ratio(UNPATCHED),
        f"peak memory,\n{ACCELERATED} ÷ {STATIC}": FIGURES[MEMORY],
    }
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(result.case.name, *(cell(figure(result), ".3f") for figure in columns.values()))
    console.print(table)
