# SPDX-License-Identifier: BSD-3-Clause
"""Registry of the GPU cases: the shapes, and the operands made from them in several sets.

A call is timed on one set after the other, all of them larger than the L2 together, so that no call finds
its images in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import POINTWISE_SHAPES, Case

# The CPU's shapes, in the order of the networks, and three more of ResNet-50.
SHAPES = (
    *POINTWISE_SHAPES,
    ("ResNet-50", 128, 512, 28),
    ("ResNet-50", 256, 1024, 14),
    ("ResNet-50", 512, 2048, 7),
)
BATCH = 256
TINY_SHAPES = (("smoke test", 8, 12, 4), ("smoke test", 12, 6, 5))
TINY_BATCH = 3

DTYPE = torch.bfloat16
IN_CACHES = 4  # all sets together are so many times the L2


def gpu_cases(batch: int, pattern: str = "", tiny: bool = False) -> list[Case]:
    """The registered cases whose shape name has `pattern` ('-' or '>' for the arrow). Raises ValueError."""
    text = pattern.replace("->", "→").replace(">", "→").replace("-", "→")
    cases = [Case(*shape, batch=batch) for shape in (TINY_SHAPES if tiny else SHAPES)]
    chosen = [case for case in cases if text in case.shape_name]
    if not chosen:
        raise ValueError(f"shapes={pattern!r}: none of {[case.shape_name for case in cases]} has it")
    return chosen


def image_bytes(case: Case) -> tuple[int, int]:
    """Bytes of the input and of the output."""
    pixels = case.batch * case.size**2 * DTYPE.itemsize
    return pixels * case.in_channels, pixels * case.out_channels


def static_bytes(case: Case) -> int:
    """What the static layer has to move: input and weights read once, output written once."""
    return sum(image_bytes(case)) + case.in_channels * case.out_channels * DTYPE.itemsize


def dynamic_flops(case: Case) -> int:
    """Operations of the factored order: the static ones, L (Ci + Co) + L² a pixel and Co for λ, times two."""
    latent = case.latent_channels
    more = latent * (case.in_channels + case.out_channels) + latent**2 + case.out_channels
    return case.static_flops + 2 * case.batch * case.size**2 * more


@dataclass
class Set:
    """The images of one call, and what depends on the sample.

    `phi` is the Φ of our operator; `core` the Φ of the released formulation, between its two norms:
    phi = (diag(scale2) core + I) diag(scale1). `lam` is float32 where the name says so: ours takes it
    as the branch makes it, the others in their own dtype, rounded beforehand.
    """

    input: dict[str, Tensor]
    grad: dict[str, Tensor]
    phi: Tensor
    core: Tensor
    lam: Tensor


@dataclass
class Operands:
    """weight (Co, Ci, 1, 1), p (Co, L), q (Ci, L), the latent norms' scales (L,), the BatchNorm behind the
    layer as scale and shift (Co,), and the sets."""

    case: Case
    weight: Tensor
    p: Tensor
    q: Tensor
    scale1: Tensor
    scale2: Tensor
    norm_scale: Tensor
    norm_shift: Tensor
    sets: list[Set]


def sets_needed(case: Case, cache_bytes: int) -> int:
    """Two at least, and together beyond the cache by their inputs alone."""
    return max(2, -(-IN_CACHES * cache_bytes // image_bytes(case)[0]))


def make_operands(case: Case, device: torch.device, count: int, seed: int = 0) -> Operands:
    """Random operands at the scale of a trained layer, with values that bf16 has."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(DTYPE)

    def around_one(*shape: int) -> Tensor:
        return 1.0 + normal(*shape, scale=0.2)

    n, ci, co, side, latent = case.batch, case.in_channels, case.out_channels, case.size, case.latent_channels
    scale1, scale2 = around_one(latent), around_one(latent)
    identity = torch.eye(latent, dtype=DTYPE, device=device)
    sets = []
    for _ in range(count):
        core = normal(n, latent, latent, scale=latent**-0.5)
        phi = (scale2[:, None] * core + identity) * scale1
        input, grad = normal(n, ci, side, side), normal(n, co, side, side)
        sets.append(
            Set(
                {"nchw": input, "channels_last": input.contiguous(memory_format=torch.channels_last)},
                {"nchw": grad, "channels_last": grad.contiguous(memory_format=torch.channels_last)},
                phi,
                core,
                around_one(n, co),
            )
        )
    return Operands(
        case,
        normal(co, ci, 1, 1, scale=ci**-0.5),
        normal(co, latent, scale=latent**-0.5),
        normal(ci, latent, scale=ci**-0.5),
        scale1,
        scale2,
        around_one(co),
        normal(co),
        sets,
    )
