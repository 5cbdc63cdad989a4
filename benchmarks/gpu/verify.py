# SPDX-License-Identifier: BSD-3-Clause
"""Numbers are checked before any time is taken: a candidate that is wrong gets no time.

The truth is the equation in float64 on the first set. A candidate may err twice as much as the same equation
in plain PyTorch at bf16 (weights written out, one product), plus 4 eps of the result's size, by Frobenius
norms; every gradient likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..verify import Verdict
from .candidates import (
    COPIED,
    DYNAMIC,
    DYNAMIC_LEAVES,
    DYNAMIC_NORM,
    RELEASED_SUM,
    STATIC_LEAVES,
    STATIC_NORM,
    STATIC_PRODUCT,
    TRAINING,
    Call,
    Candidate,
    Result,
)
from .cases import DTYPE, Operands

EQUATIONS = (STATIC_PRODUCT, DYNAMIC, RELEASED_SUM, STATIC_NORM, DYNAMIC_NORM)


def composition(operands: Operands, equation: str, dtype: torch.dtype, task: str) -> dict[str, Tensor]:
    """The equation on the first set, and for training its gradients, in `dtype`."""
    it = operands.sets[0]
    found = {"input": it.input["nchw"], "phi": it.phi, "lam": it.lam}
    found |= {name: getattr(operands, name) for name in ("weight", "p", "q")}
    names = STATIC_LEAVES if equation in (STATIC_PRODUCT, STATIC_NORM) else DYNAMIC_LEAVES
    leaves = {name: found[name].detach().to(dtype).requires_grad_(task == TRAINING) for name in names}
    with torch.set_grad_enabled(task == TRAINING):
        weight = leaves["weight"][:, :, 0, 0]
        if equation == RELEASED_SUM:
            identity = torch.eye(len(operands.scale1), dtype=dtype, device=weight.device)
            core = operands.scale2.to(dtype)[:, None] * it.core.to(dtype) + identity
            weight = _written_out(leaves | {"phi": core * operands.scale1.to(dtype)})
        elif equation in (DYNAMIC, DYNAMIC_NORM):
            weight = _written_out(leaves)
        else:
            weight = weight.expand(operands.case.batch, -1, -1)
        output = torch.bmm(weight, leaves["input"].flatten(2))
        if equation in (STATIC_NORM, DYNAMIC_NORM):
            scale, shift = (t.to(dtype)[:, None] for t in (operands.norm_scale, operands.norm_shift))
            output = (scale * output + shift).clamp(0, 6)
        output = output.unflatten(2, leaves["input"].shape[2:])
        if task != TRAINING:
            return {"output": output}
        gradients = torch.autograd.grad(output, list(leaves.values()), it.grad["nchw"].to(dtype))
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def _written_out(leaves: dict[str, Tensor]) -> Tensor:
    dynamic = leaves["p"] @ leaves["phi"] @ leaves["q"].t()
    return leaves["lam"][:, :, None] * leaves["weight"][None, :, :, 0, 0] + dynamic


class Truth:
    """The float64 truth of an equation and task, and the errors that are allowed."""

    def __init__(self, operands: Operands, equation: str, task: str):
        self.exact = composition(operands, equation, torch.float64, task)
        self.limit = {}
        for name, plain in composition(operands, equation, DTYPE, task).items():
            exact = self.exact[name]
            error = (plain.double() - exact).norm().item()
            self.limit[name] = 2.0 * error + 4.0 * torch.finfo(DTYPE).eps * exact.norm().item()

    def check(self, result: Result) -> Verdict:
        found = result if isinstance(result, dict) else {"output": result}
        if found.keys() != self.exact.keys():
            return Verdict(False, float("nan"), f"returned {sorted(found)}, expected {sorted(self.exact)}")
        worst = 0.0
        for name, exact in self.exact.items():
            if found[name].shape != exact.shape:
                reason = f"{name} has shape {tuple(found[name].shape)}, expected {tuple(exact.shape)}"
                return Verdict(False, float("nan"), reason)
            error = (found[name].detach().double() - exact).norm().item()
            relative = error / max(exact.norm().item(), torch.finfo(torch.float64).tiny)
            # written so that a NaN, which compares false with everything, is refused
            if not error <= self.limit[name]:
                return Verdict(
                    False, relative, f"{name} is off by {error:.3e}, the limit is {self.limit[name]:.3e}"
                )
            worst = max(worst, relative)
        return Verdict(True, worst)


def check(candidate: Candidate, call: Call, operands: Operands, truths: dict[str, Truth]) -> Verdict:
    """Compare a candidate's first call with the truth of its equation, made unless it is in `truths`."""
    result = call(0)
    if candidate.equation == COPIED:
        same = torch.equal(result, call.sources[0])
        return Verdict(same, 0.0, "" if same else "the copy differs")
    if candidate.equation not in truths:
        with torch.inference_mode(False):
            truths[candidate.equation] = Truth(operands, candidate.equation, candidate.task)
    return truths[candidate.equation].check(result)
