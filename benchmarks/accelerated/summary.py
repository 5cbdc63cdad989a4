# SPDX-License-Identifier: BSD-3-Clause
"""What the README says of accelerated networks: a table, from rows as CSV has them."""

from __future__ import annotations

from ..candidates import STATIC, TRAINING
from ..rows import Row, Rows, best, case_rows
from .networks import ACCELERATED, EVAL, NETWORKS, TITLES, UNPATCHED

CASES = (
    (TRAINING, 8, "a training step, batch 8"),
    (EVAL, 1, "inference, batch 1"),
    (EVAL, 8, "inference, batch 8"),
)
TIME, MEMORY = "ratio_to_best_static", "peak_to_static"
HEADINGS = (
    "released form, accelerated",
    "times as fast as written",
    "time ÷ static twin (as written)",
    "peak memory ÷ static twin (as written)",
)


def table(rows: Rows) -> str:
    """Accelerated networks against the same as written and against their static twins, as Markdown."""
    lines, runs = [], {}
    for network in NETWORKS:
        for task, batch, what in CASES:
            case = case_rows(rows, task, network, batch)
            accelerated, written = best(case, ACCELERATED), best(case, UNPATCHED)
            if not accelerated or not written or not best(case, STATIC):
                continue
            cells = (
                f"{TITLES[network]}, {what}",
                f"**{1 / float(accelerated['ratio_to_best_unpatched']):.2f}**",
                f"{_number(accelerated, TIME)} ({_number(written, TIME)})",
                f"{_number(accelerated, MEMORY)} ({_number(written, MEMORY)})",
            )
            lines.append(f"| {' | '.join(cells)} |")
            runs[accelerated["commit"], accelerated["date"][:10]] = accelerated
    if not lines:
        return "not yet measured"
    head = [f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
    notes = [
        f"- {run['cpu']}, one thread, the faster memory format of each; torch {run['torch']}, commit "
        f"{run['commit'][:12]}, {run['date'][:10]}."
        for run in runs.values()
    ]
    return "\n".join([*head, *lines, "", *notes])


def _number(row: Row, key: str) -> str:
    return f"{float(row[key]):.2f}" if row[key] else "–"
