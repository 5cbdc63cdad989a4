# SPDX-License-Identifier: BSD-3-Clause
"""ResNet (He et al., 2016) with dynamic convolution decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcd_kernels.models.common import SQUEEZES, Layers, check_network
from dcd_kernels.nn.branch import one_of
from dcd_kernels.nn.conv import DCDConv2d
from dcd_kernels.nn.latent import LatentRule

STAGE_CHANNELS = (64, 128, 256, 512)
BOTTLENECK_STRIDES = ("3x3", "1x1")


class Convolutions:
    """Makes what blocks consist of, here in a static network; subclasses say what ``dynamic`` is."""

    def __init__(self, factory: dict) -> None:
        self.factory = factory

    def dynamic(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        return self.static(in_channels, out_channels, kernel_size, stride)

    def static(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        sizes = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        return nn.Conv2d(*sizes, bias=False, **self.factory)

    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **self.factory)

    def shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
        if stride == 1 and in_channels == out_channels:
            return None
        return nn.Sequential(self.static(in_channels, out_channels, 1, stride), self.norm(out_channels))


class _DCDConvolutions(Convolutions):
    """With DCD layers: the formulation, and the sizes that depend on the layer."""

    def __init__(
        self,
        layers: Layers,
        formulation: str,
        latent: int | str | LatentRule | None,
        latent_kernel: int | None,
        blocks: int,
        joint: bool,
        pool_size: int | Sequence[int],
    ) -> None:
        super().__init__(layers.factory)
        self.layers = layers
        self.formulation = formulation
        self.latent = latent
        self.latent_kernel = latent_kernel
        self.blocks = blocks
        self.joint = joint
        self.pool_size = pool_size

    def root(self, in_channels: int, out_channels: int) -> int:
        """``L = ⌊√I⌋`` with ``I`` the numbers that the branch pools its input to."""
        bins = self.pool_size**2 if isinstance(self.pool_size, int) else math.prod(self.pool_size)
        return max(1, math.isqrt(in_channels * bins))

    def dynamic(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        joint = self.joint and kernel_size > 1
        return self.layers.conv(
            self.formulation,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            latent=self.root if self.latent is None else self.latent,
            latent_kernel=self.latent_kernel if joint else None,
            blocks=self.blocks,
            joint=joint,
            pool_size=self.pool_size,
        )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut. The modules are named as in torchvision's network."""

    expansion = 1
    # the released form, which the published counts follow: Φ and λ from 2×2 regions
    pool_size = 2

    def __init__(
        self, in_channels: int, channels: int, stride: int, make: Convolutions, _: str = "3x3"
    ) -> None:
        super().__init__()
        self.conv1 = make.dynamic(in_channels, channels, 3, stride)
        self.bn1 = make.norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = make.dynamic(channels, channels, 3)
        self.bn2 = make.norm(channels)
        self.downsample = make.shortcut(in_channels, channels, stride)

    @property
    def last(self) -> nn.Module:
        """The convolution that the shortcut is added to."""
        return self.conv2

    def forward(self, input: Tensor) -> Tensor:
        shortcut = input if self.downsample is None else self.downsample(input)
        output = self.relu(self.bn1(self.conv1(input)))
        return self.relu(self.bn2(self.conv2(output)) + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut. The modules are named as in torchvision's network."""

    expansion = 4
    pool_size = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, make: Convolutions, stride_at: str = "3x3"
    ) -> None:
        super().__init__()
        outputs = channels * self.expansion
        first, second = (stride, 1) if stride_at == "1x1" else (1, stride)
        self.conv1 = make.dynamic(in_channels, channels, 1, first)
        self.bn1 = make.norm(channels)
        self.conv2 = make.dynamic(channels, channels, 3, second)
        self.bn2 = make.norm(channels)
        self.conv3 = make.dynamic(channels, outputs, 1)
        self.bn3 = make.norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make.shortcut(in_channels, outputs, stride)

    @property
    def last(self) -> nn.Module:
        """The convolution that the shortcut is added to."""
        return self.conv3

    def forward(self, input: Tensor) -> Tensor:
        shortcut = input if self.downsample is None else self.downsample(input)
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        return self.relu(self.bn3(self.conv3(output)) + shortcut)


class ResNet(nn.Module):
    """ResNet whose blocks' convolutions are dynamic; options as of :func:`resnet18`."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        convolutions: str = "dcd",
        classifier: str = "static",
        blocks: int = 1,
        joint: bool = False,
        latent_channels: int | str | LatentRule | None = None,
        latent_kernel: int | None = None,
        reduction: int = 16,
        squeeze: str = "pooled",
        pool_size: int | Sequence[int] | None = None,
        gate: str | None = "se",
        lam_activation: str | None = "hardsigmoid2",
        classifier_latent_channels: int | str | LatentRule = 32,
        classifier_squeeze_channels: int | None = 32,
        dropout: float = 0.0,
        branch_dropout: float = 0.0,
        bottleneck_stride: str = "3x3",
        in_channels: int = 3,
        channels: Sequence[int] = STAGE_CHANNELS,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        stem_pool: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_network("resnet", num_classes, in_channels, convolutions=convolutions, classifier=classifier)
        one_of("resnet: squeeze", squeeze, SQUEEZES)
        one_of("resnet: bottleneck_stride", bottleneck_stride, BOTTLENECK_STRIDES)
        if len(depths) != len(channels) or not depths or min(*depths, *channels) < 1:
            raise ValueError(
                "resnet: channels must have a positive number for each stage, "
                f"got {tuple(channels)} for depths {tuple(depths)}"
            )
        if stem_kernel % 2 == 0:
            raise ValueError(f"resnet: stem_kernel must be odd, got {stem_kernel}")
        fuses = convolutions in ("fusion", "dcd")
        for argument, value, default in (("blocks", blocks, 1), ("joint", joint, False)):
            if value != default and not fuses:
                raise ValueError(
                    f"resnet: {argument}={value} needs convolutions='fusion' or 'dcd', got {convolutions!r}"
                )
        if joint and blocks != 1:
            raise ValueError(f"resnet: joint has no blocks (Eq. 9 has no sparse form), got blocks={blocks}")
        if latent_kernel is not None and not joint:
            raise ValueError(f"resnet: latent_kernel needs joint=True, got {latent_kernel} without")

        factory = {"device": device, "dtype": dtype}
        layers = Layers(reduction, squeeze, gate, lam_activation, branch_dropout, factory)
        make = _DCDConvolutions(
            layers,
            convolutions,
            latent_channels,
            latent_kernel,
            blocks,
            joint,
            block.pool_size if pool_size is None else pool_size,
        )
        width = channels[0]
        stem = (in_channels, width, stem_kernel, stem_stride, stem_kernel // 2)
        self.conv1 = nn.Conv2d(*stem, bias=False, **factory)
        self.bn1 = make.norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        self.stages: list[str] = []
        for stage, (depth, outputs) in enumerate(zip(depths, channels, strict=True)):
            members = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                members.append(block(width, outputs, stride, make, bottleneck_stride))
                width = outputs * block.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*members))
        self.dropout = nn.Dropout(dropout)
        self.fc = layers.linear(
            classifier,
            width,
            num_classes,
            latent=classifier_latent_channels,
            squeeze_channels=classifier_squeeze_channels,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernels with variance 2/fan_in; the last of each of n blocks 1/(n·fan_in).

        An untrained network in eval mode, whose norms do not normalise yet, would otherwise double its power
        with every shortcut: here all blocks together give it (1 + 1/n)ⁿ at most. In training the norms take
        the scale out. P has variance 1/L² (and the last of a block 1/(n·L²)): Φ adds up L latent channels, up
        to 45 here, and grows with the features itself, so that a wide residual would feed itself.
        """
        blocks = [block for name in self.stages for block in self.get_submodule(name)]
        last = {block.last for block in blocks}
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DCDConv2d)):
                shrink = len(blocks) ** -0.5 if module in last else 1.0
                fan_in = module.weight[0].numel() * (1 if module in last else 0.5)
                nn.init.normal_(module.weight, std=shrink * fan_in**-0.5)
                if isinstance(module, DCDConv2d) and module.channel_fusion:
                    latents = module.latent_channels * (module.latent_kernel or 1)
                    nn.init.normal_(module.p, std=shrink / latents)

    def forward(self, input: Tensor) -> Tensor:
        output = self.maxpool(self.relu(self.bn1(self.conv1(input))))
        for name in self.stages:
            output = self.get_submodule(name)(output)
        return self.fc(self.dropout(output.mean((2, 3))))


def resnet10(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-10, one basic block a stage; options as of :func:`resnet18`. Source: paper, Table 4b."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, **options)


def resnet18(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-18 with DCD on the 3×3 convolutions of the blocks; random weights.

    By default the paper's recommendation: channel fusion alone, a 1×1 dynamic residual at the centre tap
    (Fig. 4b), and Λ. Static are the stem and the shortcuts' 1×1 convolutions, as in the released networks,
    and the classifier. Modules are named as in torchvision's networks, so that their trained W0 load by key.

    Args:
        num_classes: outputs of the classifier.
        convolutions, classifier: formulation of these layers (Table 1): ``'static'`` W0; ``'lam'`` ΛW0;
            ``'fusion'`` W0 + PΦQᵀ; ``'dcd'`` ΛW0 + PΦQᵀ. The released networks have ``classifier='dcd'``.
        blocks: diagonal blocks ``B`` of the residual (Eq. 7).
        joint: joint fusion of channels and kernel elements in the 3×3 convolutions (Eq. 9; Section 5.2).
        latent_channels: a number, a rule's name or a function; by default ``⌊√I⌋``, with ``I`` the numbers
            that a branch pools its input to, ``4·in_channels`` in basic blocks and ``in_channels`` in
            bottlenecks. Under ``joint`` of ``C / L_k``.
        latent_kernel: ``L_k`` of the joint form.
        reduction: ``r`` of the branches.
        squeeze: of the convolutions' branches: ``'pooled'``, ``max(I, L²) // r``, which the published counts
            follow, or ``'wider'``, ``max(Ci, Co) // r``. At least 4.
        pool_size: of the convolutions' branches; by default 2 in basic blocks and 1 in bottlenecks.
        gate, lam_activation, branch_dropout: of every branch, see :class:`dcd_kernels.nn.DynamicBranch`.
        classifier_latent_channels, classifier_squeeze_channels: 32 and 32, whatever the reduction.
        dropout: before the classifier; the paper has 0.1 for ResNet-50, 0 for the others.
        bottleneck_stride: where a bottleneck has its stride: in the ``'3x3'`` (torchvision, released), or in
            the first ``'1x1'`` (He et al.; the published static multiply-adds).
        in_channels, channels, stem_kernel, stem_stride, stem_pool: shape of the network. For images of 8 to
            32 pixels take ``stem_kernel=3, stem_stride=1, stem_pool=False``; ``channels``: one a stage.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        ValueError: an unknown formulation, or options that a layer refuses.

    Source: paper, Sections 4.3 and 5.1 to 5.3.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options) -> ResNet:
    """ResNet-34; options as of :func:`resnet18`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, *, dropout: float = 0.1, **options) -> ResNet:
    """ResNet-50 with DCD on all three convolutions of the bottlenecks; options as of :func:`resnet18`.

    The 3×3 one has its dynamic residual at the centre tap, the 1×1 ones are Eq. 6. Source: paper, Table 4b.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, dropout=dropout, **options)
