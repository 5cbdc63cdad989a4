# SPDX-License-Identifier: BSD-3-Clause
"""One case: check every candidate, measure those that are right, and the memory of the best of each group."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from dcd_kernels.demo.memory import can_measure

from ..cases import make_images
from ..runner import Plan, measure
from ..suite import REFUSED, RIGHT, UNABLE, WRONG, CaseResult, Entry, reason_of
from . import memory, verify
from .networks import CANDIDATES, STATIC, NetworkCase, call_of, in_layout


@dataclass
class NetworkResult(CaseResult):
    """``peaks`` are bytes by candidate; of a group only its fastest candidate has one.

    ``taken`` is None where nothing was to be accelerated.
    """

    taken: verify.Taken | None = None
    peaks: dict[str, int] = field(default_factory=dict)

    def peak(self, group: str) -> int | None:
        best = self.best(group)
        return self.peaks.get(best.candidate.name) if best else None

    def memory_ratio(self, group: str) -> float | None:
        """Peak memory of a group over that of the static twin."""
        above, below = self.peak(group), self.peak(STATIC)
        return above / below if above and below else None


def run_case(
    case: NetworkCase, networks: dict[str, nn.Module], plan: Plan, isa: str, with_memory: bool
) -> NetworkResult:
    """What came of the candidates of ``case``; ``networks`` are those that `make_networks` made."""
    checker = verify.Checker(case, networks, plan.seed)
    entries, calls = [], {}
    for candidate in CANDIDATES:
        images = make_images(case.batch, case.size, candidate.layout, seed=plan.seed)
        try:
            network = in_layout(networks[candidate.group], candidate.layout)
            verdict = checker.check(candidate, network, images)
        except UNABLE as error:
            entries.append(Entry(candidate, REFUSED, reason_of(error)))
            continue
        if not verdict.right:
            error = verdict.error if math.isfinite(verdict.error) else None
            entries.append(Entry(candidate, WRONG, verdict.reason, error))
            continue
        entries.append(Entry(candidate, RIGHT, error=verdict.error))
        calls[candidate.name] = call_of(case, network, images)
    timings = measure(calls, plan) if calls else {}
    calls.clear()
    for entry in entries:
        entry.timing = timings.get(entry.candidate.name)
    result = NetworkResult(case, case.task, entries, checker.taken)
    if with_memory:
        measure_memory(result, networks, isa, plan.seed)
    return result


def measure_memory(result: NetworkResult, groups: Iterable[str], isa: str, seed: int) -> None:
    """Put the peak of each group's fastest candidate into ``result``, where the system has the counters."""
    for group in groups if can_measure() else ():
        best = result.best(group)
        if best:
            result.peaks[best.candidate.name] = memory.peak_bytes(result.case, best.candidate, isa, seed)
