# SPDX-License-Identifier: BSD-3-Clause
"""What the networks share: the formulations of Table 1, and how their static and dynamic layers are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from dcd_kernels.arguments import check_sizes
from dcd_kernels.nn.branch import one_of
from dcd_kernels.nn.conv import DCDConv2d
from dcd_kernels.nn.latent import (
    LatentRule,
    latent_channels,
    latent_kernel_elements,
    squeeze_channels,
)
from dcd_kernels.nn.linear import DCDLinear

# name of a formulation (Table 1 of the DCD paper) -> what the layer has
FORMULATIONS: dict[str, dict[str, bool] | None] = {
    "static": None,
    "lam": {"channel_attention": True, "channel_fusion": False},
    "fusion": {"channel_attention": False, "channel_fusion": True},
    "dcd": {"channel_attention": True, "channel_fusion": True},
}

# "wider": max(Ci, Co) // r, which the published counts of MobileNetV2 follow.
# "pooled": max(I, L²) // r with I the numbers that the branch pools to, as in the released networks.
SQUEEZES = ("wider", "pooled")


def check_width(caller: str, width_mult: float) -> None:
    if not isinstance(width_mult, (int, float)):
        raise TypeError(f"{caller}: width_mult must be a number, got {width_mult!r}")
    if not width_mult > 0:
        raise ValueError(f"{caller}: width_mult must be positive, got {width_mult}")


def check_network(caller: str, num_classes: int, in_channels: int, **formulations: str) -> None:
    """Raise unless there are classes and channels and every formulation is a known one."""
    check_sizes(caller, num_classes=num_classes, in_channels=in_channels)
    for argument, value in formulations.items():
        one_of(f"{caller}: {argument}", value, list(FORMULATIONS))


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network, static or dynamic, without biases on convolutions.

    ``reduction``, ``gate``, ``lam_activation`` and ``branch_dropout`` are those of
    :class:`dcd_kernels.nn.DCDConv2d`; ``squeeze`` is one of ``SQUEEZES``; ``factory`` has device and dtype.
    """

    reduction: int = 16
    squeeze: str = "wider"
    gate: str | None = "se"
    lam_activation: str | None = "hardsigmoid2"
    branch_dropout: float = 0.0
    factory: dict = field(default_factory=dict)

    def branch_options(self) -> dict:
        return {
            "reduction": self.reduction,
            "gate": self.gate,
            "lam_activation": self.lam_activation,
            "branch_dropout": self.branch_dropout,
        }

    def conv(
        self,
        formulation: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        latent: int | str | LatentRule = "halving",
        latent_kernel: int | None = None,
        blocks: int | None = None,
        joint: bool = False,
        pool_size: int | Sequence[int] = 1,
    ) -> nn.Module:
        """An ``nn.Conv2d`` or a ``DCDConv2d`` with padding ``kernel_size // 2``."""
        arguments = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        if FORMULATIONS[formulation] is None:
            return nn.Conv2d(*arguments, groups=groups, bias=False, **self.factory)
        fuses, depthwise = FORMULATIONS[formulation]["channel_fusion"], groups > 1 and groups == in_channels
        squeeze = None
        if self.squeeze == "pooled":
            # L² of one block stands for Φ, as in the formula; a depthwise Φ, L_k², is never the wider one
            size = 0
            if fuses and not depthwise:
                size = latent_channels(
                    latent,
                    in_channels,
                    out_channels,
                    blocks=blocks or 1,
                    latent_kernel=(latent_kernel or latent_kernel_elements((kernel_size,) * 2))
                    if joint
                    else 1,
                )
            pooled = in_channels * (pool_size**2 if isinstance(pool_size, int) else math.prod(pool_size))
            squeeze = squeeze_channels(pooled, size**2, self.reduction)
        return DCDConv2d(
            *arguments,
            groups=groups,
            bias=False,
            latent_channels=latent,
            latent_kernel=latent_kernel,
            blocks=blocks,
            joint=joint and fuses,
            squeeze_channels=squeeze,
            pool_size=pool_size,
            **FORMULATIONS[formulation],
            **self.branch_options(),
            **self.factory,
        )

    def linear(
        self,
        formulation: str,
        in_features: int,
        out_features: int,
        *,
        latent: int | str | LatentRule,
        squeeze_channels: int | None,
    ) -> nn.Module:
        """An ``nn.Linear`` or a ``DCDLinear``, with bias."""
        if FORMULATIONS[formulation] is None:
            return nn.Linear(in_features, out_features, **self.factory)
        return DCDLinear(
            in_features,
            out_features,
            latent_channels=latent,
            squeeze_channels=squeeze_channels,
            **FORMULATIONS[formulation],
            **self.branch_options(),
            **self.factory,
        )
