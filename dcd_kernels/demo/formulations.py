# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise DCD layer as one writes it in plain PyTorch, three times.

All compute y_n = act((Λ_n W0 + P Φ_n Qᵀ) x_n + bias). They differ in what they hold in memory on the way: the
materialised ones a weight matrix per sample, (N, Co, Ci); the factored one every intermediate product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd_kernels.nn.layer import DCDLayer

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}

# (input (N, Ci, H, W), weight (Co, Ci), p (Co, L), phi (N, L, L), q (Ci, L), lam (N, Co)) -> (N, Co, H, W)
Formulation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def sample_weights(weight: Tensor, p: Tensor, phi: Tensor, q: Tensor, lam: Tensor) -> Tensor:
    """W_n = Λ_n W0 + P Φ_n Qᵀ, (N, Co, Ci)."""
    return torch.addcmul(p @ phi @ q.t(), lam[:, :, None], weight)


def grouped_convolution(input, weight, p, phi, q, lam) -> Tensor:
    """One convolution with N groups, the samples side by side as channels: what most dynamic layers do."""
    n, in_channels, height, width = input.shape
    kernels = sample_weights(weight, p, phi, q, lam).reshape(-1, in_channels, 1, 1)
    stacked = input.reshape(1, n * in_channels, height, width)
    return F.conv2d(stacked, kernels, groups=n).view(n, -1, height, width)


def batched_product(input, weight, p, phi, q, lam) -> Tensor:
    """``torch.bmm`` of the per-sample weights with the pixels."""
    y = torch.bmm(sample_weights(weight, p, phi, q, lam), input.flatten(2))
    return y.unflatten(2, input.shape[2:])


def factored(input, weight, p, phi, q, lam) -> Tensor:
    """λ ⊙ (W0 x) + P (Φ (Qᵀ x)), one operation after the other: what the paper's released code does."""
    latent = F.conv2d(input, q.t()[:, :, None, None])
    fused = torch.bmm(phi, latent.flatten(2)).view_as(latent)
    static = F.conv2d(input, weight[:, :, None, None])
    return torch.addcmul(F.conv2d(fused, p[:, :, None, None]), lam[:, :, None, None], static)


class PlainLayer(nn.Module):
    """A pointwise or linear DCD layer, with the same branch and parameters, computed by ``formulation``."""

    def __init__(self, layer: DCDLayer, formulation: Formulation) -> None:
        super().__init__()
        pointwise = layer.weight.dim() == 2 or set(layer.weight.shape[2:]) == {1}
        if not pointwise or layer.blocks != 1 or layer.p is None or layer.branch.lam_channels == 0:
            raise ValueError(f"layer must be pointwise or linear, with λ, Φ and one block, got {layer}")
        self.layer = layer
        self.formulation = formulation

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        lam, phi = layer.coefficients(input)
        linear = input.dim() == 2
        pixels = input[:, :, None, None] if linear else input
        y = self.formulation(pixels, layer.weight.flatten(1), layer.p, phi, layer.q, lam)
        if layer.bias is not None:
            y = y + layer.bias[:, None, None]
        y = ACTIVATIONS[layer.activation](y)
        return y[:, :, 0, 0] if linear else y


def rewritten(network: nn.Module, formulation: Formulation) -> nn.Module:
    """``network`` with every DCD layer computed by ``formulation``; a new module on the same parameters."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    plain = copy.deepcopy(network, shared)
    for name, module in list(plain.named_modules()):
        if isinstance(module, DCDLayer):
            plain.set_submodule(name, PlainLayer(module, formulation))
    return plain
