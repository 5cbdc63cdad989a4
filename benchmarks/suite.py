# SPDX-License-Identifier: BSD-3-Clause
"""One case: check every candidate, measure those that are right, compare the groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .candidates import OURS, TRAINING, Candidate, Result, candidates
from .cases import Case, Operands, make_operands
from .runner import Plan, Timing, measure, paired_ratio
from .verify import Truth, Verdict, check_operands

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
# what a candidate may raise because this machine, its memory or its torch cannot run it
UNABLE = (RuntimeError, NotImplementedError, ImportError, AttributeError, ValueError, TypeError)


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@dataclass
class Entry:
    """What came of one candidate. Only a right one has a timing."""

    candidate: Candidate
    status: str
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None


@dataclass
class CaseResult:
    case: Case
    task: str
    entries: list[Entry]

    def best(self, group: str, layout: str = "") -> Entry | None:
        """The fastest by median of a group, of one layout if given; None if the group has no time."""
        timed = [
            entry
            for entry in self.entries
            if entry.timing and entry.candidate.group == group and layout in ("", entry.candidate.layout)
        ]
        return min(timed, key=lambda entry: entry.timing.median, default=None)

    def ratio(self, numerator: str, denominator: str, layout: str = "") -> float | None:
        """Paired ratio of the best of two groups; `layout` restricts whichever of the two is ours."""
        above = self.best(numerator, layout if numerator == OURS else "")
        below = self.best(denominator, layout if denominator == OURS else "")
        return paired_ratio(above.timing, below.timing) if above and below else None


def run_case(
    case: Case, task: str, plan: Plan, groups: tuple[str, ...] = (), refusals: dict[str, str] | None = None
) -> CaseResult:
    """Check and measure the candidates of `task`; `refusals` names groups that cannot run, and why."""
    operands = make_operands(case, plan.seed)
    check_operands(operands)
    truths: dict[bool, Truth] = {}
    entries, calls = [], {}
    # without gradients as inference runs; entered here so that building, checking and timing agree
    with contextlib.nullcontext() if task == TRAINING else torch.inference_mode():
        for candidate in candidates(task, case, groups):
            if refusals and candidate.group in refusals:
                entries.append(Entry(candidate, REFUSED, refusals[candidate.group]))
                continue
            if candidate.dynamic not in truths:
                with torch.inference_mode(False), torch.enable_grad():
                    truths[candidate.dynamic] = Truth(operands, candidate.dynamic, task)
            entry, call = check_candidate(candidate, operands, truths[candidate.dynamic])
            entries.append(entry)
            if call is not None:
                calls[candidate.name] = call
        truths.clear()
        timings = measure(calls, plan) if calls else {}
    for entry in entries:
        entry.timing = timings.get(entry.candidate.name)
    return CaseResult(case, task, entries)


def check_candidate(
    candidate: Candidate, operands: Operands, truth: Truth
) -> tuple[Entry, Callable[[], Result] | None]:
    """The candidate's entry and, if its numbers are right, the call to be measured."""
    try:
        call = candidate.build(operands)
        verdict: Verdict = truth.check(call())
    except UNABLE as error:
        return Entry(candidate, REFUSED, reason_of(error)), None
    if not verdict.right:
        return Entry(candidate, WRONG, verdict.reason, verdict.error), None
    return Entry(candidate, RIGHT, error=verdict.error), call


def wrong_entries(results: list[CaseResult]) -> list[tuple[Case, Entry]]:
    return [(result.case, entry) for result in results for entry in result.entries if entry.status == WRONG]
