# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV2 (Sandler et al., 2018) with dynamic convolution decomposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dcd_kernels.interop import sequence
from dcd_kernels.models.common import SQUEEZES, Layers, check_network, check_width
from dcd_kernels.nn.branch import one_of
from dcd_kernels.nn.conv import DCDConv2d
from dcd_kernels.nn.latent import LatentRule

# expansion, output channels, repeats, stride of the first: Table 2 of the MobileNetV2 paper.
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

MakeConv = Callable[..., nn.Module]


def rounded(channels: float, multiple: int = 8) -> int:
    """The multiple of ``multiple`` nearest to ``channels``, never more than 10 % below it."""
    nearest = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return nearest + multiple if nearest < 0.9 * channels else nearest


def normalised(convolution: nn.Module, channels: int, factory: dict) -> nn.Sequential:
    """``convolution``, its norm and ReLU6."""
    return nn.Sequential(convolution, nn.BatchNorm2d(channels, **factory), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3×3, pointwise projection; a skip where the shape stays.

    ``pointwise(in_channels, out_channels)`` and ``depthwise(channels, stride)`` make the convolutions. The
    modules are nested as in torchvision's network, so that its trained W0 load by their keys.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        pointwise: MakeConv,
        depthwise: MakeConv,
        factory: dict,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.skip = stride == 1 and in_channels == out_channels
        expand = [] if expansion == 1 else [normalised(pointwise(in_channels, hidden), hidden, factory)]
        self.conv = nn.Sequential(
            *expand,
            normalised(depthwise(hidden, stride), hidden, factory),
            pointwise(hidden, out_channels),
            nn.BatchNorm2d(out_channels, **factory),
        )

    def forward(self, input: Tensor) -> Tensor:
        output = sequence.run(self.conv, input)
        return input + output if self.skip else output


class MobileNetV2(nn.Module):
    """MobileNetV2 whose bottlenecks and classifier are dynamic; arguments as of :func:`mobilenet_v2`."""

    def __init__(
        self,
        width_mult: float = 1.0,
        num_classes: int = 1000,
        *,
        pointwise: str = "dcd",
        depthwise: str = "static",
        classifier: str = "dcd",
        blocks: int = 1,
        latent_channels: int | str | LatentRule = "released",
        latent_kernel: int | None = None,
        reduction: int | None = None,
        squeeze: str = "wider",
        pool_size: int | Sequence[int] | None = None,
        gate: str | None = "se",
        lam_activation: str | None = "hardsigmoid2",
        classifier_latent_channels: int | str | LatentRule = 32,
        classifier_squeeze_channels: int | None = 32,
        dropout: float = 0.1,
        branch_dropout: float = 0.0,
        in_channels: int = 3,
        stem_channels: int = 32,
        stem_stride: int = 2,
        settings: Sequence[tuple[int, int, int, int]] = SETTINGS,
        last_channels: int = 1280,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_width("mobilenet_v2", width_mult)
        check_network(
            "mobilenet_v2",
            num_classes,
            in_channels,
            pointwise=pointwise,
            depthwise=depthwise,
            classifier=classifier,
        )
        for row in settings:
            if len(row) != 4:
                raise ValueError(
                    f"mobilenet_v2: settings must have rows (expansion, channels, repeats, stride), got {row}"
                )
        one_of("mobilenet_v2: squeeze", squeeze, SQUEEZES)
        if blocks != 1 and pointwise not in ("fusion", "dcd"):
            raise ValueError(f"mobilenet_v2: blocks needs pointwise='fusion' or 'dcd', got {pointwise!r}")
        if reduction is None:
            reduction = 8 if width_mult <= 0.5 else 16
        factory = {"device": device, "dtype": dtype}
        layers = Layers(reduction, squeeze, gate, lam_activation, branch_dropout, factory)

        def make_pointwise(inputs: int, outputs: int, formulation: str = pointwise) -> nn.Module:
            pool = (2 if inputs < outputs else 1) if pool_size is None else pool_size
            return layers.conv(
                formulation, inputs, outputs, latent=latent_channels, blocks=blocks, pool_size=pool
            )

        def make_depthwise(channels: int, stride: int, formulation: str = depthwise) -> nn.Module:
            return layers.conv(
                formulation,
                channels,
                channels,
                3,
                stride,
                groups=channels,
                latent_kernel=latent_kernel,
            )

        static_pointwise = partial(make_pointwise, formulation="static")
        static_depthwise = partial(make_depthwise, formulation="static")

        width = rounded(stem_channels * width_mult)
        stem = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False, **factory)
        features: list[nn.Module] = [normalised(stem, width, factory)]
        for expansion, channels, repeats, first_stride in settings:
            channels = rounded(channels * width_mult)
            for repeat in range(repeats):
                first_block = len(features) == 1
                features.append(
                    InvertedResidual(
                        width,
                        channels,
                        first_stride if repeat == 0 else 1,
                        expansion,
                        static_pointwise if first_block else make_pointwise,
                        static_depthwise if first_block else make_depthwise,
                        factory,
                    )
                )
                width = channels
        last = rounded(last_channels * max(1.0, width_mult))
        features.append(normalised(static_pointwise(width, last), last, factory))
        self.features = nn.Sequential(*features)

        linear = layers.linear(
            classifier,
            last,
            num_classes,
            latent=classifier_latent_channels,
            squeeze_channels=classifier_squeeze_channels,
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernels with variance 2/fan_in, 1/fan_in where no activation follows: the signal keeps its scale.

        With the layers' own start an untrained network in eval mode, whose norms do not normalise yet, gives
        the classifier's bias and nothing of the image.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DCDConv2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, InvertedResidual):
                nn.init.kaiming_normal_(module.conv[-2].weight, nonlinearity="linear")

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(sequence.run(self.features, input).mean((2, 3)))


def mobilenet_v2(width_mult: float = 1.0, num_classes: int = 1000, **options) -> MobileNetV2:
    """MobileNetV2 with DCD on the bottlenecks' pointwise layers and the classifier; random weights.

    Static, as in the released networks: the stem, the first block and the last convolution (320 → 1280). By
    default the form whose parameter counts are the published ones: squeeze-and-excitation gate in the branch,
    2×2 pooling before a layer that expands, latent channels by the rule ``'released'``.

    Args:
        width_mult: multiplies every number of channels (but not the last 1280 downwards).
        num_classes: outputs of the classifier.
        pointwise, depthwise, classifier: formulation of these layers (Table 1): ``'static'`` W0; ``'lam'``
            ΛW0; ``'fusion'`` W0 + PΦQᵀ; ``'dcd'`` ΛW0 + PΦQᵀ. By default ``'dcd'``, ``'static'``, ``'dcd'``,
            the paper's recommendation.
        blocks: diagonal blocks ``B`` of the pointwise layers' residual (Eq. 7, Table 3a).
        latent_channels: of the pointwise layers, a number, a rule's name or a function (Table 2).
        latent_kernel: ``L_k`` of the depthwise layers.
        reduction: ``r`` of the branches; by default 16, and 8 for ``width_mult`` ≤ 0.5.
        squeeze: of the convolutions' branches: ``'wider'``, ``max(Ci, Co) // r``, which the published counts
            follow; or ``'pooled'``, ``max(I, L²) // r`` with ``I`` the pooled numbers, as in the released
            code. At least 4.
        pool_size: of the pointwise layers' branches; by default 2 where a layer expands and 1 elsewhere.
        gate, lam_activation, branch_dropout: of every branch, see :class:`dcd_kernels.nn.DynamicBranch`.
        classifier_latent_channels, classifier_squeeze_channels: 32 and 32, whatever the reduction.
        dropout: before the classifier.
        in_channels, stem_channels, stem_stride, settings, last_channels: shape of the network. For images of
            8 to 32 pixels take ``stem_stride=1`` and fewer strides in ``settings``, whose rows are
            (expansion, channels, repeats, stride).
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        TypeError: a size that is not an integer, a width that is no number.
        ValueError: a size below 1, an unknown formulation, or options that a layer refuses.

    Source: paper, Sections 5.1 to 5.3.
    """
    return MobileNetV2(width_mult, num_classes, **options)
