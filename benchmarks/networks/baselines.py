# SPDX-License-Identifier: BSD-3-Clause
"""The dynamic convolutions that DCD is compared with, as MobileNetV2: DY-Conv and CondConv.

Both mix K kernels by numbers π(x) from the pooled input, W(x) = Σ_k π_k W_k (paper, Section 2)::

    DY-Conv     π = softmax(A₂ relu(A₁ mean(x)) / τ)    K = 4, all convolutions of the blocks
    CondConv    π = sigmoid(A mean(x))                  K = 8, and the last convolution and the classifier

A₁ narrows to a quarter; τ is 1, where its annealing ends. With these places the parameters come nearest to
those of the paper's Table 4a (Chen et al., CVPR 2020; Yang et al., NeurIPS 2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DY_CONV, CONDCONV = "DY-Conv", "CondConv"
EXPERTS = {DY_CONV: 4, CONDCONV: 8}
REDUCTION = 4


class Mixture(nn.Module):
    """A convolution or linear layer whose kernel is a mixture of K, of the shape and geometry of ``layer``.

    Args:
        layer: its weights are not used.
        kind: of ``EXPERTS``.

    Shapes:
        as those of ``layer``; (N, C) where that is linear.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind, experts = kind, EXPERTS[kind]
        self.linear = isinstance(layer, nn.Linear)
        if not self.linear:
            self.geometry = {"stride": layer.stride, "padding": layer.padding}
            self.groups = layer.groups
        self.pointwise = not self.linear and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
        inputs, outputs = layer.weight.shape[1] * getattr(layer, "groups", 1), layer.weight.shape[0]
        fan_in = layer.weight[0].numel()
        self.shape = layer.weight.shape
        # a matrix, which has no memory format of its own
        self.weight = nn.Parameter(torch.randn(experts, layer.weight.numel()) * (2 / fan_in) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(experts, outputs)) if layer.bias is not None else None
        if kind == CONDCONV:
            self.router = nn.Sequential(nn.Linear(inputs, experts), nn.Sigmoid())
        else:
            narrow = max(1, inputs // REDUCTION)
            self.router = nn.Sequential(
                nn.Linear(inputs, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, experts), nn.Softmax(1)
            )

    def forward(self, input: Tensor) -> Tensor:
        shares = self.router(input if self.linear else input.mean((2, 3)))
        weights = (shares @ self.weight).view(-1, *self.shape)
        if self.linear:
            output = (weights @ input[:, :, None]).flatten(1)
            return output if self.bias is None else output + shares @ self.bias
        samples, size = input.shape[0], input.shape[2:]
        if self.pointwise:
            return (weights.flatten(2) @ input.flatten(2)).unflatten(2, size)
        output = F.conv2d(
            input.reshape(1, -1, *size), weights.flatten(0, 1), groups=samples * self.groups, **self.geometry
        )
        return output.reshape(samples, -1, *output.shape[2:])


def make_dynamic(network: nn.Module, kind: str) -> nn.Module:
    """``network``, a static MobileNetV2, with mixtures in the places of its layers; changed where it is.

    Raises:
        ValueError: ``kind`` is not one of ``EXPERTS``.
    """
    if kind not in EXPERTS:
        raise ValueError(f"make_dynamic: kind must be one of {tuple(EXPERTS)}, got {kind!r}")
    left = ("features.0.",) if kind == CONDCONV else ("features.0.", "conv.", "classifier.")
    for name, module in list(network.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith(left):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, Mixture(module, kind))
    return network
