# SPDX-License-Identifier: BSD-3-Clause
"""The four released modules, from their formulas, in plain PyTorch as people write it.

λ = relu6(s + 3)/3 of the scale logits s; z1 = bn1(Q x), z = bn2(Φ z1) + z1, y = P z + λ⊙conv(x). The names of
the parameters are those of the released checkpoints. ``zoo_variants`` has what other projects made of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class HardSigmoid2(nn.Module):
    """relu6(s + 3)/3: from 0 to 2."""

    def forward(self, s):
        return F.relu6(s + 3.0) / 3.0


class Gate(nn.Module):
    """Squeeze and excitation of a vector that is squeezed already: y·g(fc(y))."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels, bias=False), HardSigmoid2())

    def forward(self, y):
        return y * self.fc(y)


class ConvDY(nn.Module):
    """conv_dy: k×k, 1×1 pooling, L = ⌊√C⌋, squeeze max(C, L²)//16, which is 0 below 16 channels."""

    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.dim = int(math.sqrt(in_channels))
        squeeze = max(in_channels, self.dim**2) // 16
        self.q = nn.Conv2d(in_channels, self.dim, 1, stride, 0, bias=False)
        self.p = nn.Conv2d(self.dim, out_channels, 1, 1, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(self.dim)
        self.bn2 = nn.BatchNorm1d(self.dim)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(in_channels, squeeze, bias=False), Gate(squeeze))
        self.fc_phi = nn.Linear(squeeze, self.dim**2, bias=False)
        self.fc_scale = nn.Linear(squeeze, out_channels, bias=False)
        self.hs = HardSigmoid2()

    def forward(self, x):
        r = self.conv(x)
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c))
        phi = self.fc_phi(y).view(b, self.dim, self.dim)
        scale = self.hs(self.fc_scale(y)).view(b, -1, 1, 1)
        r = scale.expand_as(r) * r
        out = self.bn1(self.q(x))
        _, _, h, w = out.size()
        out = out.view(b, self.dim, -1)
        out = self.bn2(torch.matmul(phi, out)) + out
        out = self.p(out.view(b, -1, h, w)) + r
        return out


class ConvBasicDY(nn.Module):
    """conv_basic_dy: 3×3 with padding 1, 2×2 pooling (4C values), L = ⌊√(4C)⌋, squeeze at least 4."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.dim = int(math.sqrt(in_channels * 4))
        squeeze = max(max(in_channels * 4, self.dim**2) // 16, 4)
        self.q = nn.Conv2d(in_channels, self.dim, 1, stride, bias=False)
        self.p = nn.Conv2d(self.dim, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.dim)
        self.bn2 = nn.BatchNorm1d(self.dim)
        self.avg_pool = nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Sequential(nn.Linear(in_channels * 4, squeeze, bias=False), Gate(squeeze))
        self.fc_phi = nn.Linear(squeeze, self.dim**2, bias=False)
        self.fc_scale = nn.Linear(squeeze, out_channels, bias=False)
        self.hs = HardSigmoid2()

    def forward(self, x):
        b, c, _, _ = x.size()
        r = self.conv(x)
        y = self.avg_pool(x).view(b, c * 4)
        y = self.fc(y)
        phi = self.fc_phi(y).view(b, self.dim, self.dim)
        scale = self.hs(self.fc_scale(y)).view(b, -1, 1, 1)
        r = scale.expand_as(r) * r
        out = self.bn1(self.q(x))
        _, _, h, w = out.size()
        out = out.view(b, self.dim, -1)
        out = self.bn2(torch.matmul(phi, out)) + out
        out = out.view(b, -1, h, w)
        out = self.p(out) + r
        return out


class DYModule(nn.Module):
    """DYModule: 1×1; 2×2 pooling where the layer expands, 1×1 where it does not."""

    def __init__(self, in_channels, out_channels, fc_squeeze=8):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        if in_channels < out_channels:
            self.multiple, ratio = 4, 8
            self.pool = nn.AdaptiveAvgPool2d((2, 2))
        else:
            self.multiple, ratio = 1, 2
            self.pool = nn.AdaptiveAvgPool2d((1, 1))
        pooled = self.multiple * in_channels
        self.dim = min(pooled, out_channels) // ratio
        while self.dim**2 > 2 * pooled:
            ratio *= 2
            self.dim = min(pooled, out_channels) // ratio
        self.dim = max(self.dim, 4)
        squeeze = max(max(pooled, self.dim**2) // fc_squeeze, 4)
        self.conv_q = nn.Conv2d(in_channels, self.dim, 1, bias=False)
        self.conv_p = nn.Conv2d(self.dim, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.dim)
        self.bn2 = nn.BatchNorm1d(self.dim)
        self.fc = nn.Sequential(nn.Linear(pooled, squeeze, bias=False), Gate(squeeze))
        self.fc_phi = nn.Linear(squeeze, self.dim**2, bias=False)
        self.fc_scale = nn.Linear(squeeze, out_channels, bias=False)
        self.hs = HardSigmoid2()

    def forward(self, x):
        r = self.conv(x)
        b, c, h, w = x.size()
        y = self.pool(x).view(b, c * self.multiple)
        y = self.fc(y)
        dy_phi = self.fc_phi(y).view(b, self.dim, self.dim)
        dy_scale = self.hs(self.fc_scale(y)).view(b, -1, 1, 1)
        r = dy_scale.expand_as(r) * r
        x = self.bn1(self.conv_q(x))
        x = x.view(b, -1, h * w)
        x = self.bn2(torch.matmul(dy_phi, x)) + x
        x = x.view(b, -1, h, w)
        return self.conv_p(x) + r


class DYCls(nn.Module):
    """DYCls: the classifier; L and the squeeze are 32, and the bias is scaled together with the product."""

    def __init__(self, in_channels, classes, latent_channels=32):
        super().__init__()
        self.dim = latent_channels
        self.cls = nn.Linear(in_channels, classes)
        self.cls_q = nn.Linear(in_channels, self.dim, bias=False)
        self.cls_p = nn.Linear(self.dim, classes, bias=False)
        self.fc = nn.Sequential(nn.Linear(in_channels, 32, bias=False), Gate(32))
        self.fc_phi = nn.Linear(32, self.dim**2, bias=False)
        self.fc_scale = nn.Linear(32, classes, bias=False)
        self.hs = HardSigmoid2()
        self.bn1 = nn.BatchNorm1d(self.dim)
        self.bn2 = nn.BatchNorm1d(self.dim)

    def forward(self, x):
        b, _ = x.size()
        r = self.cls(x)
        y = self.fc(x)
        phi = self.fc_phi(y).view(b, self.dim, self.dim)
        scale = self.hs(self.fc_scale(y)).view(b, -1)
        r = scale.expand_as(r) * r
        x = self.bn1(self.cls_q(x))
        x = self.bn2(torch.matmul(phi, x.view(b, self.dim, 1)).view(b, self.dim)) + x
        x = self.cls_p(x)
        return x + r


class Network(nn.Module):
    """A small network that has all four, and static layers between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(DYModule(8, 32), nn.BatchNorm2d(32), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.project = nn.Sequential(DYModule(32, 8), nn.BatchNorm2d(8))
        self.basic = ConvBasicDY(8, 16, 2)
        self.bn = nn.BatchNorm2d(16)
        self.last = ConvDY(16, 24, 3, 1, 1)
        self.classifier = DYCls(24, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        x = F.relu(self.bn(self.basic(x)))
        x = F.relu(self.last(x)).mean((2, 3))
        return self.classifier(x)


#: the modules of Network that accelerate takes
DYNAMIC = ("expand.0", "project.0", "basic", "last", "classifier")

#: name -> (module, shape of its input without the batch)
RELEASED = {
    "conv_dy 3×3": (lambda: ConvDY(20, 12, 3, 1, 1), (20, 6, 5)),
    "conv_dy 1×1": (lambda: ConvDY(32, 9), (32, 4, 4)),
    "conv_dy stride 2": (lambda: ConvDY(18, 16, 3, 2, 1), (18, 7, 5)),
    "conv_dy 5×5 stride 3": (lambda: ConvDY(16, 12, 5, 3, 2), (16, 8, 7)),
    "conv_dy squeeze of 0": (lambda: ConvDY(10, 12, 3, 1, 1), (10, 5, 4)),
    "conv_dy L = 1, squeeze of 0": (lambda: ConvDY(3, 8, 3, 2, 1), (3, 9, 9)),
    "conv_basic_dy": (lambda: ConvBasicDY(8, 12), (8, 7, 7)),
    "conv_basic_dy stride 2": (lambda: ConvBasicDY(6, 16, 2), (6, 7, 6)),
    "DYModule expand": (lambda: DYModule(8, 48), (8, 7, 7)),
    "DYModule project": (lambda: DYModule(48, 8), (48, 7, 7)),
    "DYModule square": (lambda: DYModule(16, 16), (16, 3, 5)),
    "DYModule odd": (lambda: DYModule(11, 37), (11, 5, 3)),
    "DYCls": (lambda: DYCls(20, 7), (20,)),
}
