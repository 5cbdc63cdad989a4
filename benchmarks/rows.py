# SPDX-License-Identifier: BSD-3-Clause
"""Finding rows of networks again, as the committed CSV files have them."""

from __future__ import annotations

from collections.abc import Sequence

Row = dict[str, str]
Rows = Sequence[Row]


def case_rows(rows: Rows, task: str, network: str, batch: int, threads: int = 1) -> list[Row]:
    """The timed rows of one case at 224 × 224, of its newest run."""
    wanted = (task, network, str(batch), str(threads), "224")
    found = [
        row
        for row in rows
        if tuple(row[key] for key in ("task", "network", "batch", "threads", "size")) == wanted
        and row["p50_us"]
    ]
    newest = max((row["date"] for row in found), default=None)
    return [row for row in found if row["date"] == newest]


def best(rows: Rows, group: str, key: str = "p50_us") -> Row | None:
    """The fastest candidate of a group."""
    found = [row for row in rows if row["group"] == group]
    return min(found, key=lambda row: float(row[key]), default=None)
