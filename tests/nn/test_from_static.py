# SPDX-License-Identifier: BSD-3-Clause
"""Layers made from static ones: unchanged at the start, and able to learn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcd_kernels.nn import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear


def from_static(layer, **options):
    if isinstance(layer, nn.Linear):
        return DCDLinear.from_linear(layer, **options)
    return {nn.Conv1d: DCDConv1d, nn.Conv2d: DCDConv2d, nn.Conv3d: DCDConv3d}[type(layer)].from_conv(
        layer, **options
    )


STATIC = {
    "pointwise": (lambda: nn.Conv2d(9, 14, 1), (9, 6, 5)),
    "3x3": (lambda: nn.Conv2d(9, 14, 3, 2, 1, 2, bias=False), (9, 9, 8)),
    "same": (lambda: nn.Conv2d(9, 14, (3, 5), padding="same", dilation=(1, 2)), (9, 6, 5)),
    "valid": (lambda: nn.Conv2d(9, 14, 3, padding="valid"), (9, 6, 5)),
    "reflect": (lambda: nn.Conv2d(9, 14, 3, padding=(2, 1), padding_mode="reflect"), (9, 6, 5)),
    "replicate": (lambda: nn.Conv2d(9, 14, 5, padding="same", padding_mode="replicate"), (9, 6, 5)),
    "circular": (lambda: nn.Conv2d(9, 14, 3, 2, 2, padding_mode="circular"), (9, 6, 5)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (8, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, 2, 1, groups=6), (6, 6, 5)),
    "1-D": (lambda: nn.Conv1d(9, 14, 3, padding=1), (9, 11)),
    "3-D": (lambda: nn.Conv3d(5, 6, 3, padding=1), (5, 3, 4, 4)),
    "3-D reflect": (lambda: nn.Conv3d(5, 6, 3, padding=1, padding_mode="reflect"), (5, 3, 4, 4)),
    "linear": (lambda: nn.Linear(9, 14), (9,)),
    "linear rows": (lambda: nn.Linear(9, 14, bias=False), (4, 9)),
}


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_static_is_unchanged_and_learns(kind, dtype):
    torch.manual_seed(0)
    build, shape = STATIC[kind]
    static = build().to(dtype).eval()
    static.weight.requires_grad_(False)
    layer = from_static(static)
    x = torch.randn(4, *shape, dtype=dtype)
    lam, phi = layer.coefficients(x)
    assert (lam == 1).all() and (phi == 0).all()
    torch.testing.assert_close(layer(x), static(x), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert layer.weight is static.weight and layer.bias is static.bias
    assert not layer.training and not layer.weight.requires_grad

    optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    target = torch.randn_like(static(x))
    for step in range(2):
        optimiser.zero_grad()
        F.mse_loss(layer(x), target).backward()
        reached = {
            name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
        }
        assert "branch.expand.weight" in reached
        if step == 0:
            rows = layer.branch.expand.weight.grad.abs().amax(1)
            assert (rows[: len(lam[0])] > 0).any() and (rows[len(lam[0]) :] > 0).all(), "Φ got no gradient"
        else:
            assert reached == {name for name, p in layer.named_parameters() if p.requires_grad}
        optimiser.step()


def test_from_conv_options_and_joint():
    static = nn.Conv2d(16, 16, (2, 4), padding="same")
    layer = DCDConv2d.from_conv(static, joint=True, latent_channels=3, lam_activation=None, activation="relu")
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(layer(x), static(x).relu())
    assert layer.latent_channels == 3 and layer.latent_kernel == 4
    half = DCDConv2d.from_conv(nn.Conv2d(4, 4, 1, dtype=torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    meta = DCDConv2d.from_conv(nn.Conv2d(4, 4, 1, device="meta"))
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert DCDConv2d.from_conv(nn.Conv2d(8, 8, 2, groups=2), channel_fusion=False).blocks == 1


def test_from_static_refuses():
    with pytest.raises(TypeError, match=r"DCDConv2d.from_conv needs an nn.Conv2d, got Conv1d"):
        DCDConv2d.from_conv(nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match=r"from_conv needs an nn.Conv2d, got ConvTranspose2d"):
        DCDConv2d.from_conv(nn.ConvTranspose2d(4, 4, 1))
    with pytest.raises(TypeError, match=r"from_conv needs an nn.Conv2d, got LazyConv2d"):
        DCDConv2d.from_conv(nn.LazyConv2d(4, 1))
    with pytest.raises(TypeError, match=r"from_linear needs an nn.Linear, got Conv2d"):
        DCDLinear.from_linear(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        DCDConv2d.from_conv(nn.Conv2d(4, 4, 2))
    with pytest.raises(ValueError, match="lam_activation must be one of"):
        DCDConv2d.from_conv(nn.Conv2d(4, 4, 1), lam_activation="sigmoid")
    with pytest.raises(ValueError, match="blocks must be a multiple of groups"):
        DCDConv2d.from_conv(nn.Conv2d(8, 8, 1, groups=4), blocks=2)
    with pytest.raises(TypeError, match="its weight is not a parameter"):
        DCDConv2d.from_conv(nn.utils.weight_norm(nn.Conv2d(4, 4, 1)))
    with pytest.raises(TypeError, match="real and floating point"):
        DCDConv2d.from_conv(nn.Conv2d(4, 4, 1, dtype=torch.complex64))
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks"):
        DCDConv2d.from_conv(hooked)
