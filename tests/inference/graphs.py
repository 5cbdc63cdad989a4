# SPDX-License-Identifier: BSD-3-Clause
"""Small networks, each with something in its data flow or its layers that a kernel could get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dcd_kernels.models.released import BasicConv, BottleneckConv, Classifier, PointwiseConv
from dcd_kernels.nn import DCDConv2d, DCDLinear


class Net(nn.Module):
    """Layers by name, and the forward as a function of them and the input."""

    def __init__(self, function: Callable, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, input):
        return self.function(self, input)


def conv(inputs: int, outputs: int, kernel=3, **options) -> nn.Conv2d:
    pad = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": pad} | options)


def dcd(inputs: int, outputs: int, kernel=1, **options) -> DCDConv2d:
    pad = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    return DCDConv2d(inputs, outputs, kernel, **{"padding": pad} | options)


def deep(channels: int) -> nn.Conv2d:
    return conv(channels, channels, groups=channels)


def norm(channels: int, **options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def _then(value, function):
    """For lambdas that need a value twice."""
    return function(value)


#: everything in one op
WHOLE = {
    "stem 7×7 stride 2": lambda: chain(conv(3, 20, 7, stride=2), norm(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "stem stride 3": lambda: chain(conv(3, 17, 3, stride=3), nn.SiLU()),
    "stem dilation": lambda: chain(conv(2, 5, 3, dilation=2, padding=3), nn.Hardswish()),
    "stem 1×1": lambda: chain(conv(3, 33, 1), nn.ReLU6()),
    "stem 3×1": lambda: chain(conv(3, 16, (3, 1)), conv(16, 9, (1, 5)), conv(9, 3, (3, 1), bias=False)),
    "stem, depthwise": lambda: chain(conv(3, 24), nn.ReLU6(), deep(24), nn.SiLU(), conv(24, 7, 1)),
    "stem 1×1, depthwise": lambda: chain(conv(3, 24, 1), conv(24, 24, 5, groups=24, dilation=2, padding=4)),
    "wide input": lambda: chain(conv(37, 6, 3, stride=2), nn.ReLU()),
    "too many taps for a stem": lambda: chain(conv(15, 6, 5), nn.ReLU()),
    "strides": lambda: chain(
        conv(3, 8, 3, stride=(2, 1)), conv(8, 8, 5, stride=(1, 3)), conv(8, 8, 1, stride=2)
    ),
    "'same'": lambda: chain(
        conv(3, 8, 3, padding="same"), conv(8, 8, (5, 3), padding="same", dilation=(1, 2))
    ),
    "'valid'": lambda: chain(conv(3, 8, 3, padding="valid"), conv(8, 24, 3, padding="valid", groups=1)),
    "padding beyond the kernel": lambda: chain(conv(3, 8, 3, padding=4), conv(8, 8, 1, padding=(2, 3))),
    "dilations": lambda: chain(conv(3, 18), conv(18, 18, 3, dilation=3, padding=(3, 2)), norm(18), nn.SiLU()),
    "depthwise": lambda: chain(
        conv(3, 21), deep(21), norm(21), conv(21, 21, 5, groups=21, stride=2), nn.ReLU()
    ),
    "depthwise first": lambda: chain(deep(3), conv(3, 5, 1), deep(5), nn.Hardswish(), deep(5)),
    "depthwise odd": lambda: chain(
        conv(3, 40, 1),
        conv(40, 40, (3, 1), groups=40, stride=(1, 2)),
        conv(40, 40, (1, 7), groups=40, dilation=(1, 2), padding=(0, 6)),
        conv(40, 40, 3, groups=40, stride=3, padding=2),
        conv(40, 40, 4, groups=40, padding=3),
    ),
    "even kernel": lambda: chain(conv(3, 8, 2, padding=1), conv(8, 8, 4, padding=2, stride=2)),
    "biases and norms": lambda: chain(conv(3, 8), norm(8), norm(8, affine=False), nn.Identity(), nn.ReLU6()),
    "BatchNorm1d": lambda: chain(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ),
    "linear layers": lambda: chain(
        nn.Linear(3, 70), nn.SiLU(), nn.Dropout(), nn.Linear(70, 18), nn.Linear(18, 1)
    ),
    "DCD linear layers": lambda: chain(
        DCDLinear(3, 35, latent_channels=3, squeeze_channels=4),
        nn.ReLU(),
        DCDLinear(35, 17, activation="silu"),
    ),
    "DCD": lambda: chain(conv(3, 17), dcd(17, 33, latent_channels=5), norm(33), nn.ReLU6(), dcd(33, 5)),
    "DCD of the input": lambda: chain(dcd(3, 20, 3, latent_channels=2), nn.SiLU(), dcd(20, 3, bias=False)),
    "DCD 3×3 strides": lambda: chain(
        conv(3, 17),
        dcd(17, 20, 3, stride=2, latent_channels=18),
        dcd(20, 20, 5, stride=(1, 3), padding=(3, 2), latent_channels=3, pool_size=3),
        dcd(20, 20, (3, 1), dilation=2, padding=(2, 1)),
    ),
    "DCD 1×1 strides": lambda: chain(conv(3, 17), dcd(17, 20, stride=2), norm(20), dcd(20, 6, padding=1)),
    "DCD depthwise": lambda: chain(
        conv(3, 24),
        dcd(24, 24, 3, groups=24, latent_kernel=4),
        norm(24),
        nn.ReLU6(),
        dcd(24, 24, 5, groups=24, stride=2, latent_kernel=12, pool_size=2, activation="hardswish"),
        dcd(24, 24, 3, groups=24, dilation=2, channel_fusion=False),
    ),
    "DCD activations": lambda: chain(
        conv(3, 16),
        *(dcd(16, 16, 3, activation=name) for name in ("relu", "relu6", "silu", "hardswish")),
    ),
    "released": lambda: chain(
        conv(3, 18),
        PointwiseConv(18, 40, 4),
        norm(40),
        nn.ReLU(),
        BasicConv(40, 18, stride=2),
        BottleneckConv(18, 35, 3),
    ),
    "released classifier": lambda: chain(
        conv(3, 19), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(), Classifier(19, 7)
    ),
    "skips": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: F.relu(s.n(s.b(a)) + a) + s.d(a)),
        a=conv(3, 18),
        b=conv(18, 18),
        n=norm(18),
        d=deep(18),
    ),
    "skip of the input": lambda: Net(
        lambda s, x: F.silu(s.b(F.relu(s.a(x))) + x), a=conv(3, 8), b=conv(8, 3)
    ),
    "skip of a stem": lambda: Net(lambda s, x: s.b(x) + s.a(x), a=conv(3, 8), b=conv(3, 8)),
    "sum, dropout, activation": lambda: Net(
        lambda s, x: s.c(F.relu6(s.d(s.a(x) + s.b(x)))), a=conv(3, 8), b=conv(3, 8), d=nn.Dropout(), c=deep(8)
    ),
    "sum of itself": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: s.b(a + a)), a=conv(3, 8), b=conv(8, 3)
    ),
    "shared layer": lambda: (lambda m, n: chain(conv(3, 8), m, n, nn.ReLU(), m, n, nn.SiLU(), m))(
        conv(8, 8), norm(8)
    ),
    "shared dynamic layer": lambda: (lambda m: chain(conv(3, 20), m, nn.ReLU(), m))(dcd(20, 20)),
    "several outputs": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: (s.b(a), a.mean((2, 3)), s.c(a))),
        a=conv(3, 18),
        b=conv(18, 5),
        c=deep(18),
    ),
    "outputs by name": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: {"one": a, "two": s.b(a), "again": a}),
        a=conv(3, 4),
        b=conv(4, 4),
    ),
    "output before its norm": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: (a, s.n(s.b(a)))), a=conv(3, 18), b=conv(18, 5), n=norm(5)
    ),
    "means of means": lambda: Net(
        lambda s, x: s.p(s.p(s.a(x))).mean(dim=(-1, 2)), a=conv(3, 8), p=nn.AdaptiveAvgPool2d((1, 1))
    ),
    "means, in other words": lambda: Net(
        lambda s, x: torch.mean(F.adaptive_avg_pool2d(s.a(x), 1), (2, 3), keepdim=True), a=conv(3, 20)
    ),
    "convolutions of a mean": lambda: Net(
        lambda s, x: s.c(s.d(F.relu(s.b(x.mean((2, 3), keepdim=True))))),
        b=conv(3, 40, 1),
        d=conv(40, 40, 3, groups=40),
        c=dcd(40, 6),
    ),
    "max pooling": lambda: chain(
        conv(3, 18), nn.MaxPool2d(2), nn.MaxPool2d((3, 1), (1, 2), (1, 0)), conv(18, 4), nn.MaxPool2d(3, 1, 1)
    ),
    "two poolings": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: s.b(a) + s.c(a) + s.d(a)),
        a=conv(3, 18),
        b=dcd(18, 18, pool_size=1),
        c=dcd(18, 18, pool_size=2),
        d=dcd(18, 18, pool_size=3),
    ),
    "in place": lambda: Net(
        lambda s, x: _then(s.a(x), lambda a: s.r(s.b(a).add_(s.c(a)))),
        a=conv(3, 8),
        b=conv(8, 8),
        c=conv(8, 8),
        r=nn.ReLU(inplace=True),
    ),
}


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(_one_more)
    return module


def _one_more(module, arguments, output):
    return output + 1


def _mean_is_positive(s, x):
    return s.a(x) if x.mean() > 0 else s.b(x)


_branching = {"a": lambda: conv(8, 8), "b": lambda: conv(8, 8)}

#: what must run as it is written between the pieces: (network, names of what is left, number of pieces)
PARTS = {
    "unknown function": (
        lambda: Net(
            lambda s, x: s.c(torch.sigmoid(s.b(F.relu(s.a(x))))), a=conv(3, 8), b=conv(8, 8), c=deep(8)
        ),
        ("sigmoid",),
        2,
    ),
    "squeeze and excitation": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: s.d(a * torch.sigmoid(s.c(F.relu(s.b(s.p(a))))))),
            a=conv(3, 40),
            p=nn.AdaptiveAvgPool2d(1),
            b=conv(40, 8, 1),
            c=conv(8, 40, 1),
            d=conv(40, 8),
        ),
        ("sigmoid", "mul"),
        2,
    ),
    "activation apart from its layer": (
        lambda: Net(
            lambda s, x: _then((s.a(x), torch.exp(x)), lambda pair: (s.c(F.relu(pair[0])), pair[1])),
            a=conv(3, 8),
            c=conv(8, 8),
        ),
        ("exp", "relu"),
        2,
    ),
    "norm apart from its layer": (
        lambda: Net(
            lambda s, x: _then((s.a(x), torch.exp(x)), lambda pair: (s.c(F.relu(s.n(pair[0]))), pair[1])),
            a=conv(3, 8),
            c=conv(8, 8),
            n=norm(8),
        ),
        ("exp", "n", "relu"),
        2,
    ),
    "norm of a sum": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: F.relu(s.n(s.b(a) + a))),
            a=conv(3, 8),
            b=conv(8, 8),
            n=norm(8),
        ),
        ("n", "relu"),
        1,
    ),
    "activation of an activation": (
        lambda: chain(dcd(3, 8, activation="silu"), nn.ReLU6(), conv(8, 8), nn.ReLU(), nn.ReLU(), conv(8, 8)),
        ("1", "4"),
        3,
    ),
    "hooked activation": (lambda: chain(conv(3, 8), _hooked(nn.ReLU()), conv(8, 8)), ("1",), 2),
    "hooked layer": (lambda: chain(conv(3, 8), _hooked(conv(8, 8)), conv(8, 8)), ("1",), 2),
    "hooked norm": (lambda: chain(conv(3, 8), _hooked(norm(8)), conv(8, 8)), ("1",), 2),
    "hooked container": (lambda: chain(conv(3, 8), _hooked(chain(conv(8, 8))), conv(8, 8)), ("1",), 2),
    "hooked pooling": (lambda: chain(conv(3, 8), _hooked(nn.AdaptiveAvgPool2d(1)), conv(8, 8, 1)), ("1",), 2),
    "hooked network": (lambda: _hooked(chain(conv(3, 8), conv(8, 8))), ("network",), 0),
    "control flow": (
        lambda: chain(
            conv(3, 8),
            Net(_mean_is_positive, **{name: make() for name, make in _branching.items()}),
            conv(8, 8),
        ),
        ("1",),
        2,
    ),
    "control flow at the top": (lambda: Net(_mean_is_positive, a=conv(3, 8), b=conv(3, 8)), ("network",), 0),
    "a tensor made on the way": (
        lambda: chain(conv(3, 8), Net(lambda s, x: s.a(x * torch.full((1,), 0.5)), a=conv(8, 8)), conv(8, 4)),
        ("1",),
        2,
    ),
    "arguments by name": (
        lambda: Net(lambda s, x: s.b(input=F.relu(s.a(x))), a=conv(3, 8), b=conv(8, 8)),
        ("b",),
        1,
    ),
    "residual": (lambda: Net(lambda s, x: s.b(s.a(x), x), a=conv(3, 3), b=dcd(3, 3)), ("b",), 1),
    "another condition": (
        lambda: Net(lambda s, x: s.b(s.a(x), condition=x), a=conv(3, 3), b=dcd(3, 8)),
        ("b",),
        1,
    ),
    "mean over rows": (lambda: Net(lambda s, x: s.a(x).mean(2), a=conv(3, 8)), ("mean",), 1),
    "padded mean": (
        lambda: chain(conv(3, 40), nn.AdaptiveAvgPool2d(1), conv(40, 8)),
        ("2",),
        1,
    ),
    "one pixel pooled to four": (
        lambda: chain(conv(3, 40), nn.AdaptiveAvgPool2d(1), dcd(40, 8, pool_size=2)),
        ("2",),
        1,
    ),
    "activation in place, input read again": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: _then(s.r(a), lambda y: s.b(a) + y)),
            a=conv(3, 8),
            b=conv(8, 8),
            r=nn.ReLU(inplace=True),
        ),
        ("r",),
        2,
    ),
    "in place by position": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: _then(F.relu(a, True), lambda y: s.b(a) + y)),
            a=conv(3, 8),
            b=conv(8, 8),
        ),
        ("relu",),
        2,
    ),
    "in place on an alias": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: _then(s.i(a).relu_(), lambda y: s.b(y) + a)),
            a=conv(3, 8),
            b=conv(8, 8),
            i=nn.Identity(),
        ),
        ("i", "relu_"),
        2,
    ),
    "sum in place, read again": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: _then(a.add_(s.c(x)), lambda y: s.b(y) + a)),
            a=conv(3, 8),
            b=conv(8, 8),
            c=conv(3, 8),
        ),
        ("add_",),
        2,
    ),
    "statement in place": (
        lambda: Net(
            lambda s, x: _then(s.a(x), lambda a: (torch.relu_(a), s.b(a))[1]), a=conv(3, 8), b=conv(8, 8)
        ),
        ("relu_",),
        2,
    ),
    "norm without statistics": (
        lambda: chain(conv(3, 8), norm(8, track_running_stats=False), conv(8, 8)),
        ("1",),
        2,
    ),
    "groups": (lambda: chain(conv(3, 8), conv(8, 8, groups=2), conv(8, 8)), ("1",), 2),
    "reflected": (lambda: chain(conv(3, 8), conv(8, 8, padding_mode="reflect"), conv(8, 8)), ("1",), 2),
    "'same' of an even kernel": (lambda: chain(conv(3, 8), conv(8, 8, 2, padding="same")), ("1",), 1),
    "a large kernel": (lambda: chain(conv(3, 4), conv(4, 4, 17), conv(4, 4, 9)), ("1", "2"), 1),
    "ceil_mode": (lambda: chain(conv(3, 8), nn.MaxPool2d(3, 2, ceil_mode=True), conv(8, 8)), ("1",), 2),
    "another module": (lambda: chain(conv(3, 8), nn.GroupNorm(2, 8), nn.GELU(), conv(8, 8)), ("1", "2"), 2),
    "parametrised": (
        lambda: chain(conv(3, 8), nn.utils.parametrizations.weight_norm(conv(8, 8)), conv(8, 8)),
        ("1",),
        2,
    ),
    "nothing for a kernel": (lambda: chain(nn.GELU(), nn.AvgPool2d(2)), ("0", "1"), 0),
    "flattened image": (
        lambda: chain(conv(3, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
        ("1", "2"),
        2,
    ),
}
