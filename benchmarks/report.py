# SPDX-License-Identifier: BSD-3-Clause
"""Results as rows (JSON lines and CSV), as tables, and against the bars they have to meet."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .candidates import BMM, FACTORED, FORWARD, GROUPED, NORMALISED, OURS, STATIC, TRAINING
from .runner import Timing, paired_ratio
from .suite import RIGHT, CaseResult, Entry

RUN_KEYS = [
    "date",
    "commit",
    "device",
    "cpu",
    "cores",
    "threads",
    "isa",
    "ours_isa",
    "aten_isa",
    "onednn_limit",
    "backend",
    "clock",
    "malloc",
    "python",
    "torch",
    "glibc",
    "onednn",
    "mkl",
    "dcd_kernels",
]
CASE_KEYS = ["task", "network", "in_channels", "out_channels", "size", "batch", "latent_channels", "dtype"]
RESULT_KEYS = [
    "candidate",
    "group",
    "layout",
    "status",
    "reason",
    "error",
    "p20_us",
    "p50_us",
    "p80_us",
    "wall_p50_us",
    "gflops",
    "rounds",
    "calls_per_block",
    "ratio_to_best_static",
    "faults_per_call",
    "preempted",
    "consumer",
]
ROW_KEYS = (*RUN_KEYS, *CASE_KEYS, *RESULT_KEYS)


def timing_figures(timing: Timing) -> dict:
    """What a row says of the times of a candidate."""
    return {
        "p20_us": timing.quantile(0.2) * 1e6,
        "p50_us": timing.median * 1e6,
        "p80_us": timing.quantile(0.8) * 1e6,
        "wall_p50_us": statistics.median(timing.wall) * 1e6,
        "rounds": len(timing.wall),
        "calls_per_block": timing.calls_per_block,
        "faults_per_call": timing.faults_per_call,
        "preempted": timing.preempted,
    }


def gflops(result: CaseResult, entry: Entry) -> float:
    """Rate at the operations of the static layer: one product forward, three with the gradients."""
    products = 3 if result.task == TRAINING else 1
    return products * result.case.static_flops / entry.timing.median * 1e-9


def entry_row(keys: Sequence[str], run: dict, case: object, entry: Entry, **figures) -> dict:
    """A row with ``keys``: of the run, what ``case`` has by these names, the candidate, its times."""
    row = dict.fromkeys(keys)
    row.update(run)
    row.update({key: getattr(case, key) for key in keys if hasattr(case, key)})
    row.update(
        dtype=getattr(case, "dtype", "float32"),
        candidate=entry.candidate.name,
        group=entry.candidate.group,
        layout=entry.candidate.layout,
        status=entry.status,
        reason=entry.reason,
        error=entry.error,
        **figures,
    )
    if entry.timing:
        row.update(timing_figures(entry.timing))
    return row


def rows(result: CaseResult, run: dict, consumer: bool = False) -> list[dict]:
    """One row a candidate with every key of ROW_KEYS; without a time, every figure is None."""
    static = result.best(STATIC)
    made = []
    for entry in result.entries:
        row = entry_row(ROW_KEYS, run, result.case, entry, task=result.task, consumer=consumer)
        if entry.timing:
            row["gflops"] = gflops(result, entry)
            row["ratio_to_best_static"] = paired_ratio(entry.timing, static.timing) if static else None
        made.append(row)
    return made


def save(all_rows: Sequence[dict], folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Write the rows, which all have the same keys, as <name>.jsonl and <name>.csv; return the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, sheet = folder / f"{name}.jsonl", folder / f"{name}.csv"
    lines.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in all_rows), encoding="utf-8"
    )
    with sheet.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(all_rows[0]))
        writer.writeheader()
        writer.writerows(all_rows)
    return [lines, sheet]


# ---------------------------------------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Limit:
    """What a figure is held to; ``kind`` is 'must' or 'aim'."""

    kind: str
    limit: float
    at_most: bool

    def meets(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {'≤' if self.at_most else '≥'} {self.limit:.2f}"


@dataclass(frozen=True)
class Bar(Limit):
    """A figure to meet: the geometric mean of a paired ratio over all cases; with ``worst`` each one too."""

    task: str
    numerator: str
    denominator: str
    # of float32; of bfloat16 the ways to multiply it, as in dcd_kernels._core.products()
    isas: tuple[str, ...]
    dtype: str = "float32"
    worst: float | None = None

    def meets_all(self, mean: float, worst: float) -> bool:
        limit = dataclasses.replace(self, limit=self.worst) if self.worst is not None else None
        return self.meets(mean) and (limit is None or limit.meets(worst))

    def __str__(self) -> str:
        return super().__str__() + ("" if self.worst is None else f", worst {self.worst:.2f}")

    @property
    def label(self) -> str:
        base = "best static" if self.denominator == STATIC else self.denominator
        return f"{self.task}: {self.numerator} ÷ {base}"


_WIDE = ("native", "avx512")
BARS = (
    Bar("must", 1.00, True, FORWARD, OURS, STATIC, _WIDE, worst=1.20),
    Bar("must", 0.60, True, NORMALISED, OURS, STATIC, _WIDE),
    Bar("must", 1.8, False, FORWARD, GROUPED, OURS, _WIDE),
    Bar("must", 1.4, False, FORWARD, BMM, OURS, _WIDE),
    Bar("must", 1.7, False, FORWARD, FACTORED, OURS, _WIDE),
    Bar("aim", 1.5, False, TRAINING, FACTORED, OURS, _WIDE),
    Bar("must", 1.08, True, FORWARD, OURS, STATIC, ("avx2",)),
    Bar("aim", 0.97, True, FORWARD, OURS, STATIC, _WIDE),
    Bar("aim", 1.0, True, FORWARD, OURS, STATIC, ("amx",), "bfloat16"),
    Bar("aim", 1.0, False, FORWARD, FACTORED, OURS, ("amx",), "bfloat16"),
)


def ratios(results: Sequence[CaseResult], task: str, numerator: str, denominator: str, layout: str = ""):
    """[(ratio, result)] of the cases in which both groups have a time."""
    found = [(r.ratio(numerator, denominator, layout), r) for r in results if r.task == task]
    return [(ratio, result) for ratio, result in found if ratio is not None]


def print_bars(console: Console, results: Sequence[CaseResult], isa: str, complete: bool) -> bool:
    """A line per figure of the task: 'must ≤ 1.10: got …'. Return whether every must is met."""
    all_met = True
    tasks = {result.task for result in results}
    dtypes = {result.case.dtype for result in results}
    bars = [bar for bar in BARS if bar.dtype in dtypes and bar.task in tasks]
    printed = {bar.label for bar in bars if isa in bar.isas}
    for bar in bars:
        applies = isa in bar.isas
        # without a bar at this instruction set a figure is still printed, once
        if not applies and (bar.label in printed or (bar.kind == "aim" and bar.task != FORWARD)):
            continue
        printed.add(bar.label)
        values = ratios(results, bar.task, bar.numerator, bar.denominator)
        head = str(bar) if applies else "no bar at this instruction set"
        if not values:
            console.print(f"{bar.label:<46}{head}: not measured")
            all_met &= bar.kind != "must" or not applies
            continue
        mean = statistics.geometric_mean(value for value, _ in values)
        worst, where = (max if bar.at_most else min)(values, key=lambda pair: pair[0])
        met = bar.meets_all(mean, worst)
        verdict = "" if not applies else "[green]met[/]" if met else "[red]missed[/]"
        if applies and bar.kind == "must":
            all_met &= met
        console.print(
            f"{bar.label:<46}{head}: got [bold]{mean:.3f}[/] {verdict} "
            f"(worst {worst:.3f} at {where.case.name}; {len(values)} cases)",
            soft_wrap=True,
        )
    for task in (FORWARD, TRAINING, NORMALISED):
        for layout in ("nchw", "channels_last"):
            values = ratios(results, task, OURS, STATIC, layout)
            if values:
                mean = statistics.geometric_mean(value for value, _ in values)
                worst, where = max(values, key=lambda pair: pair[0])
                console.print(
                    f"{task}: ours, {layout:<14} ÷ best static of any layout: {mean:.3f} "
                    f"(worst {worst:.3f} at {where.case.name})",
                    soft_wrap=True,
                )
    if not complete:
        console.print(
            "[yellow]only part of the registered cases was measured: the bars are about all of them[/]"
        )
    return all_met


# -------------------------------------------------------------------------------------------------- tables


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _gflops(result: CaseResult, entry: Entry) -> str:
    return f"{gflops(result, entry):.0f}"


def print_case(console: Console, result: CaseResult) -> None:
    """All candidates of one case."""
    case = result.case
    table = Table(
        title=f"{case.name}  L={case.latent_channels}  {case.network}  {result.task}", title_justify="left"
    )
    for column in ("candidate", "p50 µs", "p20", "p80", "GFLOP/s", "÷ best static", "error"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    static = result.best(STATIC)
    fastest = {id(result.best(entry.candidate.group)) for entry in result.entries}
    for entry in result.entries:
        if entry.status != RIGHT:
            table.add_row(entry.candidate.name, f"[red]{entry.status}[/]", "", "", "", "", entry.reason)
            continue
        timing = entry.timing
        table.add_row(
            entry.candidate.name,
            _microseconds(timing.median),
            _microseconds(timing.quantile(0.2)),
            _microseconds(timing.quantile(0.8)),
            _gflops(result, entry),
            f"{paired_ratio(timing, static.timing):.3f}" if static else "-",
            f"{entry.error:.1e}",
            style="bold" if id(entry) in fastest else None,
        )
    console.print(table)


def print_summary(console: Console, results: Sequence[CaseResult], task: str) -> None:
    """A line per case: the best of every group, and the ratios."""
    chosen = [result for result in results if result.task == task]
    if not chosen:
        return
    measured = any(result.best(OURS) for result in chosen)
    table = Table(title=f"{task}: µs a call (best of each group), paired ratios", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("best static", no_wrap=True)
    groups = {FORWARD: (GROUPED, BMM, FACTORED), TRAINING: (FACTORED,), NORMALISED: ()}[task]
    base = OURS if measured else STATIC
    for column in ("µs", "GF/s", *((OURS, "GF/s", "÷ static") if measured else ())):
        table.add_column(column, justify="right")
    for group in groups:
        table.add_column(f"{group.replace(' ', chr(10))}", justify="right")
        table.add_column(f"÷ {base}", justify="right")
    for result in chosen:
        static, our = result.best(STATIC), result.best(OURS)
        cells = [f"{result.case.name}"]
        if static:
            cells += [static.candidate.name.removeprefix("static "), _microseconds(static.timing.median)]
            cells.append(_gflops(result, static))
        else:
            cells += ["-"] * 3
        if measured:
            ratio = result.ratio(OURS, STATIC)
            cells += [_microseconds(our.timing.median), _gflops(result, our)] if our else ["-", "-"]
            cells.append(f"{ratio:.3f}" if ratio else "-")
        for group in groups:
            entry, ratio = result.best(group), result.ratio(group, base)
            cells.append(_microseconds(entry.timing.median) if entry else "-")
            cells.append(f"{ratio:.2f}" if ratio else "-")
        table.add_row(*cells)
    console.print(table)
