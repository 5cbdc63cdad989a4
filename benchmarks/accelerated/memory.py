# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of one step of one candidate: `python -m benchmarks.accelerated.memory JSON` prints its bytes.

Above what is resident before it, weights and images, with the gradients that the step makes.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from dcd_kernels.demo import memory

from .. import environment
from ..cases import make_images
from .networks import Candidate, NetworkCase, call_of, in_layout, make_network

SMALL = 32  # images of the first step, in which code is loaded


def peak_bytes(case: NetworkCase, candidate: Candidate, isa: str, seed: int = 0) -> int:
    """Of a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    what = {"case": dataclasses.asdict(case), "candidate": dataclasses.asdict(candidate)}
    asked = json.dumps({**what, "isa": isa, "seed": seed})
    return memory.peak_in_fresh_process("benchmarks.accelerated.memory", asked, folder=environment.ROOT)


def main(asked: str) -> None:
    given = json.loads(asked)
    case, candidate = NetworkCase(**given["case"]), Candidate(**given["candidate"])
    torch.set_num_threads(1)
    environment.use_isa(given["isa"])
    network = make_network(case.network, candidate.group, case.classes, given["seed"])
    network = in_layout(network, candidate.layout)
    small = dataclasses.replace(case, batch=min(case.batch, 2))
    call_of(small, network, make_images(small.batch, SMALL, candidate.layout))()
    network.zero_grad(set_to_none=True)
    call = call_of(case, network, make_images(case.batch, case.size, candidate.layout))
    print(memory.peak_of_one_call(call))


if __name__ == "__main__":
    main(*sys.argv[1:])
