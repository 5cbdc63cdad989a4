# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise op on packed weights, and the op that packs them (csrc/ops_packed.cpp).

Packed weights are constants: a call that is to be differentiated runs as `pointwise` on the tensors that are
taken out of them, so that gradients reach the input, phi, lam, bias and residual.
"""

import torch
from torch import Tensor

from ..packing import PANEL, unpack
from . import autograd, fakes

OP = torch.ops.dcd_kernels.pointwise_packed.default


def compose(
    input: Tensor,
    packed: Tensor,
    out_channels: int,
    latent_channels: int,
    phi: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """The same by `pointwise`."""
    weight, p, q = unpack(packed, input.shape[1], out_channels, latent_channels)
    if weight.dtype != input.dtype:
        weight, p, q = (None if t is None else t.to(input.dtype) for t in (weight, p, q))
    return torch.ops.dcd_kernels.pointwise(input, weight, p, phi, q, lam, bias, residual, activation)


class Function:
    """Stands where other ops have their autograd.Function."""

    @staticmethod
    def apply(_keyset, *args) -> Tensor:
        return compose(*args)


def _fake(input, packed, out_channels, latent_channels, phi, lam, bias, residual, activation):
    return fakes.empty_map(input, out_channels, input.shape[2:])


def _fake_pack(weight, p, q):
    out_channels, in_channels = weight.shape
    latent = 0 if p is None else p.shape[1]
    panels, row = -(-out_channels // PANEL), -(-latent // PANEL) * PANEL
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return weight.new_empty((panels * PANEL * (in_channels + latent) + in_channels * row,), dtype=dtype)


def register(library: torch.library.Library) -> None:
    """Registers fake implementations and what is differentiated."""
    torch.library.register_fake("dcd_kernels::pointwise_packed", _fake, lib=library)
    torch.library.register_fake("dcd_kernels::pack_pointwise", _fake_pack, lib=library)
    autograd.register_composition(library, OP, compose)
