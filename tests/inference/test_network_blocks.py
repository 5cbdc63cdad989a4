# SPDX-License-Identifier: BSD-3-Clause
"""Layers with sparse blocks (Eq. 7) and joint fusion (Eq. 9) inside the op, in both orders of the product."""

import pytest
import torch
from graphs import Net, chain, conv, dcd, deep, norm
from operands import ISAS, instruction_set, threads
from runs import Twin, assert_right, image, randomise
from subjects import assert_follows
from torch import nn

import dcd_kernels
from dcd_kernels.inference.blocks import blocks_together
from dcd_kernels.nn import DCDLinear

# one pixel, where the latent is formed, up to where a sample's matrix is
SIZES = ((1, 1), (2, 7), (19, 30))


def joint(inputs, outputs, kernel, **options):
    return dcd(inputs, outputs, kernel, joint=True, **options)


#: (Ci, Co, B, L of a block): blocks narrower than a plane and wider, that share planes and that do not
BLOCKS = {
    "whole planes": (32, 64, 2, 16),
    "neighbours share a plane": (40, 56, 2, 5),
    "three of odd channels": (27, 51, 3, 4),
    "latents of two planes": (44, 76, 2, 19),
    "many in a plane": (24, 40, 8, 2),
    "some in a plane": (36, 60, 6, 3),
    "one channel each": (19, 19, 19, 1),
    "narrower on the left": (6, 150, 3, 2),
    "narrower on the right": (150, 6, 3, 2),
    "too many latents to go together": (20, 20, 4, 18),
}


def in_blocks(name, **options):
    """One of `BLOCKS` and images for it."""
    inputs, outputs, blocks, latent = BLOCKS[name]
    layer = dcd(inputs, outputs, blocks=blocks, latent_channels=latent, **options)
    network = randomise(chain(layer, norm(outputs), nn.ReLU6()), channels=inputs)
    return network, [image(2, inputs, *size, seed=i) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("attention", [True, False], ids=["lam", "no lam"])
def test_blocks(name, attention):
    network, images = in_blocks(name, channel_attention=attention)
    assert_right(network, *images, isas=ISAS)


def test_which_blocks_go_together():
    """As many as share a plane of channels and one of latent channels."""
    assert blocks_together(8, 24, 2) == 4
    assert blocks_together(8, 24, 5) == 2
    assert blocks_together(8, 64, 2) == 2
    assert blocks_together(8, 256, 2) == 1
    assert blocks_together(6, 36, 3) == 2
    assert blocks_together(3, 3, 17) == 1
    assert blocks_together(1, 64, 8) == blocks_together(1, 64, 0) == 1


LAYERS = {
    "3×3 at the centre": lambda: dcd(30, 42, 3, blocks=3, latent_channels=4),
    "3×3 by Winograd": lambda: dcd(36, 42, 3, blocks=3, latent_channels=4),
    "3×3 by Winograd, one plane a block": lambda: dcd(32, 64, 3, blocks=4, latent_channels=17),
    "3×3, strided": lambda: dcd(30, 42, 3, blocks=2, latent_channels=17, stride=2, pool_size=2),
    "1×1, strided": lambda: dcd(30, 42, blocks=2, latent_channels=4, stride=(2, 1)),
    "1×1, padded": lambda: dcd(30, 42, blocks=6, latent_channels=2, padding=(1, 2)),
    "5×1, dilated": lambda: dcd(30, 42, (5, 1), blocks=2, latent_channels=3, dilation=2, padding=(4, 1)),
    "with a bias in the branch": lambda: dcd(
        30, 42, blocks=6, latent_channels=2, branch_bias=True, activation="silu"
    ),
    "joint": lambda: joint(30, 42, 3, latent_channels=5),
    "joint, by Winograd": lambda: joint(33, 50, 3, latent_channels=18),
    "joint, two planes of latents": lambda: joint(30, 42, 3, latent_channels=20, pool_size=2),
    "joint, strided": lambda: joint(30, 18, 3, stride=(2, 1), latent_kernel=3, activation="hardswish"),
    "joint, even kernel": lambda: joint(30, 18, (2, 4), padding=(1, 2), latent_kernel=1),
    "joint, strip": lambda: joint(30, 17, (1, 5), latent_kernel=7, channel_attention=False),
    "joint, dilated": lambda: joint(30, 17, 3, dilation=(2, 3), padding=(2, 4), branch_bias=True),
    "joint, without padding": lambda: joint(30, 17, 3, padding=0, stride=3),
    "joint, padding beyond the kernel": lambda: joint(30, 17, 3, padding=4),
}


def between_others(name):
    """One of `LAYERS` in a network of images of three channels."""
    layer = LAYERS[name]()
    folded = [] if layer.activation else [norm(layer.out_channels)]
    return randomise(chain(conv(3, layer.in_channels), nn.ReLU(), layer, *folded, deep(layer.out_channels)))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """With images whose memory held NaN, a larger one, before."""
    twin = Twin(between_others(name))
    for isa in ISAS:
        with instruction_set(isa):
            assert bool(twin.optimised(torch.full((2, 3, 40, 40), float("nan"))).isnan().all())
        twin.run(image(2, 3, 21, 26), image(1, 3, 9, 11, layout="channels_last"), isas=(isa,))
    twin.check()
    with threads(3):
        twin.run(image(1, 3, 21, 26), image(4, 3, 12, 9))
    twin.check()


def test_sums_and_pooling():
    """What other dense layers take in: a skip, an activation, the means for the next branch."""
    network = Net(
        lambda s, x: s.c(torch.relu(s.n(s.b(torch.relu(s.a(x)))) + s.d(x))),
        a=dcd(6, 28, blocks=2, latent_channels=3),
        b=joint(28, 36, 3, latent_channels=3),
        n=norm(36),
        d=conv(6, 36),
        c=dcd(36, 28, blocks=4, latent_channels=2, pool_size=2),
    )
    twin = Twin(randomise(network, channels=6))
    twin.run(image(2, 6, 17, 20), image(1, 6, 8, 9), isas=ISAS)
    twin.check()


@pytest.mark.parametrize("blocks", [2, 9, 18])
def test_linear_layers(blocks):
    network = chain(
        DCDLinear(18, 36, blocks=blocks, latent_channels=3, squeeze_channels=4),
        nn.ReLU(),
        DCDLinear(36, 54, blocks=blocks, latent_channels=1, activation="silu", branch_bias=True),
    )
    assert_right(randomise(network, channels=None), image(1, 18), image(7, 18, seed=1), isas=ISAS)


def test_blocks_do_not_touch_each_other():
    """With Φ of one block alone, outputs of the others are those of the static layer."""
    layer = dcd(40, 56, blocks=2, latent_channels=5, channel_attention=False, bias=False)
    layer.branch.expand.weight.data[: 5 * 5] = 0
    optimised = dcd_kernels.optimize_for_inference(layer.eval())
    for size in SIZES:
        x = image(2, 40, *size)
        got, plain = optimised(x), torch.conv2d(x, layer.weight.detach())
        torch.testing.assert_close(got[:, :28], plain[:, :28])
        assert (got[:, 28:] - plain[:, 28:]).abs().max() > 1e-4


def test_report_says_what_runs():
    network = chain(
        dcd(3, 30, blocks=3, latent_channels=2),
        joint(30, 20, 3, latent_channels=2),
        dcd(20, 6, latent_channels=2),
    )
    optimised = dcd_kernels.optimize_for_inference(network.eval())
    report = dcd_kernels.report(optimised)
    assert not report.left
    assert [entry.reason.split(" dense")[0] for entry in report] == [
        "dynamic (3 blocks)",
        "dynamic (joint fusion)",
        "dynamic",
    ]


def test_edits_are_seen():
    """Each of P, Q, R, W0 and the branch's layers is packed again, wherever it lies among zeros."""
    network = chain(
        dcd(3, 60, blocks=3, latent_channels=2),
        joint(60, 20, 3, latent_channels=2),
        dcd(20, 40, blocks=10, latent_channels=2),
    )
    optimised = dcd_kernels.optimize_for_inference(randomise(network, channels=None))
    x = image(2, 3, 12, 11)
    before = optimised(x)
    for name, parameter in optimised.named_parameters():
        with torch.no_grad():
            parameter.mul_(1.25)
        after = optimised(x)
        assert not torch.equal(after, before), name
        assert_follows(optimised, x)
        before = after


@pytest.mark.parametrize("bad", [(2, 31, 8, 8), (2, 30, 0, 8), (2, 30)], ids=str)
@pytest.mark.parametrize("name", ["3×3 at the centre", "joint"])
def test_bad_input(name, bad):
    optimised = dcd_kernels.optimize_for_inference(LAYERS[name]().eval())
    assert not dcd_kernels.report(optimised).left
    with pytest.raises((RuntimeError, ValueError)):
        optimised(torch.zeros(bad))


def test_too_small_for_the_kernel():
    optimised = dcd_kernels.optimize_for_inference(joint(3, 5, 5, padding=0).eval())
    with pytest.raises(RuntimeError, match=r"too small.*5 x 5.*4 x 9"):
        optimised(torch.zeros(1, 3, 4, 9))
