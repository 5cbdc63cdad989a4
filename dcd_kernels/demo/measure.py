# SPDX-License-Identifier: BSD-3-Clause
"""Error, time and peak memory of a network's forward pass, one row a formulation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Measurement:
    """What was found for one way of running the network."""

    name: str
    error: float = float("nan")  # ‖y − y₆₄‖ / ‖y₆₄‖ against the reference in float64
    milliseconds: dict[int, float] = field(default_factory=dict)  # threads -> median of a forward pass
    ratio: dict[int, float] = field(
        default_factory=dict
    )  # threads -> median of the ratio to the fused kernels
    peak_bytes: int | None = None  # resident memory at the peak of a forward pass, less that before it


@contextmanager
def threads(count: int):
    """Run the body with ``count`` threads in PyTorch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(output: Tensor, truth: Tensor) -> float:
    """``‖output − truth‖ / ‖truth‖`` in float64."""
    return float((output.double() - truth).norm() / truth.norm())


def interleaved(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    seconds: float,
    on_round: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Milliseconds of ``rounds`` runs of each call, timed in turn; fewer, but at least 3, after ``seconds``.

    One run of each a round, the round starting with another one each time: a machine that slows down or
    speeds up meanwhile does so for all of them alike.
    """
    stop = time.perf_counter() + seconds
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for turn in range(rounds):
        for offset in range(len(calls)):
            index = (turn + offset) % len(calls)
            start = time.perf_counter()
            calls[index]()
            times[index].append(1e3 * (time.perf_counter() - start))
        on_round()
        if turn >= 2 and time.perf_counter() > stop:
            break
    return times


def paired_ratio(times: Sequence[float], yardstick: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round, in which a drift of the machine's speed cancels."""
    return statistics.median(a / b for a, b in zip(times, yardstick, strict=True))
