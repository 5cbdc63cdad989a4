# SPDX-License-Identifier: BSD-3-Clause
"""The two parts of the demo, and what they print."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from dcd_kernels import info
from dcd_kernels.demo import comparison, digits, photographs, pictures

SHOWN = 8  # digits in the picture of λ and Φ


def run(options: argparse.Namespace) -> int:
    """Both parts, or the one that ``options.only`` names. Returns 0 only if all formulations agree."""
    # a pipe has no width: wide enough for the table, then
    console = Console(width=None if sys.stdout.isatty() else 110)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    agreed = True
    console.print(f"[bold]dcd-kernels demo[/] – {info.one_line()}\n", highlight=False)
    if options.only != "digits":
        agreed = run_photographs(options, console)
    if options.only != "photographs":
        run_digits(options, console)
    console.print(f"Done in {time.perf_counter() - start:.0f} s.", highlight=False)
    if not agreed:
        console.print("[bold red]The outputs do not agree: see the errors above.[/]")
    return 0 if agreed else 1


def wrote(console: Console, path: Path) -> None:
    console.print(f"Picture: {path}\n", highlight=False, soft_wrap=True)


def run_photographs(options: argparse.Namespace, console: Console) -> bool:
    """The comparison; returns whether all formulations agree."""
    taken = photographs.open_all(options.image)
    images = photographs.batch(taken)
    names = ", ".join(name for name, _ in taken)
    console.print(f"[bold]1. DCD-MobileNetV2 ×1.0 on {len(taken)} photographs[/] ({names}; 224 × 224)")
    console.print(
        "The weights are random, fresh from the initialisation (BatchNorm statistics too), so the network "
        "names nothing. All rows are one network with the same weights: only how it is "
        "computed differs.\n",
        highlight=False,
    )
    subject = comparison.make_subject(options.seed, images)
    rows, static, rounds = comparison.measure(subject, options.rounds, console)
    how = f"Times: medians of {rounds} interleaved rounds, the branches that compute λ and Φ included."
    console.print(comparison.table(rows, static))
    agreed = comparison.agree(rows)
    verdict = "agree" if agreed else "DO NOT AGREE"
    console.print(
        f"Outputs {verdict}: an error is ‖y − y₆₄‖ / ‖y₆₄‖ against the reference in float64. {how} Memory: "
        "resident memory at the peak of one forward pass, above weights and input, in a process of its own "
        "with one thread. The static twin has the same layers without λ and Φ.\n",
        highlight=False,
    )
    fused = list(rows[0].milliseconds.values())
    if fused[-1] > fused[0]:
        console.print(
            "[yellow]More threads were slower than one: other programs kept the cores busy, and these times "
            "say little. Run it again on a quiet machine.[/]\n",
            highlight=False,
        )
    path = options.out / "formulations.png"
    title = f"DCD-MobileNetV2 ×1.0, one forward pass over {len(taken)} photographs, random weights"
    note = f"{info.one_line()}. {how}"
    pictures.comparison(path, rows, static, len(comparison.OURS), title, note)
    wrote(console, path)
    return agreed


def run_digits(options: argparse.Namespace, console: Console) -> None:
    """Training beside the static twin, and the picture of λ and Φ."""
    data = digits.load(options.seed)
    console.print("[bold]2. Handwritten digits[/] (scikit-learn's 1,797, 8 × 8, doubled to 16 × 16)")
    console.print(
        f"A small DCD network and its static twin learn from {len(data.train_labels)} of them: the same "
        "weights at the start (λ = 1, Φ = 0), the same batches, the same schedule.",
        highlight=False,
    )
    dynamic, scores = digits.train_twins(data, options.epochs, options.seed, console)
    console.print(digits.score_table(scores))
    console.print(
        f"One split, one seed, {len(data.test_labels)} held-out images: this shows that both networks learn, "
        "and not that one is better than the other.\n",
        highlight=False,
    )
    chosen = digits.one_of_each(data.test_labels, SHOWN)
    layer, lam, phi = digits.coefficients(dynamic, data.test_images[chosen])
    path = options.out / "digits.png"
    pictures.coefficients(
        path,
        data.test_images[chosen, 0].numpy(),
        data.test_labels[chosen].tolist(),
        lam.numpy(),
        phi.numpy(),
        f"What the image changes: λ and Φ of layer {layer} of the trained DCD network, held-out digits",
    )
    wrote(console, path)
