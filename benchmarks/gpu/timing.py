# SPDX-License-Identifier: BSD-3-Clause
"""Device time of calls: graph replays where a call can be captured, else calls one by one, between events.

A block is one call for each set of operands, all outputs kept until its end, so that outputs are rotated as
the inputs are. Candidates take turns, in a new random order each round; ratios are taken within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

GRAPH, EVENTS, HOST = "graph", "events", "host"


@dataclass
class Samples:
    """Seconds a call, one entry a round; `clock` says how they were taken."""

    clock: str
    calls: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))]


def paired_ratio(numerator: Samples, denominator: Samples) -> float:
    """Median over the rounds of the ratio within a round."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return statistics.median(above / below for above, below in pairs)


@dataclass(frozen=True)
class Plan:
    """How long to measure: `seconds` a unit, but between `min_rounds` and `max_rounds` rounds."""

    seconds: float = 1.5
    min_rounds: int = 7
    max_rounds: int = 50
    block_seconds: float = 1e-3


class Block:
    """A candidate's calls on every set, as something that can be run and timed again and again."""

    def __init__(self, call: Callable[[int], object], sets: int, device: torch.device, capture: bool = True):
        self.device = device
        self.calls = sets
        self.clock = EVENTS if device.type == "cuda" else HOST

        def every() -> list[object]:
            return [call(i) for i in range(sets)]

        self.run: Callable[[], object] = every
        if device.type != "cuda":
            every()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                every()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if capture:
            before = torch.cuda.current_stream()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    kept = every()
            except RuntimeError:
                # the end of a capture that failed raises too, and leaves its stream behind
                torch.cuda.set_stream(before)
                torch.cuda.synchronize()
            else:
                self.kept = kept  # outputs that live at addresses of their own
                self.run, self.clock = graph.replay, GRAPH

    def seconds(self, repeats: int = 1) -> float:
        """Of `repeats` blocks."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                self.run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def measure(blocks: dict[str, Block], plan: Plan, seed: int = 0) -> dict[str, Samples]:
    """All blocks interleaved; every one gets the same number of rounds."""
    repeats, samples = {}, {}
    for name, block in blocks.items():
        once = min(block.seconds() for _ in range(2))
        repeats[name] = max(1, min(1000, round(plan.block_seconds / max(once, 1e-9))))
        samples[name] = Samples(block.clock, block.calls)
    order = list(blocks)
    shuffle = random.Random(seed).shuffle
    end = time.perf_counter() + plan.seconds
    for done in range(plan.max_rounds):
        if done >= plan.min_rounds and time.perf_counter() >= end:
            break
        shuffle(order)
        for name in order:
            block = blocks[name]
            samples[name].seconds.append(block.seconds(repeats[name]) / (repeats[name] * block.calls))
    return samples


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """What a call adds to the memory that is allocated before it, at its worst; None without a GPU."""
    if device.type != "cuda":
        function()
        return None
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, tiny: bool = False) -> dict[str, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a bf16 product."""
    count, side = (1 << 12, 32) if tiny else (1 << 31, 8192)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    source, target = normal(count), torch.empty(count, dtype=torch.bfloat16, device=device)
    left, right = normal(side, side), normal(side, side)
    found = {}
    for name, work, call in (
        ("copy_bytes", 2 * source.nbytes, lambda i: target.copy_(source)),
        ("matmul_flops", 2 * side**3, lambda i: torch.mm(left, right)),
    ):
        block = Block(call, 1, device, capture=False)
        block.seconds(3)
        found[name] = work / statistics.median([block.seconds() for _ in range(10)])
    return found
