# SPDX-License-Identifier: BSD-3-Clause
"""3×3 layers of stride 1 by Winograd's F(2×2, 3×3): tiles that end outside of the image, what follows."""

import pytest
import torch
from graphs import Net, chain, conv, dcd, norm
from operands import ISAS, instruction_set, threads
from runs import Twin, assert_right, image, randomise
from subjects import assert_follows, written
from torch import nn

import dcd_kernels

CHANNELS = (32, 33, 47, 64)
SIZES = ((1, 1), (2, 2), (3, 8), (7, 7), (14, 5), (33, 20))

# how a layer of 32 channels at least may stand in a network
LAYERS = {
    "static": lambda i, o: chain(conv(i, o), nn.ReLU()),
    "no bias": lambda i, o: conv(i, o, bias=False),
    "norm": lambda i, o: chain(conv(i, o, bias=False), norm(o), nn.SiLU()),
    "sum": lambda i, o: Net(lambda s, x: torch.relu(s.a(x) + s.b(x)), a=conv(i, o, 1), b=conv(i, o)),
    "dcd": lambda i, o: chain(dcd(i, o, 3, latent_channels=5), norm(o), nn.ReLU6()),
    "wide latent": lambda i, o: dcd(i, o, 3, latent_channels=19),
    "lam": lambda i, o: chain(dcd(i, o, 3, channel_fusion=False), nn.Hardswish()),
    "fusion": lambda i, o: dcd(i, o, 3, channel_attention=False, latent_channels=3, bias=False),
    "pooled": lambda i, o: chain(conv(i, o), nn.ReLU(), dcd(o, i, latent_channels=3, pool_size=2)),
    "two": lambda i, o: chain(dcd(i, o, 3, latent_channels=2), nn.ReLU(), conv(o, i)),
    "dcd sum": lambda i, o: Net(lambda s, x: torch.relu(s.b(x) + s.a(x)), a=conv(i, o, 1), b=dcd(i, o, 3)),
}


def filtered(optimised) -> int:
    """How many layers are."""
    return str(dcd_kernels.report(optimised)).count("Winograd")


def made(layer, inputs=33, outputs=47, first=None):
    return randomise(chain(first or conv(3, inputs, 1), layer(inputs, outputs)))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """Odd and even heights and widths, more and less than a tile, on every instruction set."""
    inputs = [image(2, 3, *size, seed=seed) for seed, size in enumerate(SIZES)]
    twin = assert_right(made(LAYERS[name]), *inputs, isas=ISAS)
    assert filtered(twin.optimised) == (2 if name == "two" else 1)


@pytest.mark.parametrize("inputs", CHANNELS)
@pytest.mark.parametrize("outputs", CHANNELS)
def test_channels(inputs, outputs):
    network = made(LAYERS["dcd"], inputs, outputs)
    assert_right(network, image(1, 3, 9, 12), image(3, 3, 5, 7, layout="channels_last"), isas=ISAS)


@pytest.mark.parametrize("padding", [0, 2, (0, 1), (3, 0), "same", "valid"], ids=str)
@pytest.mark.parametrize("layer", [conv, dcd], ids=["static", "dcd"])
def test_padding(layer, padding):
    network = made(lambda i, o: chain(layer(i, o, 3, padding=padding), norm(o), nn.ReLU()))
    assert_right(network, image(2, 3, 8, 11), image(2, 3, 13, 6), image(1, 3, 4, 4), isas=ISAS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads(isa, count):
    """The same bits whoever takes which tiles and planes; images of several blocks of tiles, and of one."""
    twin = Twin(made(LAYERS["two"], 64, 80))
    with threads(count):
        for size in ((7, 7), (40, 44)):
            x = image(2, 3, *size)
            twin.run(x, isas=(isa,))
            assert torch.equal(twin.optimised(x), twin.optimised(x))
    twin.check()


#: (Ci, Co, B, L of a block): blocks that end where planes, or pairs of planes, do, and in the midst of one
BLOCKS = {
    "24 channels": (48, 48, 2, 5),
    "24 and 40 channels, two planes of latents": (48, 80, 2, 19),
    "16 and 32 channels": (64, 128, 4, 3),
    "32 channels": (64, 64, 2, 8),
    "20 and 12 channels": (80, 48, 4, 16),
    "19 channels": (76, 76, 4, 1),
}


@pytest.mark.parametrize("attention", [True, False], ids=["lam", "no lam"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, attention):
    """Cut tiles and a skip; one thread, and two that share out planes or tiles; after an image of NaN."""
    inputs, outputs, blocks, latent = BLOCKS[name]
    layer = dcd(inputs, outputs, 3, blocks=blocks, latent_channels=latent, channel_attention=attention)
    network = Net(
        lambda s, x: torch.relu(s.norm(s.layer(x)) + s.skip(x)),
        skip=conv(inputs, outputs, 1),
        layer=layer,
        norm=norm(outputs),
    )
    twin = Twin(randomise(network, channels=inputs))
    nan = torch.full((3, inputs, 57, 38), float("nan"))
    images = [image(1, inputs, 57, 38), image(3, inputs, 14, 9), image(1, inputs, 5, 8)]
    for isa in ISAS:
        for count in (1, 2):
            with threads(count):
                with instruction_set(isa):
                    assert bool(twin.optimised(nan).isnan().all())
                twin.run(*images, isas=(isa,))
    twin.check()
    steps = twin.optimised.plan.whole.piece.steps
    assert [step.fields["blocks"] for step in steps if step.fields.get("winograd")] == [blocks]


TAKEN = {
    "both wide": (conv(32, 32), 1),
    "few inputs": (conv(31, 64), 0),
    "few outputs": (conv(64, 31), 0),
    "stride": (conv(32, 32, 3, stride=2), 0),
    "dilation": (conv(32, 32, 3, dilation=2), 0),
    "5×5": (conv(32, 32, 5), 0),
    "3×1": (conv(32, 32, (3, 1)), 0),
    "dcd": (dcd(32, 48, 3), 1),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_which_layers(name, dtype):
    """The others, and networks in bfloat16, multiply by their taps."""
    layer, taken = TAKEN[name]
    network = randomise(chain(conv(layer.in_channels, layer.in_channels, 1), layer), channels=None)
    optimised = dcd_kernels.optimize_for_inference(network.to(dtype))
    assert filtered(optimised) == (taken if dtype is torch.float32 else 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pixel", [(5, 6), (4, 7), (0, 0), (11, 12)])
def test_what_is_not_finite_goes_where_its_taps_go(pixel, value):
    """Sums of four inputs and four products have no pixel in them that the output does not read."""
    network = made(lambda i, o: conv(i, o))
    optimised = dcd_kernels.optimize_for_inference(network)
    x = image(2, 3, 12, 13)
    right = optimised(x)
    x[1, :, pixel[0], pixel[1]] = value
    got = optimised(x)
    assert torch.equal(got.isfinite(), written(network, x).isfinite())
    assert torch.equal(torch.where(got.isfinite(), got, right), right)


def test_weights_that_are_edited_are_filtered_again():
    optimised = dcd_kernels.optimize_for_inference(made(LAYERS["two"]))
    x = image(2, 3, 9, 10)
    before = optimised(x)
    with torch.no_grad():
        for parameter in optimised.parameters():
            parameter.mul_(1.5)
    assert_follows(optimised, x)
    assert not torch.equal(before, optimised(x))
