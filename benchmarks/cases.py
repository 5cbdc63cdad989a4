# SPDX-License-Identifier: BSD-3-Clause
"""Registry of benchmark cases: the shapes, and the operands made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# (network, in_channels, out_channels, height = width): the pointwise layers every operator figure is about.
POINTWISE_SHAPES = (
    ("MobileNetV2", 16, 96, 112),
    ("MobileNetV2", 96, 24, 56),
    ("MobileNetV2", 24, 144, 56),
    ("MobileNetV2", 144, 32, 28),
    ("MobileNetV2", 32, 192, 28),
    ("MobileNetV2", 192, 64, 14),
    ("MobileNetV2", 64, 384, 14),
    ("MobileNetV2", 384, 96, 14),
    ("MobileNetV2", 96, 576, 14),
    ("MobileNetV2", 576, 160, 7),
    ("MobileNetV2", 160, 960, 7),
    ("MobileNetV2", 960, 320, 7),
    ("ResNet-50", 256, 64, 56),
    ("ResNet-50", 64, 256, 56),
    ("ResNet-50", 512, 128, 28),
    ("ResNet-50", 1024, 256, 14),
    ("ResNet-50", 2048, 512, 7),
)
BATCHES = (1, 8)


def latent_channels(in_channels: int) -> int:
    """L = 2^⌊log2 √Ci⌋, between 4 and 32."""
    return min(32, max(4, 1 << int(math.log2(math.isqrt(in_channels)))))


@dataclass(frozen=True)
class Case:
    """One pointwise layer at one batch size."""

    network: str
    in_channels: int
    out_channels: int
    size: int
    batch: int
    dtype: str = "float32"

    @property
    def latent_channels(self) -> int:
        return latent_channels(self.in_channels)

    @property
    def shape_name(self) -> str:
        return f"{self.in_channels}→{self.out_channels}@{self.size}"

    @property
    def name(self) -> str:
        return f"{self.shape_name} batch {self.batch}{'' if self.dtype == 'float32' else f' {self.dtype}'}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def static_flops(self) -> int:
        """Operations of the static product, the common yardstick: 2·N·Co·Ci·HW."""
        return 2 * self.batch * self.out_channels * self.in_channels * self.size**2


@dataclass
class Operands:
    """Tensors of a case, in its dtype and contiguous unless the name says otherwise.

    input (N, Ci, H, W), weight (Co, Ci, 1, 1), p (Co, L), phi (N, L, L), q (Ci, L), lam (N, Co),
    grad (N, Co, H, W): the gradient that training candidates send back; norm_scale and norm_shift (Co): those
    of a BatchNorm in eval mode behind the layer.
    """

    case: Case
    input: torch.Tensor
    input_channels_last: torch.Tensor
    weight: torch.Tensor
    p: torch.Tensor
    phi: torch.Tensor
    q: torch.Tensor
    lam: torch.Tensor
    grad: torch.Tensor
    grad_channels_last: torch.Tensor
    norm_scale: torch.Tensor
    norm_shift: torch.Tensor

    def input_as(self, layout: str) -> torch.Tensor:
        return self.input_channels_last if layout == "channels_last" else self.input

    def grad_as(self, layout: str) -> torch.Tensor:
        return self.grad_channels_last if layout == "channels_last" else self.grad

    def leaves(self, layout: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Fresh leaves that require a gradient, sharing memory with the operands."""
        found = {"input": self.input_as(layout)}
        found.update({name: getattr(self, name) for name in ("weight", "p", "phi", "q", "lam")})
        return {name: found[name].detach().requires_grad_() for name in names}


def make_operands(case: Case, seed: int = 0) -> Operands:
    """Random operands at the scale of a trained layer: unit input, output of order one, λ around one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = (torch.randn(*shape, generator=generator) * scale).to(case.torch_dtype)
        # a subnormal operand would slow some candidates a hundredfold and measure nothing
        return values.masked_fill_(values.abs() < torch.finfo(values.dtype).tiny, 0.0)

    n, ci, co, side, latent = case.batch, case.in_channels, case.out_channels, case.size, case.latent_channels
    images = normal(n, ci, side, side)
    grad = normal(n, co, side, side)
    return Operands(
        case=case,
        input=images,
        input_channels_last=images.contiguous(memory_format=torch.channels_last),
        weight=normal(co, ci, 1, 1, scale=ci**-0.5),
        p=normal(co, latent, scale=latent**-0.5),
        phi=normal(n, latent, latent, scale=latent**-0.5),
        q=normal(ci, latent, scale=ci**-0.5),
        lam=1 + normal(n, co, scale=0.2),
        grad=grad,
        grad_channels_last=grad.contiguous(memory_format=torch.channels_last),
        norm_scale=1.0 + normal(co, scale=0.2),
        norm_shift=normal(co),
    )


def make_images(
    batch: int, size: int, layout: str, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Random images (batch, 3, size, size) for a network; the same numbers in every layout."""
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator, device=device)
    return images.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else images


def pointwise_cases(
    batches: tuple[int, ...] = BATCHES, pattern: str = "", dtype: str = "float32"
) -> list[Case]:
    """The registered cases whose shape name ('384→96@14', or with '-' or '>' for the arrow) has `pattern`."""
    text = pattern.replace("->", "→").replace(">", "→").replace("-", "→")
    shapes = [Case(*shape, batch=1) for shape in POINTWISE_SHAPES]
    chosen = {case.shape_name for case in shapes if text in case.shape_name}
    if not chosen:
        raise ValueError(f"shapes={pattern!r}: none of {[case.shape_name for case in shapes]} has it")
    return [
        Case(*shape, batch=batch, dtype=dtype)
        for batch in batches
        for shape in POINTWISE_SHAPES
        if Case(*shape, batch=1).shape_name in chosen
    ]
