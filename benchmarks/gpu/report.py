# SPDX-License-Identifier: BSD-3-Clause
"""Rows of the GPU benchmarks, the file they are appended to, and what they say about the bars.

Everything printed here is computed from rows, so that runs that went on where others stopped read alike.
"""

from __future__ import annotations

import csv
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..candidates import FORWARD, OURS, STATIC, TRAINING
from .candidates import BMM, COMPILED, COPY, NORM_EAGER, NORMALISED, RELEASED, RELEASED_COMPILED

NETWORK_TRAINING, NETWORK_INFERENCE = "network training", "network inference"
RUN_KEYS = (
    *("date", "commit", "device", "capability", "driver", "python", "torch", "cuda", "cudnn", "triton"),
    *("dcd_kernels", "backend", "copy_gbs", "matmul_tflops"),
)
CASE_KEYS = ("task", "network", "in_channels", "out_channels", "size", "batch", "latent_channels", "dtype")
RESULT_KEYS = (
    *("candidate", "group", "layout", "status", "reason", "error", "clock", "rounds", "sets"),
    *("p20_us", "p50_us", "p80_us", "ratio_to_ours", "ratio_to_best_static"),
    *("bytes_floor_us", "flops_floor_us", "copy_share", "tflops", "peak_mib"),
)
ROW_KEYS = (*RUN_KEYS, *CASE_KEYS, *RESULT_KEYS)
UNIT_KEYS = ("task", "network", "in_channels", "out_channels", "size", "batch")
NOT_YET = "not yet run on hardware"
LARGE_US = 40.0  # floors from here on are held to the copy bandwidth, smaller ones to a copy's time

Row = dict[str, str]


def unit_of(row: dict) -> tuple[str, ...]:
    """What is measured together and resumed together."""
    return tuple(str(row[key]) for key in UNIT_KEYS)


def read(path: pathlib.Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(path: pathlib.Path, rows: Sequence[dict]) -> list[Row]:
    """Add the rows of one unit; return them as they will be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    texts = [{key: _text(row.get(key)) for key in ROW_KEYS} for row in rows]
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROW_KEYS)
        if fresh:
            writer.writeheader()
        writer.writerows(texts)
    return texts


def _text(value) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------- from rows


def case_name(row: Row) -> str:
    shape = f"{row['in_channels']}→{row['out_channels']}@{row['size']}"
    name = shape if row["in_channels"] else row["network"]
    return f"{name} batch {row['batch']}"


def units(rows: Sequence[Row], *tasks: str) -> list[list[Row]]:
    """The timed rows of each unit of these tasks, in the order of the file."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["task"] in tasks and row["p50_us"]:
            found.setdefault(unit_of(row), []).append(row)
    return list(found.values())


def best(unit: Sequence[Row], group: str, layout: str = "") -> Row | None:
    """The fastest row of a group, of one layout if given."""
    members = [row for row in unit if row["group"] == group and layout in ("", row["layout"])]
    return min(members, key=lambda row: float(row["p50_us"]), default=None)


def over_ours(unit: Sequence[Row], group: str) -> float | None:
    """Time of the best of a group over that of ours, paired; ours is the fastest of its own layouts."""
    row = best(unit, group)
    return float(row["ratio_to_ours"]) if row and row["ratio_to_ours"] else None


def ours_over(unit: Sequence[Row], group: str) -> float | None:
    ratio = over_ours(unit, group)
    return 1 / ratio if ratio else None


def copy_share(unit: Sequence[Row]) -> float | None:
    """Share of the copy bandwidth that ours reaches, where the static floor is long enough to tell."""
    row = best(unit, OURS)
    return float(row["copy_share"]) if row and floor(row) >= LARGE_US and row["copy_share"] else None


def over_a_copy(unit: Sequence[Row]) -> float | None:
    row = best(unit, OURS)
    return ours_over(unit, COPY) if row and floor(row) < LARGE_US else None


def memory(unit: Sequence[Row]) -> float | None:
    """Peak memory of ours over that of the best static candidate in the same layout."""
    pairs = [
        float(mine["peak_mib"]) / float(peer["peak_mib"])
        for layout in {row["layout"] for row in unit}
        if (mine := best(unit, OURS, layout)) and (peer := best(unit, STATIC, layout))
        if mine["peak_mib"] and peer["peak_mib"]
    ]
    return max(pairs, default=None)


def floor(row: Row) -> float:
    return max(float(row["bytes_floor_us"] or 0), float(row["flops_floor_us"] or 0))


@dataclass(frozen=True)
class Bar:
    """A figure to meet over all units of some tasks: their geometric mean, or each of them."""

    kind: str
    label: str
    tasks: tuple[str, ...]
    figure: object
    limit: float
    at_most: bool = True
    each: bool = False

    def values(self, rows: Sequence[Row]) -> list[tuple[float, str]]:
        found = [(self.figure(unit), case_name(unit[0])) for unit in units(rows, *self.tasks)]
        return [(value, name) for value, name in found if value is not None]

    def verdict(self, rows: Sequence[Row]) -> tuple[str, float | None, float | None, str]:
        """('met', 'missed' or 'not yet run on hardware', geometric mean, worst, the worst's case)."""
        values = self.values(rows)
        if not values:
            return NOT_YET, None, None, ""
        mean = statistics.geometric_mean(value for value, _ in values)
        worst, where = (max if self.at_most else min)(values)
        held = worst if self.each else mean
        met = held <= self.limit if self.at_most else held >= self.limit
        return "met" if met else "missed", mean, worst, where


def _against(group: str, ours_above: bool):
    return lambda unit: (ours_over if ours_above else over_ours)(unit, group)


BARS = (
    Bar("must", "forward: ours ÷ best static", (FORWARD,), _against(STATIC, True), 1.05),
    Bar("must", "forward: ours ÷ best static, worst", (FORWARD,), _against(STATIC, True), 1.30, each=True),
    Bar("must", "with BN + ReLU6: ours ÷ eager", (NORMALISED,), _against(NORM_EAGER, True), 0.6),
    Bar("must", "released eager ÷ ours", (FORWARD,), _against(RELEASED, False), 3.0, at_most=False),
    Bar(
        "must", "released max-autotune ÷ ours", (COMPILED,), _against(RELEASED_COMPILED, False), 1.5,
        at_most=False,
    ),
    Bar("must", "materialised bmm ÷ ours", (FORWARD,), _against(BMM, False), 1.8, at_most=False),
    Bar("must", "forward + backward: ours ÷ best static", (TRAINING,), _against(STATIC, True), 1.25),
    Bar("must", "peak memory of a training step ÷ static", (NETWORK_TRAINING,), memory, 1.10),
    Bar("aim", "share of copy bandwidth, floor ≥ 40 µs", (FORWARD,), copy_share, 0.80, at_most=False),
    Bar("aim", "ours ÷ copy of the bytes, floor < 40 µs", (FORWARD,), over_a_copy, 1.3),
    Bar("aim", "network, training step: DCD ÷ static", (NETWORK_TRAINING,), _against(STATIC, True), 1.25),
    Bar("aim", "network, inference: DCD ÷ static", (NETWORK_INFERENCE,), _against(STATIC, True), 1.15),
)  # fmt: skip


def bars_table(rows: Sequence[Row]) -> str:
    """A line a bar: what it asks, the geometric mean, the worst case, whether it is met."""
    lines = [f"{'':<5}{'':<42}{'bar':>8}{'mean':>8}{'worst':>8}"]
    for bar in BARS:
        verdict, mean, worst, where = bar.verdict(rows)
        sign = "≤" if bar.at_most else "≥"
        figures = f"{mean:8.3f}{worst:8.3f}" if mean is not None else f"{'-':>8}{'-':>8}"
        count = f", {len(bar.values(rows))} cases, worst {where}" if where else ""
        lines.append(f"{bar.kind:<5}{bar.label:<42}{f'{sign} {bar.limit:.2f}':>8}{figures}  {verdict}{count}")
    return "\n".join(lines)


def cases_table(rows: Sequence[Row]) -> str:
    """A line a case: floors, static, ours in both layouts, and the others over ours."""
    lines = []
    for task in (FORWARD, TRAINING, NORMALISED, COMPILED, NETWORK_TRAINING, NETWORK_INFERENCE):
        found = units(rows, task)
        if not found:
            continue
        groups = list(dict.fromkeys(row["group"] for unit in found for row in unit if row["group"] != OURS))
        lines.append(f"{task}: µs, and the best of the others ÷ the best of ours")
        head = f"  {'case':<26}{'floor':>9}{'ours nchw':>11}{'ours last':>11}"
        lines.append(head + "".join(f"{group[:22]:>24}" for group in groups))
        for unit in found:
            cells = [f"{floor(unit[0]):9.1f}"]
            for layout in ("nchw", "channels_last"):
                row = best(unit, OURS, layout)
                cells.append(f"{float(row['p50_us']):11.1f}" if row else f"{'-':>11}")
            for group in groups:
                row, ratio = best(unit, group), over_ours(unit, group)
                text = f"{float(row['p50_us']):.1f}" if row else "-"
                cells.append(f"{text + (f' ({ratio:.2f})' if ratio else ''):>24}")
            lines.append(f"  {case_name(unit[0]):<26}" + "".join(cells))
    return "\n".join(lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """What has no time, and why."""
    return [
        f"{row['status']}: {row['candidate']}, {row['task']}, {case_name(row)}: {row['reason']}"
        for row in rows
        if row["status"] not in ("right", "ceiling")
    ]
