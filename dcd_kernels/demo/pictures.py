# SPDX-License-Identifier: BSD-3-Clause
"""The pictures the demo writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: the demo has to run where there is no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from dcd_kernels.demo.measure import Measurement

FUSED, OTHER, STATIC = "#0b6e4f", "#9aa5b1", "#c2410c"


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    static: float,
    digits: int,
    ours: int,
) -> None:
    """Horizontal bars, ``ours`` first, each with its label behind it; the static twin as a line."""
    places = range(len(names))
    axes.barh(places, values, color=[*[FUSED] * ours, *[OTHER] * (len(names) - ours)], height=0.62)
    axes.axvline(static, color=STATIC, linestyle="--", linewidth=1.2)
    axes.text(static, -0.58, f" static twin {static:.{digits}f}", color=STATIC, fontsize=8.5)
    reach = 1.45 * max(*values, static)
    for place, value, label in zip(places, values, labels, strict=True):
        # a label that would lie across the line starts behind it
        start = static if value <= static < value + 0.3 * reach else value
        axes.text(start, place, f" {label}", va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.85)
    axes.set_xlim(0, reach)
    axes.spines[["top", "right"]].set_visible(False)


def comparison(
    path: Path, rows: Sequence[Measurement], static: Measurement, ours: int, title: str, note: str
) -> None:
    """Time at each thread count and, if measured, peak memory of every formulation, side by side.

    Args:
        path: the PNG to write.
        rows: the formulations, the fused kernels first.
        static: the static twin, drawn as a line.
        ours: how many of the first rows are computed by this package, for their colour.
        title: above everything.
        note: how it was measured, below everything.
    """
    names = [row.name for row in rows]
    counts = list(rows[0].milliseconds)
    measured = static.peak_bytes is not None
    figure, panels = plt.subplots(
        1,
        len(counts) + measured,
        figsize=(4.5 * (len(counts) + measured), 3.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, count in zip(panels[0], counts, strict=False):
        values = [row.milliseconds[count] for row in rows]
        labels = [f"{row.milliseconds[count]:.0f} ms (×{row.ratio[count]:.2f})" for row in rows]
        bars(axes, names, values, labels, static.milliseconds[count], 0, ours)
        axes.set_xlabel("milliseconds a batch (× fused)")
        axes.set_title(f"Time, {count} thread{'s' if count > 1 else ''}", fontsize=11)
    if measured:
        axes = panels[0, -1]
        values = [row.peak_bytes / 2**20 for row in rows]
        labels = [f"{value:.1f} MiB" for value in values]
        bars(axes, names, values, labels, static.peak_bytes / 2**20, 1, ours)
        axes.set_xlabel("MiB above weights and input")
        axes.set_title("Peak extra memory, 1 thread", fontsize=11)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.supxlabel(note, fontsize=8.5, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def coefficients(
    path: Path,
    images: np.ndarray,
    labels: Sequence[int],
    lam: np.ndarray,
    phi: np.ndarray,
    title: str,
) -> None:
    """One column an image: the image, its λ, its Φ, and Φ less its mean over the images shown.

    Args:
        images: ``(n, H, W)``.
        labels: the true classes.
        lam: ``(n, Co)``.
        phi: ``(n, L, L)``; each row of maps has one colour scale, symmetric about 0.
        title: above everything.
    """
    count, channels = lam.shape
    figure, grid = plt.subplots(
        4,
        count,
        figsize=(1.75 * count + 1.6, 7.6),
        height_ratios=(1, 1, 1, 1),
        layout="constrained",
    )
    own = phi - phi.mean(axis=0, keepdims=True)
    maps = []
    for column in range(count):
        digit, bar, whole, part = grid[:, column]
        digit.imshow(images[column], cmap="gray_r")
        digit.set_title(f"a {labels[column]}", fontsize=11)
        bar.bar(np.arange(channels), lam[column] - 1, bottom=1, width=1.0, color=FUSED)
        bar.axhline(1, color="#555555", linewidth=0.6)
        reach = 1.08 * np.abs(lam - 1).max() or 1.0
        bar.set_ylim(1 - reach, 1 + reach)
        bar.set_xticks([0, channels - 1], ["1", f"{channels}"], fontsize=8)
        bar.spines[["top", "right"]].set_visible(False)
        bar.tick_params(axis="y", labelsize=8, labelleft=column == 0)
        maps = [
            axes.imshow(values[column], cmap="RdBu_r", vmin=-limit, vmax=limit)
            for axes, values, limit in (
                (whole, phi, np.abs(phi).max()),
                (part, own, np.abs(own).max()),
            )
        ]
        for axes in (digit, whole, part):
            axes.set_xticks([])
            axes.set_yticks([])
    latent = phi.shape[-1]
    for axes, text in zip(
        grid[:, 0],
        (
            "image",
            "λ, one bar a channel",
            f"Φ ({latent} × {latent})",
            "Φ less its mean\nover these images",
        ),
        strict=True,
    ):
        axes.set_ylabel(text, fontsize=10)
    for row, drawn in zip((2, 3), maps, strict=True):
        figure.colorbar(drawn, ax=grid[row, :], fraction=0.04, pad=0.01)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=130)
    plt.close(figure)
