# SPDX-License-Identifier: BSD-3-Clause
"""One case: check every candidate, measure those that are right, interleaved in one process."""

from __future__ import annotations

import gc
import itertools
import math
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..accelerated.networks import NetworkCase
from ..accelerated.unit import NetworkResult as MeasuredNetwork
from ..cases import make_images
from ..runner import Plan, Timing, measure
from ..suite import REFUSED, RIGHT, UNABLE, WRONG, Entry, reason_of
from .candidates import COLLECTIVE, THIS_PACKAGE, Builder, Candidate
from .verify import Checker, in_memory


@dataclass
class NetworkResult(MeasuredNetwork):
    """Groups may be collective ones too, see `candidates.COLLECTIVE`."""

    def best(self, group: str, layout: str = "") -> Entry | None:
        members = (*COLLECTIVE.get(group, ()), group)
        found = [super(NetworkResult, self).best(member, layout) for member in members]
        return min(filter(None, found), key=lambda entry: entry.timing.median, default=None)


def mean(timing: Timing) -> float:
    """Seconds a call on average, what the paper reports; elsewhere medians are."""
    return statistics.fmean(timing.samples)


def run_case(
    case: NetworkCase,
    written: dict[str, nn.Module],
    chosen: Sequence[Candidate],
    plan: Plan,
    threads: int,
    different: int = 1,
    refusals: dict[str, str] | None = None,
) -> NetworkResult:
    """What came of the candidates.

    ``different`` batches a candidate sees in turn, of which the first is checked. ``refusals`` names runtimes
    that cannot run, and why.
    """
    batches = [
        make_images(case.batch, case.size, "nchw", seed=plan.seed + index) for index in range(different)
    ]
    # one copy a layout, which its candidates share: of thousands of images it takes gigabytes
    by_layout = {
        layout: [in_memory(images, layout) for images in batches]
        for layout in dict.fromkeys(candidate.layout for candidate in chosen)
    }
    checker = Checker(written, batches[0])
    entries, calls = [], {}
    with tempfile.TemporaryDirectory(prefix="networks-") as folder:
        builder = Builder(written, batches[0], threads, pathlib.Path(folder))
        for candidate in chosen:
            if refusals and candidate.runtime in refusals:
                entries.append(Entry(candidate, REFUSED, refusals[candidate.runtime]))
                continue
            entry, call = check_candidate(candidate, builder, checker, by_layout[candidate.layout])
            entries.append(entry)
            if call:
                calls[candidate.name] = call
    timings = measure(calls, plan) if calls else {}
    calls.clear()
    gc.collect()
    for entry in entries:
        entry.timing = timings.get(entry.candidate.name)
    return NetworkResult(case, case.task, entries)


def check_candidate(
    candidate: Candidate, builder: Builder, checker: Checker, batches: Sequence[Tensor]
) -> tuple[Entry, Callable[[], Tensor] | None]:
    """The entry and, if the numbers are right, the call to be measured, over ``batches`` in its layout."""
    # a foreign runtime may raise what it likes, ours may not
    unable = UNABLE if candidate.runtime in THIS_PACKAGE else Exception
    try:
        run = builder.build(candidate)
        verdict = checker.check(candidate, run(batches[0]))
    except unable as error:
        return Entry(candidate, REFUSED, reason_of(error)), None
    if not verdict.right:
        error = verdict.error if math.isfinite(verdict.error) else None
        return Entry(candidate, WRONG, verdict.reason, error), None
    turn = itertools.cycle(batches)
    return Entry(candidate, RIGHT, error=verdict.error), lambda: run(next(turn))
