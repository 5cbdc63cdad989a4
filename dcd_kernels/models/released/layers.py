# SPDX-License-Identifier: BSD-3-Clause
"""The dynamic layers of the released networks, one operation after the other in plain PyTorch.

All have two norms of the latent and a latent residual, which Eq. 6 has not. With λ = relu6(s + 3)/3, between
0 and 2, and s and Φ from a branch that sees the pooled input::

    z1 = bn1(Qᵀx)        z = bn2(Φ z1) + z1        y = λ ⊙ (W0 * x) + P z

The submodules have the names of the released checkpoints, and their order, by which an optimizer keeps its
state. Somebody's own copy of these layers looks like this too, so nothing here knows of the fused kernels.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd_kernels.arguments import check_sizes
from dcd_kernels.nn.latent import SMALLEST_SQUEEZE, released, squeeze_channels


def _twice_hardsigmoid(input: Tensor) -> Tensor:
    return F.relu6(input + 3) / 3


class _Gate(nn.Module):
    """``h ⊙ relu6(W h + 3)/3``."""

    def __init__(self, channels: int, factory: dict) -> None:
        super().__init__()
        # a list of one: the released keys have an index here
        self.fc = nn.Sequential(nn.Linear(channels, channels, bias=False, **factory))

    def forward(self, input: Tensor) -> Tensor:
        return input * _twice_hardsigmoid(self.fc(input))


class ReleasedLayer(nn.Module):
    """What the four layers share: their parts, and the branch. ``static``, ``q`` and ``p`` are W0, Qᵀ and P.

    Attributes:
        in_channels, out_channels: of the layer.
        latent_channels: ``L``.
        squeeze_channels: width of the branch between its FCs.
    """

    # names of the submodules in their order
    order: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        static: nn.Module,
        q: nn.Module,
        p: nn.Module,
        bn1: nn.Module,
        *,
        sizes: tuple[int, int, int],
        pooled: int,
        squeeze_channels: int,
        factory: dict,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.latent_channels = sizes
        self.squeeze_channels = squeeze_channels
        branch = {"bias": False, **factory}
        parts = {
            "conv": static,
            "q": q,
            "p": p,
            "bn1": bn1,
            "bn2": nn.BatchNorm1d(self.latent_channels, **factory),
            "fc": nn.Sequential(
                nn.Linear(pooled, squeeze_channels, **branch), _Gate(squeeze_channels, factory)
            ),
            "fc_phi": nn.Linear(squeeze_channels, self.latent_channels**2, **branch),
            "fc_scale": nn.Linear(squeeze_channels, self.out_channels, **branch),
        }
        for name in self.order:
            # cls stands for conv; conv_q, cls_q for q
            part = "conv" if name == "cls" else name.removeprefix("conv_").removeprefix("cls_")
            self.add_module(name, parts[part])

    @property
    def static(self) -> nn.Module:
        return self.conv

    def coefficients(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """λ ``(N, out_channels)`` and Φ ``(N, L, L)`` from the pooled input ``(N, I)``."""
        squeezed = self.fc(pooled)
        phi = self.fc_phi(squeezed).reshape(-1, self.latent_channels, self.latent_channels)
        return _twice_hardsigmoid(self.fc_scale(squeezed)), phi


class _ReleasedConv(ReleasedLayer):
    """A layer on a map ``(N, C, H, W)``; Q is 1×1 and takes the stride of the static convolution."""

    order = ("conv", "q", "p", "bn1", "bn2", "fc", "fc_phi", "fc_scale")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        *,
        pool_size: int,
        latent_channels: int,
        squeeze_channels: int,
        factory: dict,
    ) -> None:
        plain = {"bias": False, **factory}
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, **plain),
            nn.Conv2d(in_channels, latent_channels, 1, stride, **plain),
            nn.Conv2d(latent_channels, out_channels, 1, **plain),
            nn.BatchNorm2d(latent_channels, **factory),
            sizes=(in_channels, out_channels, latent_channels),
            pooled=in_channels * pool_size**2,
            squeeze_channels=squeeze_channels,
            factory=factory,
        )
        self.pool = nn.AdaptiveAvgPool2d(pool_size)

    def forward(self, input: Tensor) -> Tensor:
        lam, phi = self.coefficients(self.pool(input).flatten(1))
        normalised = self.bn1(self.q(input))
        pixels = normalised.flatten(2)
        latent = self.bn2(phi @ pixels) + pixels
        # W0's part first: its memory format is the sum's
        return lam[:, :, None, None] * self.conv(input) + self.p(latent.reshape(normalised.shape))


class BottleneckConv(_ReleasedConv):
    """k×k convolution of a bottleneck block: Φ and λ from the mean of the map.

    ``y = λ ⊙ (W0 * x) + P (bn2(Φ z1) + z1)`` with ``z1 = bn1(Qᵀx)``, ``L = ⌊√in_channels⌋`` and a squeeze of
    ``in_channels // 16``. Below 16 channels that squeeze is 0: then Φ = 0 and λ = 1.

    Args:
        in_channels, out_channels: channels of the input and the output.
        kernel_size: odd; the padding is ``kernel_size // 2``.
        stride: of W0 and Q.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).

    Raises:
        TypeError: channels or a stride that are no integers.
        ValueError: channels or a stride below 1, or an even kernel, whose map Q's would not fit.

    Keys: ``conv q p bn1 bn2 fc.0 fc.1.fc.0 fc_phi fc_scale``. Source: paper, Section 5.1, Fig. 4b for k > 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes("BottleneckConv", in_channels=in_channels, out_channels=out_channels, stride=stride)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"BottleneckConv: kernel_size must be odd and positive, got {kernel_size}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            pool_size=1,
            latent_channels=math.isqrt(in_channels),
            squeeze_channels=in_channels // 16,
            factory={"device": device, "dtype": dtype},
        )


class BasicConv(_ReleasedConv):
    """3×3 convolution of a basic block: Φ and λ from 2×2 regions of the map.

    ``y = λ ⊙ (W0 * x) + P (bn2(Φ z1) + z1)`` with ``z1 = bn1(Qᵀx)``. The branch sees ``I = 4·in_channels``
    numbers: ``L = ⌊√I⌋`` and a squeeze of ``I // 16``, at least 4.

    Args:
        in_channels, out_channels: channels of the input and the output.
        stride: of W0 and Q.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).

    Raises:
        TypeError: channels or a stride that are no integers.
        ValueError: channels or a stride below 1.

    Keys: ``conv q p bn1 bn2 fc.0 fc.1.fc.0 fc_phi fc_scale``. Source: paper, Section 5.1, Fig. 4b.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes("BasicConv", in_channels=in_channels, out_channels=out_channels, stride=stride)
        pooled = 4 * in_channels
        super().__init__(
            in_channels,
            out_channels,
            3,
            stride,
            pool_size=2,
            latent_channels=math.isqrt(pooled),
            squeeze_channels=max(pooled // 16, SMALLEST_SQUEEZE),
            factory={"device": device, "dtype": dtype},
        )


class PointwiseConv(_ReleasedConv):
    """1×1 convolution of an inverted residual: Φ and λ from 2×2 regions where it expands, else the mean.

    ``y = λ ⊙ (W0 x) + P (bn2(Φ z1) + z1)`` with ``z1 = bn1(Qᵀx)``. ``L`` by the rule
    :func:`dcd_kernels.nn.latent.released`. The branch sees ``I`` numbers, ``4·in_channels`` where
    ``in_channels < out_channels`` and ``in_channels`` elsewhere; its squeeze is ``max(I, L²) // fc_squeeze``,
    at least 4.

    Args:
        in_channels, out_channels: channels of the input and the output.
        fc_squeeze: by what the branch narrows its input.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, out_channels, H, W).

    Raises:
        ValueError: channels or ``fc_squeeze`` below 1.

    Keys: ``conv conv_q conv_p bn1 bn2 fc.0 fc.1.fc.0 fc_phi fc_scale``. Source: paper, Eq. 6 and Section 5.1.
    """

    order = ("conv", "conv_q", "fc", "fc_phi", "fc_scale", "conv_p", "bn1", "bn2")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        fc_squeeze: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(
            "PointwiseConv", in_channels=in_channels, out_channels=out_channels, fc_squeeze=fc_squeeze
        )
        pool_size = 2 if in_channels < out_channels else 1
        latent = released(in_channels, out_channels)
        super().__init__(
            in_channels,
            out_channels,
            1,
            1,
            pool_size=pool_size,
            latent_channels=latent,
            squeeze_channels=squeeze_channels(in_channels * pool_size**2, latent**2, fc_squeeze),
            factory={"device": device, "dtype": dtype},
        )

    @property
    def q(self) -> nn.Module:
        return self.conv_q

    @property
    def p(self) -> nn.Module:
        return self.conv_p


class Classifier(ReleasedLayer):
    """Linear layer that ends a network; unlike in the ops, λ scales the bias too.

    ``y = λ ⊙ (W0 x + b) + P (bn2(Φ z1) + z1)`` with ``z1 = bn1(Qᵀx)``; Φ and λ from x. ``L`` and the
    squeeze are 32.

    Args:
        in_features, out_features: numbers in and out.
        device, dtype: of the parameters.

    Shapes:
        (N, in_features) → (N, out_features). In training N is 2 at least, as the norms need.

    Raises:
        ValueError: features below 1.

    Keys: ``cls cls_q cls_p bn1 bn2 fc.0 fc.1.fc.0 fc_phi fc_scale``. Source: paper, Section 5.1.
    """

    order = ("cls", "cls_q", "cls_p", "fc", "fc_phi", "fc_scale", "bn1", "bn2")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes("Classifier", in_features=in_features, out_features=out_features)
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Linear(in_features, out_features, **factory),
            nn.Linear(in_features, 32, bias=False, **factory),
            nn.Linear(32, out_features, bias=False, **factory),
            nn.BatchNorm1d(32, **factory),
            sizes=(in_features, out_features, 32),
            pooled=in_features,
            squeeze_channels=32,
            factory=factory,
        )

    @property
    def static(self) -> nn.Module:
        return self.cls

    @property
    def q(self) -> nn.Module:
        return self.cls_q

    @property
    def p(self) -> nn.Module:
        return self.cls_p

    def forward(self, input: Tensor) -> Tensor:
        lam, phi = self.coefficients(input)
        normalised = self.bn1(self.q(input))
        latent = self.bn2((phi @ normalised[:, :, None]).flatten(1)) + normalised
        return lam * self.cls(input) + self.p(latent)
