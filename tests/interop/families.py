# SPDX-License-Identifier: BSD-3-Clause
"""Every module of the zoo by name, with its input's shape: what the tests of this folder run through."""

from __future__ import annotations

import functools
import math
import warnings

import torch
import zoo
import zoo_variants as wild
from torch import Tensor, nn
from zoo_variants import Plain, norms

_bn = nn.BatchNorm1d
_large_eps = functools.partial(nn.BatchNorm2d, eps=0.2)
_group = functools.partial(nn.GroupNorm, 2)
_no_affine = functools.partial(nn.GroupNorm, 3, affine=False)
_bn2 = nn.BatchNorm2d


def _plain(*arguments, **options):
    return functools.partial(Plain, *arguments, **options)


def _batch(**options):
    """BatchNorm on both sides, with these options."""
    return functools.partial(wild.batch_norms, **options)


#: name -> (module, shapes of its inputs without the batch)
VARIANTS = {
    # ranks and ways to write them
    "Einsum": (lambda: wild.Einsum(10, 12), (10, 5, 6)),
    "Einsum stride 2": (lambda: wild.Einsum(10, 12, 3, stride=2), (10, 7, 6)),
    "InPlace": (lambda: wild.InPlace(9, 14), (9, 6, 5)),
    "Trace": (lambda: wild.Trace(8, 12), (8, 23)),
    "Strip, no dropout": (lambda: wild.Strip(8, 10, dropout=0.0), (8, 9, 4)),
    "Reflected": (lambda: wild.Reflected(8, 12), (8, 6, 6)),
    "Reflected, groups": (lambda: wild.Reflected(8, 12, groups=4), (8, 6, 6)),
    "Guided": (lambda: wild.Guided(8, 5, 12), (8, 6, 6), (5,)),
    "Branch": (lambda: wild.Branch(8, 12), (8, 5, 7)),
    "Branch stride 2": (lambda: wild.Branch(8, 12, 5, stride=2), (8, 5, 7)),
    "Masked": (lambda: wild.Masked(8, 12), (8, 5, 5)),
    "Unflattened": (lambda: wild.Unflattened(8, 12), (8, 5, 6)),
    "Bare": (lambda: wild.Bare(8, 12), (8, 5, 6)),
    "Masked 1×1": (lambda: wild.Masked(8, 12, kernel_size=1), (8, 5, 5)),
    # strides, padding, dilation, groups, biases
    "1×1": (_plain(12, 16), (12, 5, 6)),
    "1×1 biases": (_plain(12, 16, bias=True), (12, 5, 6)),
    "1×1 stride 2": (_plain(12, 16, stride=2), (12, 5, 6)),
    "3×3": (_plain(12, 8, 5, 3, padding=1, bias=True), (12, 5, 6)),
    "3×3 dilation": (_plain(12, 8, 5, 3, padding=3, dilation=3), (12, 7, 6)),
    "3×3 stride (2, 3)": (_plain(12, 8, 5, 3, padding=1, stride=(2, 3)), (12, 9, 8)),
    "5×3 padding": (_plain(12, 8, 5, (5, 3), padding=(2, 1), bias=True), (12, 7, 5)),
    "depthwise static": (_plain(12, 12, 5, 3, padding=1, groups=12, bias=True), (12, 5, 6)),
    "grouped static": (_plain(12, 8, 5, 3, padding=1, groups=4), (12, 5, 6)),
    "Q with padding": (_plain(8, 8, 4, 3, padding=2, offset=1, bias=True), (8, 5, 5)),
    "1-D": (_plain(12, 8, 5, 3, rank=1, padding=1, bias=True), (12, 17)),
    "1-D 1×1 stride 2": (_plain(12, 8, rank=1, stride=2), (12, 17)),
    "3-D": (_plain(8, 6, 4, 3, rank=3, padding=1), (8, 4, 3, 5)),
    "3-D 1×1": (_plain(8, 6, 4, rank=3, bias=True), (8, 4, 3, 5)),
    "3-D stride": (_plain(8, 6, 4, (3, 1, 3), rank=3, padding=(1, 0, 1), stride=(1, 2, 2)), (8, 4, 5, 5)),
    # pooling
    "2×2 pool of 7×7": (_plain(6, 16, 4, pool=2), (6, 7, 7)),
    "3×3 pool": (_plain(6, 16, 4, pool=3), (6, 7, 5)),
    # λ
    "λ hardsigmoid": (_plain(8, 12, lam=nn.Hardsigmoid()), (8, 4, 5)),
    "λ sigmoid": (_plain(8, 12, 5, 3, padding=1, lam=nn.Sigmoid()), (8, 4, 5)),
    "λ 1 + tanh": (_plain(8, 12, lam=wild.Function(wild.one_plus_tanh)), (8, 4, 5)),
    "λ softmax": (_plain(8, 12, lam=wild.Softmax()), (8, 4, 5)),
    "λ learned": (_plain(8, 12, 5, 3, padding=1, lam=wild.Learned(12)), (8, 4, 5)),
    # latent sizes
    **{
        f"L = {n}": (_plain(16, 12, n, 3 if n % 2 else 1, padding=n % 2), (16, 5, 6))
        for n in (1, 2, 3, 8, 11)
    },
    "L = 29, GroupNorm": (_plain(16, 12, 29, norm="group"), (16, 5, 6)),
    "L = 45": (_plain(32, 48, 45), (32, 7, 7)),
    "L > C": (_plain(4, 3, 11, 3, padding=1), (4, 6, 6)),
    # norms on the latent
    "GroupNorm": (_plain(12, 8, 6, 3, padding=1, norm="group"), (12, 5, 6)),
    "GroupNorm 1×1": (_plain(12, 8, 8, norm="group", bias=True), (12, 5, 6)),
    "GroupNorm, affine False": (_plain(12, 8, 6, norm=norms(_no_affine, _no_affine)), (12, 5, 6)),
    "an eps for each": (_plain(12, 8, norm=norms(_large_eps, _bn)), (12, 5, 6)),
    "no norms": (_plain(12, 8, norm=None), (12, 5, 6)),
    "no norms, no skip": (_plain(12, 8, 5, 3, padding=1, norm=None, skip=False), (12, 5, 6)),
    "no skip": (_plain(12, 8, skip=False), (12, 5, 6)),
    "norm1 only": (_plain(12, 8, norm=norms(_bn2, None)), (12, 5, 6)),
    "norm2 only": (_plain(12, 8, 5, 3, padding=1, norm=norms(None, _bn)), (12, 5, 6)),
    "norm2 only, no skip": (_plain(12, 8, norm=norms(None, _bn), skip=False), (12, 5, 6)),
    "momentum None": (_plain(12, 8, norm=_batch(momentum=None)), (12, 5, 6)),
    "momentum 0.7, eps 0.1": (_plain(12, 8, norm=_batch(momentum=0.7, eps=0.1)), (12, 5, 6)),
    "affine False": (_plain(12, 8, 5, 3, padding=1, norm=_batch(affine=False)), (12, 5, 6)),
    "no running statistics": (_plain(12, 8, norm=_batch(track_running_stats=False)), (12, 5, 6)),
    "BatchNorm then GroupNorm": (
        _plain(12, 8, 6, norm=norms(_bn2, lambda n: nn.GroupNorm(2, n))),
        (12, 5, 6),
    ),
    "GroupNorm then BatchNorm": (_plain(12, 8, 6, norm=norms(lambda n: nn.GroupNorm(2, n), _bn)), (12, 5, 6)),
    # maps of one pixel
    "1×1 map": (_plain(12, 8), (12, 1, 1)),
    "1 pixel of 1-D": (_plain(12, 8, rank=1, norm="group"), (12, 1)),
}

FAMILIES = {**zoo.RELEASED, **VARIANTS}

#: odd enough to be left as it is
MAY_BE_LEFT = ("Q with padding",)

#: torch's own gradient of hardsigmoid has 1/6 in float32, also for float64
RELATIVE = {"Trace": 1e-7, "λ hardsigmoid": 1e-7}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic away from where it starts, of a size that keeps the values near 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    def uniform(tensor):
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                fan = max(1, math.prod(parameter.shape[1:]))
                parameter.copy_(normal(parameter) * fan**-0.5)
            else:
                vector = uniform(parameter) if name.endswith("weight") else 0.5 * normal(parameter)
                parameter.copy_(vector)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.5 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(uniform(buffer))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(3)
    return module


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A module of ``FAMILIES`` with random parameters and statistics."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a squeeze of 0
        module = FAMILIES[name][0]()
    return randomise(module, seed).to(dtype)


def inputs(name: str, batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Random inputs for a module of ``FAMILIES``."""
    return draw(*FAMILIES[name][1:], batch=batch, dtype=dtype, seed=seed)


def draw(*shapes, batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Random inputs of these shapes (without the batch), each channel with a mean and a size of its own."""
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = []
    for shape in shapes:
        per_channel = (1, shape[0], *[1] * (len(shape) - 1))
        mean = torch.randn(per_channel, generator=generator, dtype=torch.float64)
        size = 0.5 + torch.rand(per_channel, generator=generator, dtype=torch.float64)
        values = torch.randn((batch, *shape), generator=generator, dtype=torch.float64)
        drawn.append((mean + size * values).to(dtype))
    return drawn
