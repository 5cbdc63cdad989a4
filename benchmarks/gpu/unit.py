# SPDX-License-Identifier: BSD-3-Clause
"""One unit: a case and a task. Check every candidate, measure those that are right, make the rows."""

from __future__ import annotations

import contextlib
import gc

import torch

from ..candidates import FORWARD, OURS, STATIC, TRAINING
from ..cases import Case
from ..suite import REFUSED, RIGHT, UNABLE, WRONG, reason_of
from . import cases
from .candidates import COMPILED, COPY, Candidate, candidates
from .timing import Block, Plan, Samples, measure, paired_ratio, peak_bytes
from .verify import Truth, check


def run(
    case: Case, task: str, plan: Plan, device: torch.device, cache_bytes: int, run_keys: dict
) -> list[dict]:
    """The rows of a unit."""
    operands = cases.make_operands(case, device, cases.sets_needed(case, cache_bytes))
    if task == COMPILED:
        torch._dynamo.reset()  # compilations of one function are limited, and every unit needs its own
    truths: dict[str, Truth] = {}
    rows: dict[str, dict] = {}
    blocks: dict[str, Block] = {}
    with contextlib.nullcontext() if task == TRAINING else torch.inference_mode():
        for candidate in candidates(task):
            row = rows[candidate.name] = described(candidate, case, run_keys)
            try:
                call = candidate.build(operands)
                verdict = check(candidate, call, operands, truths)
                row.update(
                    status=RIGHT if verdict.right else WRONG, error=verdict.error, reason=verdict.reason
                )
                if verdict.right:
                    if task == TRAINING:
                        row["peak_mib"] = _mebibytes(peak_bytes(lambda call=call: call(0), device))
                    blocks[candidate.name] = Block(call, len(operands.sets), device)
            except UNABLE as error:
                row.update(status=REFUSED, reason=reason_of(error))
                blocks.pop(candidate.name, None)
        truths.clear()
        samples = measure(blocks, plan) if blocks else {}
    finish(rows, samples)
    for row in rows.values():
        add_rates(row, case, task, run_keys)
    blocks.clear()
    operands.sets.clear()
    release(device)
    return list(rows.values())


def described(candidate: Candidate, case: Case, run_keys: dict) -> dict:
    return {
        **run_keys,
        "task": candidate.task,
        "network": case.network,
        "in_channels": case.in_channels,
        "out_channels": case.out_channels,
        "size": case.size,
        "batch": case.batch,
        "latent_channels": case.latent_channels,
        "dtype": str(cases.DTYPE).removeprefix("torch."),
        "candidate": candidate.name,
        "group": candidate.group,
        "layout": candidate.layout,
    }


def finish(rows: dict[str, dict], samples: dict[str, Samples]) -> None:
    """Times, and the ratios to the fastest of ours and of the static ones."""
    bases = {}
    for key, group in (("ratio_to_ours", OURS), ("ratio_to_best_static", STATIC)):
        timed = [taken for name, taken in samples.items() if rows[name]["group"] == group]
        bases[key] = min(timed, key=lambda taken: taken.median, default=None)
    for name, taken in samples.items():
        rows[name].update(
            clock=taken.clock,
            rounds=len(taken.seconds),
            sets=taken.calls,
            p20_us=taken.quantile(0.2) * 1e6,
            p50_us=taken.median * 1e6,
            p80_us=taken.quantile(0.8) * 1e6,
            **{key: paired_ratio(taken, base) for key, base in bases.items() if base},
        )


def add_rates(row: dict, case: Case, task: str, run_keys: dict) -> None:
    """The floors of what the candidate computes, by bytes and by operations, and how near it comes."""
    flops = case.static_flops if row["group"] == STATIC else cases.dynamic_flops(case)
    moved = cases.static_bytes(case)
    if task == TRAINING:
        # forward, then the gradients: both images and the output's gradient read, the input's written
        read, written = cases.image_bytes(case)
        moved, flops = moved + 2 * read + written, 3 * flops
    if row["group"] == COPY:
        moved, flops = sum(cases.image_bytes(case)), 0
    row["bytes_floor_us"] = moved / (run_keys["copy_gbs"] * 1e9) * 1e6
    row["flops_floor_us"] = flops / (run_keys["matmul_tflops"] * 1e12) * 1e6
    if row.get("p50_us"):
        row["copy_share"] = row["bytes_floor_us"] / row["p50_us"]
        row["tflops"] = flops / row["p50_us"] * 1e-6
        if task == FORWARD and row["group"] == COPY:
            row["tflops"] = None


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
