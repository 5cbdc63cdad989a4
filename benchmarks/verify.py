# SPDX-License-Identifier: BSD-3-Clause
"""Numbers are checked before any time is taken: a candidate that is wrong gets no time.

The truth is the equation itself in float64. A candidate may err twice as much as the plain PyTorch
composition (weights written out, one product) errs in the candidate's own precision, plus 4 eps of the size
of the result; for parameter gradients √(N·HW) eps, as libraries differ in how they order a sum over all
pixels (the tests hold our own gradients to the narrower limit). Errors are Frobenius norms over a whole
tensor: one wrong element among a million is still far beyond the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .candidates import DYNAMIC_LEAVES, NORMALISED, STATIC_LEAVES, TRAINING, Result
from .cases import Operands


@dataclass(frozen=True)
class Verdict:
    """`error` is the largest error relative to its truth over the tensors checked."""

    right: bool
    error: float
    reason: str = ""


def composition(operands: Operands, dtype: torch.dtype, dynamic: bool, task: str) -> dict[str, torch.Tensor]:
    """y, and for training the gradients, by writing W_n out and multiplying, in `dtype`."""
    names = DYNAMIC_LEAVES if dynamic else STATIC_LEAVES
    leaves = {
        name: leaf.detach().to(dtype).requires_grad_(task == TRAINING)
        for name, leaf in operands.leaves("nchw", names).items()
    }
    x, weight = leaves["input"], leaves["weight"][:, :, 0, 0].expand(operands.case.batch, -1, -1)
    if dynamic:
        weight = leaves["lam"][:, :, None] * weight + leaves["p"] @ leaves["phi"] @ leaves["q"].t()
    y = torch.bmm(weight, x.flatten(2)).unflatten(2, x.shape[2:])
    if task == NORMALISED:
        scale, shift = (it.to(dtype)[:, None, None] for it in (operands.norm_scale, operands.norm_shift))
        y = (scale * y + shift).clamp(0, 6)
    if task != TRAINING:
        return {"output": y}
    gradients = torch.autograd.grad(y, list(leaves.values()), operands.grad.to(dtype))
    return {"output": y.detach(), **dict(zip(names, gradients, strict=True))}


class Truth:
    """The float64 truth of one case and task, and how far the composition in the case's dtype is from it."""

    def __init__(self, operands: Operands, dynamic: bool, task: str):
        self.exact = composition(operands, torch.float64, dynamic, task)
        self.limit = {}
        pixels = operands.case.batch * operands.case.size**2
        dtype = operands.case.torch_dtype
        for name, plain in composition(operands, dtype, dynamic, task).items():
            size = self.exact[name].norm().item()
            error = distance(plain, self.exact[name])
            share = 4.0 if name in ("output", "input") else max(4.0, pixels**0.5)
            self.limit[name] = 2.0 * error + share * torch.finfo(dtype).eps * size

    def check(self, result: Result) -> Verdict:
        """Compare a candidate's result with the truth."""
        return compare(result if isinstance(result, dict) else {"output": result}, self.exact, self.limit)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ in float64."""
    return (found.detach().double() - exact).norm().item()


def compare(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], limit: dict[str, float]
) -> Verdict:
    """Whether no tensor is farther than its limit from the float64 tensor of the same name."""
    if found.keys() != exact.keys():
        return Verdict(False, float("nan"), f"returned {sorted(found)}, expected {sorted(exact)}")
    worst = 0.0
    for name, truth in exact.items():
        tensor = found[name]
        if tensor.shape != truth.shape:
            reason = f"{name} has shape {tuple(tensor.shape)}, expected {tuple(truth.shape)}"
            return Verdict(False, float("nan"), reason)
        error = distance(tensor, truth)
        relative = error / max(truth.norm().item(), torch.finfo(torch.float64).tiny)
        # written so that a NaN, which compares false with everything, is refused
        if not error <= limit[name]:
            return Verdict(False, relative, f"{name} is off by {error:.3e}, the limit is {limit[name]:.3e}")
        worst = max(worst, relative)
    return Verdict(True, worst)


def check_operands(operands: Operands) -> None:
    """Refuse subnormal operands: they slow some instruction sequences a hundredfold. Raises ValueError."""
    for name in ("input", *DYNAMIC_LEAVES[1:], "grad", "norm_scale", "norm_shift"):
        tensor = getattr(operands, name)
        tiny = torch.finfo(tensor.dtype).tiny
        if bool(((tensor != 0) & (tensor.abs() < tiny)).any()):
            raise ValueError(f"{name} has subnormal values; benchmark operands must have none")
