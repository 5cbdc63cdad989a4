# SPDX-License-Identifier: BSD-3-Clause
"""Photographs through DCD-MobileNetV2 ×1.0: one network computed in six ways, and its static twin."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dcd_kernels.backends.selection import use_backend
from dcd_kernels.demo import formulations, memory
from dcd_kernels.demo.measure import Measurement, interleaved, paired_ratio, relative_error, threads
from dcd_kernels.inference import optimize_for_inference
from dcd_kernels.models import mobilenet_v2

FUSED, OPTIMISED, REFERENCE, STATIC = "fused kernels", "optimised, one call", "reference", "static twin"
PLAIN: dict[str, formulations.Formulation] = {
    "materialised, grouped": formulations.grouped_convolution,
    "materialised, bmm": formulations.batched_product,
    "factored eager": formulations.factored,
}
NAMES = (FUSED, OPTIMISED, REFERENCE, *PLAIN)
OURS = (FUSED, OPTIMISED)

# A pass takes 20 to 100 ms; on a machine that is busy with other things it can take ten times that.
SECONDS_OF_TIMING = 30.0


@dataclass
class Subject:
    """What is run: two networks in eval mode, and a batch ``(n, 3, H, W)``."""

    network: nn.Module
    static: nn.Module
    images: Tensor


def make_subject(seed: int, images: Tensor) -> Subject:
    """A fresh DCD-MobileNetV2 ×1.0 and its static twin, which has the same static layers and no others."""
    torch.manual_seed(seed)
    static = mobilenet_v2(1.0, pointwise="static", classifier="static")
    return Subject(mobilenet_v2(1.0).eval(), static.eval(), images)


def on_backend(name: str, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A call of ``network`` on the backend ``name``."""

    def call(images: Tensor) -> Tensor:
        with use_backend(name):
            return network(images)

    return call


def calls(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way of computing, by name; each takes the images."""
    return {
        FUSED: on_backend("auto", subject.network),
        OPTIMISED: optimize_for_inference(subject.network),
        REFERENCE: on_backend("reference", subject.network),
        **{name: formulations.rewritten(subject.network, plain) for name, plain in PLAIN.items()},
        STATIC: subject.static,
    }


def true_output(subject: Subject) -> Tensor:
    """The dynamic network's output by the reference in float64."""
    network = copy.deepcopy(subject.network).double()
    return on_backend("reference", network)(subject.images.double())


def agree(rows: list[Measurement]) -> bool:
    """Whether every formulation is as near to the float64 truth as single precision is entitled to.

    The yardstick is the reference's own error in float32, which is what rounding adds up to through fifty
    layers: four times that, and never more than 1e-4.
    """
    own = next(row.error for row in rows if row.name == REFERENCE)
    return all(row.error <= min(4 * own, 1e-4) for row in rows)


@torch.inference_mode()
def measure(subject: Subject, rounds: int, console: Console) -> tuple[list[Measurement], Measurement, int]:
    """Errors first, then times at one thread and at the default number, then memory.

    Returns:
        The formulations, the fused kernels first; the static twin; the number of rounds, which is below
        ``rounds`` where they would have taken longer than ``SECONDS_OF_TIMING``.
    """
    ways = calls(subject)
    truth = true_output(subject)
    rows = [Measurement(name, error=relative_error(ways[name](subject.images), truth)) for name in NAMES]
    static = Measurement(STATIC)
    everything = [*rows, static]
    done = rounds
    with Progress(console=console, transient=True) as progress:
        counts = sorted({1, torch.get_num_threads()})
        for count in counts:
            task = progress.add_task(f"  timing, {count} thread{'s' * (count > 1)}", total=rounds)
            timed = [lambda way=ways[row.name]: way(subject.images) for row in everything]
            with threads(count):
                times = interleaved(
                    timed, rounds, SECONDS_OF_TIMING, lambda task=task: progress.advance(task)
                )
            done = min(done, len(times[0]))
            for row, samples in zip(everything, times, strict=True):
                row.milliseconds[count] = statistics.median(samples)
                row.ratio[count] = paired_ratio(samples, times[0])
        if memory.can_measure():
            task = progress.add_task("  memory, a process each", total=len(everything))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "subject.pt"
                torch.save(subject, file)
                for row in everything:
                    row.peak_bytes = memory.peak_of(file, row.name)
                    progress.advance(task)
    return rows, static, done


def table(rows: list[Measurement], static: Measurement) -> Table:
    """One row a formulation, the static twin below a line."""
    made = Table(title="One forward pass over the batch", title_justify="left")
    made.add_column("computed by", no_wrap=True)
    made.add_column("error", justify="right")
    for count in rows[0].milliseconds:
        made.add_column(f"{count} thread{'s' * (count > 1)}", justify="right")
        made.add_column("÷ fused", justify="right")
    made.add_column("peak memory", justify="right")
    for row in (*rows, static):
        cells = [row.name, f"{row.error:.1e}" if row is not static else "–"]
        for count, milliseconds in row.milliseconds.items():
            cells += [f"{milliseconds:.1f} ms", f"{row.ratio[count]:.2f}"]
        cells.append("not measured" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB")
        made.add_row(*cells, style="bold green" if row.name in OURS else None, end_section=row is rows[-1])
    return made
