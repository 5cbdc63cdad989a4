# SPDX-License-Identifier: BSD-3-Clause
"""A pointwise layer in inference is one op, called the shortest way: when it is, and when it must not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dcd_kernels as dcd
from dcd_kernels import extension
from dcd_kernels.interop import shortcut
from dcd_kernels.models.released import BottleneckConv, PointwiseConv

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)


def pair(make):
    torch.manual_seed(0)
    module = make().eval()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return module, dcd.accelerate(copy.deepcopy(module))


def close(got, right):
    assert got.shape == right.shape and got.dtype == right.dtype
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


@torch.no_grad()
def test_it_is_taken_and_taken_again():
    module, mine = pair(lambda: PointwiseConv(8, 24, 8))
    assert shortcut.find(mine) is None
    for seed in range(3):
        x = torch.randn(2, 8, 7, 5, generator=torch.Generator().manual_seed(seed))
        close(mine(x), module(x))
        assert shortcut.find(mine)(x) is not None


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_strides(stride):
    """The op has none, and float64 copies with gradients do not come this way."""
    module, mine = pair(lambda: BottleneckConv(64, 12, 1, stride))
    for _ in range(2):
        x = torch.randn(2, 64, 7, 6)
        close(mine(x), module(x))
    assert (shortcut.find(mine) is None) == (stride == 2)


CHANGES = {
    "stride": lambda m: [setattr(m.get_submodule(name), "stride", (2, 2)) for name in ("conv", "conv_q")],
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "weights": lambda m: m.conv_q.weight.mul_(2),
    "another parameter": lambda m: setattr(m.fc_phi, "weight", nn.Parameter(m.fc_phi.weight * 3)),
    "statistics": lambda m: m.bn2.running_var.fill_(3),
    "no statistics": lambda m: (setattr(m.bn1, "running_mean", None), setattr(m.bn1, "running_var", None)),
    "a norm in training": lambda m: m.bn2.train(),
    "training": lambda m: m.train(),
    "a child": lambda m: setattr(m, "fc_scale", nn.Sequential(m.fc_scale, nn.Tanh())),
    "a class": lambda m: setattr(m.conv, "__class__", Doubled),
    "a forward": lambda m: setattr(m.conv_p, "forward", lambda x, own=m.conv_p.forward: 2 * own(x)),
    "hooks": lambda m: m.fc.register_forward_hook(lambda module, args, output: 2 * output),
    "a parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "dtype": lambda m: m.double(),
}


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_changes_afterwards_is_followed(name):
    module, mine = pair(lambda: PointwiseConv(8, 24, 8))
    x = torch.randn(3, 8, 7, 6)
    mine(x)
    before = mine(x)
    for each in (module, mine):
        CHANGES[name](each)
    x = x.double() if name == "dtype" else x
    right = module(x)
    close(mine(x), right)
    assert name in ("dtype", "a parametrisation") or not torch.equal(before, right)


@torch.no_grad()
def test_kinds_of_input_and_surroundings():
    module, mine = pair(lambda: PointwiseConv(8, 24, 8))
    x = torch.randn(3, 8, 7, 6)
    mine(x)
    for other in (x[:, :, ::2], x[1:], x.to(memory_format=torch.channels_last), torch.randn(1, 8, 1, 1)):
        close(mine(other), module(other))
    assert mine(x[:0]).shape == (0, 24, 7, 6)
    with pytest.raises((RuntimeError, TypeError)):
        mine(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert mine(x).dtype == module(x).dtype == torch.bfloat16
    with dcd.use_backend("reference"):
        close(mine(x), module(x))
    with torch.inference_mode():
        close(mine(x), module(x))
    several = torch.randn(4, 2, 8, 5, 5)
    close(torch.func.vmap(mine)(several), torch.stack([module(each) for each in several]))
    copied = copy.deepcopy(mine)
    assert shortcut.find(copied) is None
    close(copied(x), module(x))


def test_gradients_are_recorded_behind_it():
    module, mine = pair(lambda: PointwiseConv(8, 24, 8))
    x = torch.randn(3, 8, 7, 6)
    with torch.no_grad():
        mine(x)
    for each in (module, mine):
        each(x).square().sum().backward()
    for right, got in zip(module.parameters(), mine.parameters(), strict=True):
        close(got.grad, right.grad)
