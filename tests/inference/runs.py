# SPDX-License-Identifier: BSD-3-Clause
"""A network and what optimize_for_inference makes of it, run side by side with a float64 truth."""

from __future__ import annotations

import copy
import math

import torch
from cases import in_layout
from operands import instruction_set
from torch import Tensor, nn

import dcd_kernels as dcd

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def randomise(module: nn.Module, seed: int = 0, channels: int | None = 3) -> nn.Module:
    """Norms, biases and branches away from where they start, where they would hide what is left out.

    Ends in eval mode. Φ grows with the features and multiplies them, so that a deep network would overflow,
    or be chaotic, where no two roundings agree: linear layers are small, and the statistics of the norms
    those of a few random images of ``channels`` (None: random numbers). No variance is below the mean of its
    norm: where channels that hardly vary are enlarged, errors of 1e-7 become ones of 1e-3, and it is chance
    whether those of one runtime are twice another's.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [child for child in module.modules() if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d))]
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Linear):
                child.weight.normal_(0, child.in_features**-0.5 / 12, generator=generator)
            if isinstance(child, (nn.Linear, nn.Conv2d)) and child.bias is not None:
                child.bias.uniform_(-0.5, 0.5, generator=generator)
        for norm in norms:
            tracked = norm.running_mean is not None
            for tensor, low, high in (
                (norm.running_mean if tracked else None, -0.3, 0.3),
                (norm.running_var if tracked else None, 0.5, 1.5),
                (norm.weight, 0.7, 1.3),
                (norm.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.uniform_(low, high, generator=generator)
        if channels is not None and norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train().momentum = 1.0
            with dcd.use_backend("reference"):
                module(torch.randn(4, channels, 64, 64, generator=generator))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                if norm.running_var is not None:
                    norm.running_var.clamp_(min=norm.running_var.mean())
    return module.eval()


def image(*shape: int, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Random numbers; 'expanded': all images are the same one, in the same place."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "expanded":
        return torch.randn(1, *shape[1:], generator=generator).expand(shape)
    return in_layout(torch.randn(shape, generator=generator), layout)


def as_list(outputs) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


class Twin:
    """``network`` and its optimised copy.

    ``pieces``: how many calls of the op it must be, None for any number; ``left``: the names of what must run
    as it is written, so that a test of a kernel is none of plain PyTorch.
    """

    def __init__(self, network: nn.Module, *, pieces: int | None = 1, left: tuple[str, ...] | None = ()):
        self.network = network.eval()
        self.optimised = dcd.optimize_for_inference(network)
        self.wide = copy.deepcopy(network).double()
        self.errors: dict[str, list[float]] = {"mine": [], "plain": [], "truth": []}
        self.pieces, self.left = pieces, left

    @classmethod
    def of(cls, optimised: nn.Module) -> Twin:
        """With a network that is optimised already, and the weights that it has now."""
        twin = cls.__new__(cls)
        twin.optimised, twin.network = optimised, copy.deepcopy(optimised.written).eval()
        twin.wide = copy.deepcopy(twin.network).double()
        twin.errors = {"mine": [], "plain": [], "truth": []}
        twin.pieces = twin.left = None
        return twin

    def written(self, input: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of plain PyTorch, in the network's dtype and in float64."""
        with torch.no_grad(), dcd.use_backend("reference"):
            return as_list(self.network(input.clone())), as_list(self.wide(input.double()))

    def run(self, *inputs: Tensor, isas: tuple[str | None, ...] = (None,)) -> None:
        for input in inputs:
            plain, truth = self.written(input)
            for isa in isas:
                before = input.clone()
                with instruction_set(isa), torch.no_grad():
                    mine = as_list(self.optimised(input))
                assert torch.equal(input, before), "the input was changed"
                assert len(mine) == len(truth)
                for got, same, right in zip(mine, plain, truth, strict=True):
                    self._compare(got, same, right, f"{tuple(input.shape)} {input.stride()} {isa}")

    def _compare(self, got: Tensor, same: Tensor, right: Tensor, what: str) -> None:
        assert (got.shape, got.dtype) == (same.shape, same.dtype), f"{what}: {got.shape}, {got.dtype}"
        assert not got.requires_grad
        self.eps = torch.finfo(got.dtype).eps
        assert bool(right.isfinite().all()), f"{what}: the written network is not finite"
        assert bool(got.isfinite().all()), f"{what}: {int((~got.isfinite()).sum())} of {got.numel()} lost"
        scale = right.norm().item() or 1.0
        self.errors["mine"].append((got.double() - right).norm().item() / scale)
        self.errors["plain"].append((same.double() - right).norm().item() / scale)
        self.errors["truth"].append(1.0)

    def check(self) -> None:
        """DESIGN section 6, over all runs together: a few numbers that round well do not decide."""
        mine, plain, truth = (math.hypot(*values) for values in self.errors.values())
        assert mine <= 2 * plain + 4 * self.eps * truth, (
            f"error {mine:.3g}, that of plain PyTorch {plain:.3g}, {len(self.errors['mine'])} outputs\n"
            f"{[f'{e:.2g}' for e in self.errors['mine']]}\n{dcd.report(self.optimised)}"
        )
        self.check_report()

    def check_report(self) -> None:
        report = dcd.report(self.optimised)
        if self.left is not None:
            assert tuple(entry.name for entry in report.left) == self.left, str(report)
        if self.pieces is not None:
            assert pieces_of(self.optimised) == self.pieces, str(report)


def pieces_of(optimised: nn.Module) -> int:
    """How many calls of the op a call of the network is."""
    from dcd_kernels.inference.plan import Part

    return sum(isinstance(part, Part) for part in optimised.plan.parts)


def assert_right(network: nn.Module, *inputs: Tensor, isas=(None,), pieces=1, left=()) -> Twin:
    twin = Twin(network, pieces=pieces, left=left)
    twin.run(*inputs, isas=isas)
    twin.check()
    return twin
