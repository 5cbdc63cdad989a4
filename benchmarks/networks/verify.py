# SPDX-License-Identifier: BSD-3-Clause
"""Outputs are checked before any time is taken, against the network as it is written, in float64.

Ours may err twice as much as PyTorch does with the written network at the same precision, in its worse memory
format, plus 4 eps of the size; for bfloat16 that is the written network with its parameters in bfloat16. The
others order their sums as they like, and in float32 may err `PEERS_SHARE` times as much.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..accelerated.networks import in_layout
from ..verify import Verdict, compare, distance
from .candidates import LAYOUTS, THIS_PACKAGE, Candidate
from .runtimes import BFLOAT16, FLOAT32
from .written import written_form

OUTPUT = "output"
PEERS_SHARE = 4.0
# in bfloat16 the dynamic networks, whose weights are random, lose half of their output: zeros must not pass
AT_MOST = 0.7
DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}


class Checker:
    """The truths of one case and the limits, each made when it is first asked for."""

    def __init__(self, written: dict[str, nn.Module], images: Tensor) -> None:
        self.written, self.images = written, images
        self.truths: dict[str, Tensor] = {}
        self.limits: dict[tuple[str, str], float] = {}

    def truth(self, form: str) -> Tensor:
        if form not in self.truths:
            with torch.inference_mode():
                self.truths[form] = copy.deepcopy(self.written[form]).double()(self.images.double())
        return self.truths[form]

    def limit(self, form: str, precision: str) -> float:
        key = form, precision
        if key not in self.limits:
            dtype, exact = DTYPES[precision], self.truth(form)
            errors = []
            for layout in LAYOUTS:
                images = in_memory(self.images, layout).to(dtype)
                with torch.inference_mode():
                    found = in_layout(self.written[form], layout).to(dtype)(images)
                errors.append(distance(found, exact))
            share = 4.0 * torch.finfo(dtype).eps * exact.norm().item()
            self.limits[key] = 2.0 * max(errors) + share
        return self.limits[key]

    def check(self, candidate: Candidate, output: Tensor) -> Verdict:
        form = written_form(candidate.form)
        strict = candidate.runtime in THIS_PACKAGE or candidate.precision == BFLOAT16
        limit = (1.0 if strict else PEERS_SHARE) * self.limit(form, candidate.precision)
        limit = {OUTPUT: min(limit, AT_MOST * self.truth(form).norm().item())}
        return compare({OUTPUT: output}, {OUTPUT: self.truth(form)}, limit)


def in_memory(images: Tensor, layout: str) -> Tensor:
    """``images`` in a memory format."""
    return images.contiguous(memory_format=torch.channels_last) if layout == LAYOUTS[1] else images
