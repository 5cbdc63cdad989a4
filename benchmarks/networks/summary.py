# SPDX-License-Identifier: BSD-3-Clause
"""What the README says of whole networks: a table and a chart, from rows as CSV has them."""

from __future__ import annotations

import pathlib

from ..accelerated.networks import NETWORKS, PAPER, TITLES
from ..candidates import STATIC, TRAINING
from ..rows import Row, Rows, best, case_rows
from . import baselines
from .candidates import (
    COMPILED,
    EAGER,
    IN_BF16,
    INFERENCE,
    ONNXRUNTIME,
    OPENVINO,
    OPENVINO_BF16,
    OURS,
    OURS_ALONE,
    OURS_BF16,
    PROTOCOL,
)
from .runtimes import PACKAGES
from .written import DCD, FOLDED

# runtime, the form that is dynamic there, and how it is called
LINES = (
    (EAGER, DCD, EAGER),
    (COMPILED, DCD, "torch.compile, frozen"),
    (ONNXRUNTIME, DCD, ONNXRUNTIME),
    (OPENVINO, DCD, OPENVINO),
    (OPENVINO, FOLDED, f"{OPENVINO}, folded by hand"),
    (OPENVINO_BF16, DCD, f"{OPENVINO}, bfloat16"),
    (OURS, DCD, f"**{OURS}**"),
    (OURS_BF16, DCD, f"**{OURS}, bfloat16**"),
)
BATCHES = (1, 8)


def _milliseconds(row: Row | None, key: str = "p50_us") -> str:
    if row is None:
        return "–"
    value = float(row[key]) / 1e3
    return f"{value:.2f}" if value < 20 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _cell(rows: Rows, runtime: str, form: str) -> str:
    static, dynamic = best(rows, f"{runtime} {STATIC}"), best(rows, f"{runtime} {form}")
    if static is None and dynamic is None:
        return "–"
    ratio = f" ({float(dynamic['ratio_to_best_static']):.2f})" if dynamic else ""
    if form == FOLDED:
        return f"{_milliseconds(dynamic)}{ratio}"
    return f"{_milliseconds(static)} → {_milliseconds(dynamic)}{ratio}"


def table(rows: Rows) -> str:
    """Milliseconds, static → dynamic, on one thread; then threads, training and the paper's protocol."""
    lines = []
    for batch in BATCHES:
        cases = {network: case_rows(rows, INFERENCE, network, batch) for network in NETWORKS}
        body = [
            (title, *(_cell(case, runtime, form) for case in cases.values()))
            for runtime, form, title in LINES
            if any(best(case, f"{runtime} {form}") for case in cases.values())
        ]
        if body:
            lines += ["", f"| batch {batch} | {' | '.join(TITLES.values())} |", "| --- " * 5 + "|"]
            lines += [f"| {' | '.join(cells)} |" for cells in body]
    if not lines:
        return "not yet measured"
    notes = [*_baselines(rows), *_threads(rows), *_training(rows), *_protocol(rows), *_runs(rows)]
    return "\n".join([*lines[1:], "", *notes])


def _runs(rows: Rows) -> list[str]:
    """What each run measured, with what and when; the oldest first."""
    measured = [
        (what or TITLES[network], case[0])
        for what, task, batches, threads in (
            ("", INFERENCE, BATCHES, 1),
            ("two threads", INFERENCE, (8,), 2),
            ("training", TRAINING, (8,), 1),
            ("protocol", PROTOCOL, (1,), 1),
        )
        for network in NETWORKS
        for batch in batches
        if (case := case_rows(rows, task, network, batch, threads))
    ]
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for what, row in sorted(measured, key=lambda pair: pair[1]["date"]):
        key = (
            row["cpu"],
            row["torch"],
            *(row[name] for name in PACKAGES[2:]),
            row["commit"],
            row["date"][:10],
        )
        found.setdefault(key, {})[what] = None
    return [
        f"- {', '.join(what)}: {cpu}; torch {torch}, "
        + ", ".join(f"{name} {version}" for name, version in zip(PACKAGES[2:], versions, strict=True))
        + f"; commit {commit[:12]}, {date}."
        for (cpu, torch, *versions, commit, date), what in found.items()
    ]


def _baselines(rows: Rows) -> list[str]:
    """Other dynamic convolutions, in eager PyTorch, whose weights are sums of several kernels."""
    notes = []
    for network in NETWORKS:
        found = []
        for batch in BATCHES:
            case = case_rows(rows, INFERENCE, network, batch)
            times = [
                f"{expert} {_milliseconds(row)} ms ({float(row['ratio_to_best_static']):.2f})"
                for expert in baselines.EXPERTS
                if (row := best(case, f"{EAGER} {expert}"))
            ]
            found += [f"batch {batch}: {', '.join(times)}"] if times else []
        if found:
            notes.append(f"- {TITLES[network]} by other dynamic convolutions in {EAGER}, {'; '.join(found)}.")
    return notes


def _threads(rows: Rows) -> list[str]:
    found = []
    for network in NETWORKS:
        case = case_rows(rows, INFERENCE, network, 8, threads=2)
        alone, together = best(case, f"{OURS_ALONE} {DCD}"), best(case, f"{OURS} {DCD}")
        if alone and together:
            found.append(f"{float(alone['p50_us']) / float(together['p50_us']):.2f} ({TITLES[network]})")
    return (
        [f"- Ours with two threads at batch 8, times as fast as with one: {', '.join(found)}."]
        if found
        else []
    )


def _training(rows: Rows) -> list[str]:
    found = []
    for network in NETWORKS:
        step = best(case_rows(rows, TRAINING, network, 8), PAPER)
        if step:
            memory = step["peak_to_static"]
            found.append(
                f"{TITLES[network]} {float(step['ratio_to_best_static']):.2f} of the time"
                + (f" and {float(memory):.2f} of the memory" if memory else "")
            )
    text = "- A training step at batch 8 against that of the static network in PyTorch: "
    return [f"{text}{', '.join(found)}."] if found else []


def _protocol(rows: Rows) -> list[str]:
    notes = []
    for network in NETWORKS:
        case = case_rows(rows, PROTOCOL, network, 1)
        found = []
        for runtime in (EAGER, OURS):
            static, dynamic = (best(case, f"{runtime} {form}", "mean_us") for form in (STATIC, DCD))
            if static and dynamic:
                more = 100 * (float(dynamic["mean_us"]) / float(static["mean_us"]) - 1)
                times = f"{_milliseconds(static, 'mean_us')} → {_milliseconds(dynamic, 'mean_us')} ms"
                found.append(f"{runtime} {times} ({more:+.0f} %)")
        if found:
            notes.append(
                f"- {TITLES[network]} by the paper's protocol (Section 5.5), mean over {case[0]['images']} "
                f"images: {', '.join(found)}."
            )
    return notes


def chart(rows: Rows, path: pathlib.Path) -> bool:
    """Draw what DCD costs on every runtime as a PNG; False where there are no rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, dict[tuple[int, str], float]] = {}
    for runtime, form, title in LINES:
        if runtime in IN_BF16:
            continue
        for batch in BATCHES:
            for network in NETWORKS:
                row = best(case_rows(rows, INFERENCE, network, batch), f"{runtime} {form}")
                if row:
                    label = title.strip("*")
                    series.setdefault(label, {})[batch, network] = float(row["ratio_to_best_static"])
    if not series:
        return False
    figure, axes = pyplot.subplots(1, len(BATCHES), figsize=(10, 3.6), sharey=True, layout="constrained")
    width = 0.8 / len(series)
    greys = pyplot.get_cmap("Greys")
    for axis, batch in zip(axes, BATCHES, strict=True):
        for index, (label, values) in enumerate(series.items()):
            colour = "tab:orange" if label == OURS else greys(0.25 + 0.5 * index / len(series))
            places = [place + (index + 0.5) * width - 0.4 for place in range(len(NETWORKS))]
            heights = [values.get((batch, network), 0.0) for network in NETWORKS]
            axis.bar(places, heights, width, label=label, color=colour)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_title(f"batch {batch}, one thread")
        axis.set_xticks(range(len(NETWORKS)), TITLES.values(), fontsize=8)
    axes[0].set_ylabel("DCD ÷ best static of any runtime")
    axes[-1].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True
