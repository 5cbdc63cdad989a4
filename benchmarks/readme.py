# SPDX-License-Identifier: BSD-3-Clause
"""Writes the README's numbers from the rows under results/, and draws its chart.

`python -m benchmarks.readme [--check]`
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import statistics
import sys
from collections.abc import Sequence

from .accelerated import summary as accelerated
from .candidates import BMM, FACTORED, FORWARD, GROUPED, NORMALISED, OURS, STATIC, TRAINING
from .networks import summary
from .rows import case_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START = "<!-- numbers: rows written by benchmarks/ -->"
END = "<!-- end of the numbers -->"
GPU_START = "<!-- gpu numbers: rows written by benchmarks/gpu/ -->"
GPU_END = "<!-- end of the gpu numbers -->"
ACCELERATED_START = "<!-- accelerated numbers: rows written by benchmarks/accelerated/ -->"
ACCELERATED_END = "<!-- end of the accelerated numbers -->"
NETWORK_START = "<!-- network numbers: rows written by benchmarks/networks/ -->"
NETWORK_END = "<!-- end of the network numbers -->"
CHART = RESULTS / "networks.png"

# What is compared: title, task, instruction set asked for, numerator, denominator, dtype.
LINES = (
    ("fused ÷ best static convolution", FORWARD, "native", OURS, STATIC, "float32"),
    ("W_n written out, grouped convolution ÷ fused", FORWARD, "native", GROUPED, OURS, "float32"),
    ("W_n written out, `bmm` ÷ fused", FORWARD, "native", BMM, OURS, "float32"),
    ("factored in eager PyTorch ÷ fused", FORWARD, "native", FACTORED, OURS, "float32"),
    (
        "with BatchNorm and ReLU6: fused ÷ eager conv → BN → ReLU6",
        NORMALISED,
        "native",
        OURS,
        STATIC,
        "float32",
    ),
    (
        "forward + backward: fused ÷ best static convolution",
        TRAINING,
        "native",
        OURS,
        STATIC,
        "float32",
    ),
    (
        "forward + backward: factored in eager PyTorch ÷ fused",
        TRAINING,
        "native",
        FACTORED,
        OURS,
        "float32",
    ),
    ("AVX2 only: fused ÷ best static convolution", FORWARD, "avx2", OURS, STATIC, "float32"),
    ("bfloat16: fused ÷ best static convolution", FORWARD, "native", OURS, STATIC, "bfloat16"),
    ("bfloat16: factored in eager PyTorch ÷ fused", FORWARD, "native", FACTORED, OURS, "bfloat16"),
)


def latest(rows: Sequence[dict], task: str, isa: str, dtype: str = "float32") -> list[dict]:
    """The timed rows of the newest run of a task at an instruction set and in a dtype."""
    found = [
        row
        for row in rows
        if row["task"] == task and row["isa"] == isa and row["dtype"] == dtype and row["p50_us"]
    ]
    newest = max((row["date"] for row in found), default=None)
    return [row for row in found if row["date"] == newest]


def ratios(rows: Sequence[dict], numerator: str, denominator: str) -> list[tuple[float, str]]:
    """(ratio, case) of every case, by the ratios paired with best static; a group is its fastest member."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = (row["in_channels"], row["out_channels"], row["size"], row["batch"])
        best = cases.setdefault(case, {})
        if row["group"] not in best or float(row["p50_us"]) < float(best[row["group"]]["p50_us"]):
            best[row["group"]] = row
    found = []
    for (ci, co, size, batch), best in cases.items():
        if numerator in best and denominator in best:
            above, below = (float(best[group]["ratio_to_best_static"]) for group in (numerator, denominator))
            value = above / below
            found.append((value, f"{ci}→{co}@{size}, batch {batch}"))
    return found


def table(rows: Sequence[dict]) -> str:
    """The README's table, as Markdown."""
    lines = ["| ratio of times | geometric mean | best | worst |", "| --- | --- | --- | --- |"]
    runs: dict[str, dict] = {}
    tasks: dict[str, list[str]] = {}
    for title, task, isa, numerator, denominator, dtype in LINES:
        measured = latest(rows, task, isa, dtype)
        values = ratios(measured, numerator, denominator)
        if not values:
            continue
        run = runs.setdefault(measured[0]["date"], measured[0])
        if task not in tasks.setdefault(run["date"], []):
            tasks[run["date"]].append(task)
        mean = statistics.geometric_mean(value for value, _ in values)
        low, high = min(values), max(values)
        best, worst = (low, high) if numerator == OURS else (high, low)
        cells = (title, f"**{mean:.2f}**", *(f"{value:.2f} ({case})" for value, case in (best, worst)))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for run in (runs[date] for date in sorted(runs)):
        kernels = f"kernels for {run['ours_isa']}" + (
            ", everything limited to it" if run["isa"] != "native" else ""
        )
        lines.append(
            f"- {', '.join(tasks[run['date']]).capitalize()}: {run['cpu']}, one thread, {kernels}; "
            f"torch {run['torch']}, commit {run['commit'][:12]}, {run['date'][:10]}."
        )
    return "\n".join(lines)


def gpu_table(rows: Sequence[dict]) -> str:
    """What the rows of a GPU say about the bars, as Markdown; the newest device and commit stands for all."""
    from .gpu import report

    run = max((row for row in rows if row["device"] != "cpu"), key=lambda row: row["date"], default=None)
    if run is None:
        return report.NOT_YET
    own = [row for row in rows if (row["device"], row["commit"]) == (run["device"], run["commit"])]
    lines = ["| figure | bar | geometric mean | worst | |", "| --- | --- | --- | --- | --- |"]
    for bar in report.BARS:
        verdict, mean, worst, where = bar.verdict(own)
        sign = "≤" if bar.at_most else "≥"
        figures = ("–", "–") if mean is None else (f"**{mean:.2f}**", f"{worst:.2f} ({where})")
        lines.append(
            f"| {bar.label} | {bar.kind} {sign} {bar.limit:.2f} | {' | '.join(figures)} | {verdict} |"
        )
    lines += [
        "",
        f"- {run['device']}, driver {run['driver']}, torch {run['torch']}, Triton {run['triton']}, commit "
        f"{run['commit'][:12]}, {run['date'][:10]}; a copy reaches {float(run['copy_gbs']):.0f} GB/s, read "
        f"and written, a bf16 product {float(run['matmul_tflops']):.0f} TFLOP/s.",
    ]
    return "\n".join(lines)


def network_section(rows: Sequence[dict]) -> str:
    """The table of whole networks, and the chart where there is anything to draw."""
    text = summary.table(rows)
    if not any(case_rows(rows, "inference", name, 1) for name in summary.NETWORKS):
        return text
    chart = CHART.relative_to(ROOT).as_posix()
    return f"![what DCD costs on every runtime]({chart})\n\n{text}"


def replaced(text: str, start: str, end: str, table: str) -> str:
    """`text` with what stands between two marker lines replaced."""
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{table}\n{end}{after}"


def read(pattern: str) -> list[dict]:
    """All rows of the result files that match."""
    rows = []
    for path in sorted(RESULTS.glob(pattern)):
        with path.open(newline="", encoding="utf-8") as stream:
            rows.extend(csv.DictReader(stream))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README differs")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    wanted = replaced(text, START, END, table(read("pointwise-*.csv")))
    wanted = replaced(wanted, GPU_START, GPU_END, gpu_table(read("gpu-*.csv")))
    wanted = replaced(
        wanted, ACCELERATED_START, ACCELERATED_END, accelerated.table(read("accelerated-*.csv"))
    )
    networks = read("networks-*.csv")
    wanted = replaced(wanted, NETWORK_START, NETWORK_END, network_section(networks))
    if options.check:
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    try:
        summary.chart(networks, CHART)
    except ImportError as error:
        print(f"the chart stays as it is: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
