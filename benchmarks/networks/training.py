# SPDX-License-Identifier: BSD-3-Clause
"""A training step of the paper's form on our kernels, beside that of its static twin in PyTorch; memory.

Outputs, gradients and statistics are checked as those of accelerated networks are, against the same network
in float64 on the reference backend.
"""

from __future__ import annotations

import copy

from torch import nn

import dcd_kernels as dcd

from ..accelerated.networks import PAPER, NetworkCase, call_of, in_layout, make_network
from ..accelerated.networks import Candidate as Step
from ..accelerated.unit import measure_memory
from ..accelerated.verify import network_is_right, network_results
from ..candidates import CHANNELS_LAST, NCHW, STATIC
from ..cases import make_images
from ..runner import Plan, measure
from ..suite import REFUSED, RIGHT, UNABLE, WRONG, Entry, reason_of
from ..verify import Verdict
from .unit import NetworkResult

REFERENCE = "reference"
CANDIDATES = tuple(Step(group, layout) for group in (STATIC, PAPER) for layout in (NCHW, CHANNELS_LAST))


class Checker:
    """The truth of one network, and how far its layouts are from it on the reference backend."""

    def __init__(self, network: nn.Module, case: NetworkCase, seed: int) -> None:
        self.case, self.seed = case, seed
        with dcd.use_backend(REFERENCE):
            images = self.images(NCHW)
            self.exact = network_results(copy.deepcopy(network).double(), case, images.double())
            self.single = [
                network_results(in_layout(network, layout), case, self.images(layout))
                for layout in (NCHW, CHANNELS_LAST)
            ]

    def images(self, layout: str):
        return make_images(self.case.batch, self.case.size, layout, seed=self.seed)

    def check(self, network: nn.Module, layout: str) -> Verdict:
        return network_is_right(
            network_results(network, self.case, self.images(layout)), self.single, self.exact
        )


def run_case(
    case: NetworkCase, plan: Plan, isa: str, with_memory: bool, refusal: str | None = None
) -> NetworkResult:
    """What came of the candidates; ``refusal`` says why ours cannot run."""
    entries, calls = [], {}
    for group in (STATIC, PAPER):
        network = make_network(case.network, group, case.classes, plan.seed)
        checker = None
        for candidate in (step for step in CANDIDATES if step.group == group):
            if refusal and group == PAPER:
                entries.append(Entry(candidate, REFUSED, refusal))
                continue
            try:
                checker = checker or Checker(network, case, plan.seed)
                own = in_layout(network, candidate.layout)
                verdict = checker.check(own, candidate.layout)
            except UNABLE as error:
                entries.append(Entry(candidate, REFUSED, reason_of(error)))
                continue
            entries.append(Entry(candidate, RIGHT if verdict.right else WRONG, verdict.reason, verdict.error))
            if verdict.right:
                calls[candidate.name] = call_of(case, own, checker.images(candidate.layout))
    timings = measure(calls, plan) if calls else {}
    calls.clear()
    for entry in entries:
        entry.timing = timings.get(entry.candidate.name)
    result = NetworkResult(case, case.task, entries)
    if with_memory:
        measure_memory(result, (STATIC, PAPER), isa, plan.seed)
    return result
