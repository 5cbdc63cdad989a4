# SPDX-License-Identifier: BSD-3-Clause
"""Interleaved measuring: round robin over the candidates, in a new random order every round.

Every sample is a block of calls of one candidate after one call that is not timed, so each candidate meets
its own operands and its own output as warm as its last call left them, whoever ran before. Ratios are taken
within a round, where both candidates saw the same machine, and their median is what is reported.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def _read_clocks() -> tuple[int, int]:
    return time.perf_counter_ns(), time.process_time_ns()


@dataclass
class Timing:
    """Seconds a call of one candidate, one entry a round, by the wall and by the process's CPU clock."""

    clock: str
    calls_per_block: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults: int = 0

    @property
    def samples(self) -> list[float]:
        return self.cpu if self.clock == "cpu" else self.wall

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[round(share * (len(ordered) - 1))]

    @property
    def faults_per_call(self) -> float:
        return self.faults / (len(self.wall) * self.calls_per_block)

    @property
    def preempted(self) -> float:
        """Share of the blocks in which the wall clock ran over a tenth ahead of the CPU clock."""
        return sum(w > 1.1 * c for w, c in zip(self.wall, self.cpu, strict=True)) / len(self.wall)


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator.samples, denominator.samples, strict=True))


@dataclass(frozen=True)
class Plan:
    """How long to measure. A case stops after `seconds`, but not before `min_rounds`."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 200
    block_seconds: float = 4e-4
    clock: str = "cpu"
    consumer: bool = False
    seed: int = 0


def _with_consumer(call: Callable) -> Callable:
    def read_too():
        result = call()
        (result if isinstance(result, torch.Tensor) else result["output"]).sum()

    return read_too


def _block(call: Callable, timing: Timing) -> None:
    repeat = range(timing.calls_per_block)
    call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = _read_clocks()
    for _ in repeat:
        call()
    wall_end, cpu_end = _read_clocks()
    timing.wall.append((wall_end - wall) * 1e-9 / len(repeat))
    timing.cpu.append((cpu_end - cpu) * 1e-9 / len(repeat))
    timing.faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def _calibrate(call: Callable, plan: Plan) -> int:
    """Calls a block needs to last `block_seconds`; from the fastest of three, against disturbances."""
    call()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter_ns()
        call()
        best = min(best, (time.perf_counter_ns() - start) * 1e-9)
        if best > plan.block_seconds:
            break
    return max(1, min(1000, round(plan.block_seconds / best)))


def measure(calls: dict[str, Callable], plan: Plan) -> dict[str, Timing]:
    """Measure all calls interleaved; every candidate gets the same number of rounds."""
    if plan.consumer:
        calls = {name: _with_consumer(call) for name, call in calls.items()}
    timings = {name: Timing(plan.clock, _calibrate(call, plan)) for name, call in calls.items()}
    order = list(calls)
    shuffle = random.Random(plan.seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + plan.seconds
        for done in range(plan.max_rounds):
            if done >= plan.min_rounds and time.perf_counter() >= end:
                break
            shuffle(order)
            for name in order:
                _block(calls[name], timings[name])
    finally:
        if collecting:
            gc.enable()
    return timings
