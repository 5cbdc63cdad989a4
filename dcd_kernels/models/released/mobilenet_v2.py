# SPDX-License-Identifier: BSD-3-Clause
"""MobileNetV2 (Sandler et al., 2018) as in the released code of the DCD paper."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dcd_kernels.arguments import check_sizes
from dcd_kernels.models.common import check_network, check_width
from dcd_kernels.models.mobilenet_v2 import SETTINGS, normalised, rounded
from dcd_kernels.models.released.common import initialise, make_classifier
from dcd_kernels.models.released.layers import PointwiseConv


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3×3, pointwise projection, all in one list, which numbers the keys."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        pointwise: Callable[[int, int], nn.Module],
        factory: dict,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.skip = stride == 1 and in_channels == out_channels
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False, **factory)
        self.conv = nn.Sequential(
            *([] if expansion == 1 else normalised(pointwise(in_channels, hidden), hidden, factory)),
            *normalised(depthwise, hidden, factory),
            pointwise(hidden, out_channels),
            nn.BatchNorm2d(out_channels, **factory),
        )

    def forward(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return input + output if self.skip else output


class ReleasedMobileNetV2(nn.Module):
    """MobileNetV2 in the released form; arguments as of :func:`mobilenet_v2`."""

    def __init__(
        self,
        width_mult: float = 1.0,
        num_classes: int = 1000,
        *,
        dynamic: bool = True,
        fc_squeeze: int | None = None,
        dropout: float | None = 0.1,
        in_channels: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_width("mobilenet_v2", width_mult)
        check_network("mobilenet_v2", num_classes, in_channels)
        if fc_squeeze is None:
            fc_squeeze = 8 if width_mult <= 0.5 else 16
        check_sizes("mobilenet_v2", fc_squeeze=fc_squeeze)
        factory = {"device": device, "dtype": dtype}
        # the one width of the released code whose channels are not multiples of 8
        multiple = 4 if width_mult == 0.1 else 8

        def static(inputs: int, outputs: int) -> nn.Module:
            return nn.Conv2d(inputs, outputs, 1, bias=False, **factory)

        def pointwise(inputs: int, outputs: int) -> nn.Module:
            return PointwiseConv(inputs, outputs, fc_squeeze, **factory)

        width = rounded(32 * width_mult, multiple)
        stem = nn.Conv2d(in_channels, width, 3, 2, 1, bias=False, **factory)
        features: list[nn.Module] = [normalised(stem, width, factory)]
        for expansion, channels, repeats, first_stride in SETTINGS:
            outputs = rounded(channels * width_mult, multiple)
            # the block that does not expand is static
            make = pointwise if dynamic and expansion > 1 else static
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                features.append(InvertedResidual(width, outputs, stride, expansion, make, factory))
                width = outputs
        self.features = nn.Sequential(*features)
        last = rounded(1280 * max(1.0, width_mult), multiple)
        self.conv = normalised(static(width, last), last, factory)
        self.classifier = make_classifier(last, num_classes, dynamic, dropout, factory)
        blocks = [feature for feature in features if isinstance(feature, InvertedResidual)]
        initialise(self, last=[block.conv[-2] for block in blocks])

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.conv(self.features(input)).mean((2, 3)))


def mobilenet_v2(width_mult: float = 1.0, num_classes: int = 1000, **options) -> ReleasedMobileNetV2:
    """MobileNetV2 as in the released code, whose checkpoints load by their keys; random weights.

    Dynamic are the pointwise layers of all blocks that expand, and the classifier; static the stem, the first
    block and the last convolution. In plain PyTorch, in a dozen passes a layer;
    ``dcd_kernels.models.mobilenet_v2`` is the paper's form on the fused kernels.

    Args:
        width_mult: multiplies every number of channels (but not the last 1280 downwards).
        num_classes: outputs of the classifier.
        dynamic: False gives the static twin, plain convolutions and a plain linear layer in the same places.
        fc_squeeze: by what the branches narrow their input; by default 16, and 8 for ``width_mult`` ≤ 0.5,
            which are the published sizes. It must be what the checkpoint was trained with.
        dropout: before the classifier. None leaves the module out, so that the classifier's keys start with
            ``classifier.0`` and not with ``classifier.1``; a checkpoint decides it.
        in_channels: of the image.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        ValueError: ``width_mult`` not positive, ``num_classes`` or ``fc_squeeze`` below 1.

    Source: paper, Sections 5.1 to 5.3; names and sizes of the released code.
    """
    return ReleasedMobileNetV2(width_mult, num_classes, **options)
