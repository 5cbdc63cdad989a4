# SPDX-License-Identifier: BSD-3-Clause
"""Networks that are none of dcd.models: every kind of layer and of data flow, and what is left as written."""

import graphs
import pytest
import torch
from operands import ISAS, instruction_set, threads
from runs import Twin, assert_right, image, randomise

import dcd_kernels as dcd

# networks whose input is a vector, and those with other than three channels
VECTORS = ("linear layers", "DCD linear layers")
CHANNELS = {"stem dilation": 2, "wide input": 37, "too many taps for a stem": 15}


def made(make, name):
    vector = name in VECTORS
    return randomise(make(), channels=None if vector or name == "BatchNorm1d" else CHANNELS.get(name, 3))


def inputs(name):
    if name in VECTORS:
        return [image(3, 3), image(1, 3, seed=1), image(19, 3, layout="sliced", seed=2)]
    channels = CHANNELS.get(name, 3)
    return [
        image(2, channels, 29, 22),
        image(1, channels, 16, 41, layout="channels_last", seed=1),
        image(3, channels, 12, 13, layout="sliced", seed=2),
    ]


@pytest.mark.parametrize("name", graphs.WHOLE)
def test_whole_networks(name):
    assert_right(made(graphs.WHOLE[name], name), *inputs(name), isas=ISAS)


@pytest.mark.parametrize("name", graphs.WHOLE)
def test_whole_networks_on_threads(name):
    """A step of one image is shared out among them; a batch of three is."""
    twin = Twin(made(graphs.WHOLE[name], name))
    with threads(3):
        twin.run(*inputs(name)[1:])
    twin.check()


@pytest.mark.parametrize("name", graphs.PARTS)
def test_what_has_no_kernel_runs_as_written(name):
    make, left, pieces = graphs.PARTS[name]
    network = made(make, name)
    assert_right(network, *inputs(name), isas=ISAS[-1:], pieces=pieces, left=left)


def test_written_to_input():
    """What the written network does to the caller's tensor, the optimised one does."""
    network = graphs.Net(lambda s, x: s.a(x.relu_()), a=graphs.conv(3, 8)).eval()
    optimised = dcd.optimize_for_inference(network)
    x, y = image(1, 3, 8, 8), image(1, 3, 8, 8)
    got, right = optimised(x), network(y).detach()
    assert torch.equal(x, y) and x.min() == 0
    torch.testing.assert_close(got, right)


def test_random_numbers_stay_random():
    """What is drawn in a forward is no constant."""
    network = graphs.Net(lambda s, x: s.a(x) + torch.rand(1), a=graphs.conv(3, 8)).eval()
    optimised = dcd.optimize_for_inference(network)
    x = image(1, 3, 8, 8)
    assert not torch.equal(optimised(x), optimised(x))


def test_constants_are_read_at_each_call():
    """A buffer in a sum is no constant of the graph."""
    network = graphs.Net(lambda s, x: s.a(x) * s.scale, a=graphs.conv(3, 8)).eval()
    network.register_buffer("scale", torch.full((8, 1, 1), 2.0))
    optimised = dcd.optimize_for_inference(network)
    x = image(1, 3, 8, 8)
    before = optimised(x)
    optimised.scale.mul_(3)
    torch.testing.assert_close(optimised(x), 3 * before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("position", [(0, 0), (2, 3), (7, 7), (5, 0)])
def test_max_pooling_keeps_nan(isa, position):
    """Wherever it is in a window, and only there."""
    network = graphs.chain(graphs.conv(3, 18, 1), torch.nn.MaxPool2d(3, 2, 1), graphs.conv(18, 18, 1)).eval()
    twin = Twin(network)
    x = image(2, 3, 8, 8)
    x[(1, 1, *position)] = float("nan")
    with torch.no_grad(), dcd.use_backend("reference"):
        expected = network(x)
    with instruction_set(isa):
        got = twin.optimised(x)
    assert torch.equal(got.isnan(), expected.isnan()) and expected.isnan().any()


@pytest.mark.parametrize("activation", ["ReLU", "ReLU6", "SiLU", "Hardswish"])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_keep_nan(isa, activation):
    act = getattr(torch.nn, activation)
    network = graphs.chain(graphs.conv(3, 18, 1), act(), graphs.deep(18), act(), graphs.conv(18, 5, 1), act())
    twin = Twin(network.eval())
    x = image(2, 3, 6, 7)
    x[1, 2, 3, 4] = float("nan")
    with torch.no_grad():
        expected = network(x)
    with instruction_set(isa):
        got = twin.optimised(x)
    assert torch.equal(got.isnan(), expected.isnan()) and expected.isnan().any()


# layers whose kernel sums up the means of what it makes; three planes, of which one is part empty
POOLED = {
    "pointwise": lambda: graphs.conv(18, 40, 1),
    "strided": lambda: graphs.conv(18, 40, 1, stride=2),
    "3×3": lambda: graphs.conv(18, 40, bias=False),
    "depthwise": lambda: graphs.chain(graphs.conv(18, 40, 1), graphs.deep(40)),
    "dynamic": lambda: graphs.dcd(18, 40, latent_channels=3),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", POOLED)
def test_means_are_those_of_the_image(name, isa, count):
    """In one pass with it where a thread makes whole planes, in another where threads share a plane."""
    network = randomise(
        graphs.Net(
            lambda s, x: graphs._then(s.act(s.b(s.a(x))), lambda y: (y, y.mean((2, 3)))),
            a=graphs.conv(3, 18),
            b=POOLED[name](),
            act=torch.nn.ReLU(),
        )
    )
    optimised = dcd.optimize_for_inference(network)
    for height, width in ((29, 22), (7, 7), (1, 1), (2, 31)):
        with instruction_set(isa), threads(count), torch.no_grad():
            x = image(1, 3, height, width)
            made, means = optimised(x)
            torch.testing.assert_close(made, network(x)[0], rtol=1e-4, atol=1e-4)
        right = made.double().mean((2, 3))
        eps = torch.finfo(means.dtype).eps
        torch.testing.assert_close(means.double(), right, rtol=8 * eps, atol=0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", POOLED)
def test_means_of_large_smooth_images(name, isa, count):
    """Equal numbers are rounded to the same side: sums in float32 alone are off by hundreds of eps."""
    network = randomise(
        graphs.Net(
            lambda s, x: graphs._then(s.b(s.a(x)), lambda y: (y, y.mean((2, 3)))),
            a=graphs.conv(3, 18, 1),
            b=POOLED[name](),
        )
    )
    optimised = dcd.optimize_for_inference(network)
    with instruction_set(isa), threads(count), torch.no_grad():
        made, means = optimised(torch.full((1, 3, 400, 500), 0.37))
    assert made.abs().amax((2, 3)).all(), "means of nothing"
    right = made.double().mean((2, 3))
    eps = torch.finfo(means.dtype).eps
    torch.testing.assert_close(means.double(), right, rtol=64 * eps, atol=0)
