# SPDX-License-Identifier: BSD-3-Clause
"""Networks in bfloat16: images, weights and results in bf16, against the written network in float64."""

from contextlib import contextmanager

import graphs
import pytest
import torch
from operands import ISAS, instruction_set, threads
from runs import LAYOUTS, Twin, assert_right, image, randomise
from subjects import NETWORKS, accelerated, assert_follows, in_parts, mobilenet, released_form
from test_network_blocks import BLOCKS, LAYERS, between_others, in_blocks
from test_network_graphs import CHANNELS, VECTORS, made
from test_network_values import MOBILENETS, RESNET, RESNETS, SMALL

import dcd_kernels
from dcd_kernels import models
from dcd_kernels.models import released

BF16 = torch.bfloat16
OPS = torch.ops.dcd_kernels
each = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


@contextmanager
def widened():
    """bf16 is multiplied in fp32, at every instruction set."""
    OPS._set_cpu_products("widened")
    try:
        yield
    finally:
        OPS._set_cpu_products("")


def narrow(network):
    return network.bfloat16()


def picture(*shape, **options):
    return image(*shape, **options).to(BF16)


def right(network, *inputs, **options):
    """On every instruction set, and on the best one in fp32 too."""
    twin = Twin(narrow(network), **options)
    twin.run(*inputs, isas=ISAS)
    with widened():
        twin.run(*inputs)
    twin.check()
    return twin


def inputs(name):
    if name in VECTORS:
        return [picture(3, 3), picture(1, 3, seed=1), picture(19, 3, layout="sliced", seed=2)]
    channels = CHANNELS.get(name, 3)
    return [
        picture(2, channels, 29, 22),
        picture(1, channels, 16, 41, layout="channels_last", seed=1),
        picture(3, channels, 12, 13, layout="sliced", seed=2),
    ]


@pytest.mark.parametrize("name", MOBILENETS)
def test_mobilenet(name):
    channels = MOBILENETS[name].get("in_channels", 3)
    network = randomise(models.mobilenet_v2(**SMALL | MOBILENETS[name]), channels=channels)
    right(network, picture(3, channels, 35, 42), picture(1, channels, 64, 29, layout="channels_last", seed=1))


@pytest.mark.parametrize("name", RESNETS)
def test_resnet(name):
    make, options = RESNETS[name]
    right(randomise(make(**RESNET | options)), picture(2, 3, 65, 47))


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("make", ["mobilenet_v2", "resnet10"])
def test_released_form(make, dynamic):
    options = {"width_mult": 0.1} if make == "mobilenet_v2" else {}
    network = randomise(getattr(released, make)(num_classes=23, dynamic=dynamic, **options))
    right(network, picture(2, 3, 65, 40), picture(1, 3, 64, 64, seed=3))


def test_accelerated():
    network = dcd_kernels.accelerate(randomise(released.mobilenet_v2(0.1, 29)))
    assert_right(narrow(network), picture(2, 3, 64, 47))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    network, images = in_blocks(name)
    right(network, *(x.to(BF16) for x in images))


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_and_joint_fusion_between_layers(name):
    """With images whose memory held NaN, a larger one, before."""
    twin = Twin(narrow(between_others(name)))
    for isa in ISAS:
        with instruction_set(isa):
            nan = torch.full((2, 3, 40, 40), float("nan"), dtype=BF16)
            assert bool(twin.optimised(nan).isnan().all())
        twin.run(picture(2, 3, 21, 26), picture(1, 3, 9, 11, layout="channels_last"), isas=(isa,))
    with widened():
        twin.run(picture(2, 3, 21, 26))
    with threads(3):
        twin.run(picture(1, 3, 21, 26), picture(4, 3, 12, 9))
    twin.check()


def test_mobilenet_at_half_width():
    right(randomise(models.mobilenet_v2(0.5)), picture(1, 3, 64, 80), picture(2, 3, 96, 65))


@pytest.mark.parametrize("name", graphs.WHOLE)
def test_every_layer(name):
    right(made(graphs.WHOLE[name], name), *inputs(name))


# the tensor that "a tensor made on the way" makes is in float32, and so is all behind it
@pytest.mark.parametrize("name", sorted(graphs.PARTS.keys() - {"a tensor made on the way"}))
def test_what_has_no_kernel_runs_as_written(name):
    make, left, pieces = graphs.PARTS[name]
    assert_right(narrow(made(make, name)), *inputs(name), pieces=pieces, left=left)


@pytest.fixture(scope="module")
def small():
    return Twin(narrow(mobilenet(depthwise="dcd")))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_size_and_layout_may_change(small, batch, layout):
    for size in ((33, 47), (64, 64), (9, 8), (1, 1), (120, 5)):
        small.run(image(batch, 3, *size, seed=batch, layout=layout).to(BF16), isas=ISAS)
    small.check()
    x = picture(batch, 3, 40, 31)
    for other in ("channels_last", "sliced"):
        assert torch.equal(small.optimised(picture(batch, 3, 40, 31, layout=other)), small.optimised(x))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads(small, batch):
    x = picture(batch, 3, 37, 50, seed=7)
    for count in (1, 2, 3):
        with threads(count):
            small.run(x, isas=ISAS)
            first = small.optimised(x)
            assert all(torch.equal(small.optimised(x), first) for _ in range(3))
    small.check()


def test_samples_do_not_touch_each_other(small):
    x = picture(3, 3, 40, 40)
    whole = small.optimised(x)
    x[1] = float("nan")
    spoiled = small.optimised(x)
    assert torch.equal(spoiled[0], whole[0]) and torch.equal(spoiled[2], whole[2])
    assert bool(spoiled[1].isnan().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [3, 17])
def test_infinity_stays_where_it_is(isa, channels):
    """What lies beside a last, odd channel, or behind the last column of a kernel, is not multiplied."""
    network = narrow(
        randomise(graphs.chain(graphs.conv(3, channels), graphs.conv(channels, 5)), channels=None)
    )
    x = picture(1, 3, 12, 21)
    x[0, :, 4, 10] = float("inf")
    twin = Twin(network)
    _, truth = twin.written(x)  # in bf16, torch spreads it to other pixels
    with instruction_set(isa):
        got = twin.optimised(x)
    assert torch.equal(got.isfinite(), truth[0].isfinite())


def test_norms_are_folded_before_weights_are_rounded():
    """Of sixty-four weights none is rounded twice."""
    network = narrow(graphs.chain(graphs.conv(1, 64, 1, bias=False), graphs.norm(64, eps=0.0)).eval())
    with torch.no_grad():
        network[0].weight.uniform_(0.5, 2)
        network[1].running_var.uniform_(0.5, 2)
        once = network[0].weight.double() / network[1].running_var.double().sqrt()[:, None, None, None]
        twice = network[0].weight / network[1].running_var.sqrt()[:, None, None, None]
    got = dcd_kernels.optimize_for_inference(network)(torch.ones(1, 1, 1, 1, dtype=BF16))
    assert torch.equal(got, once.to(BF16).view(1, 64, 1, 1))
    assert not torch.equal(twice, once.to(BF16))


@pytest.mark.parametrize("make", [mobilenet, released_form, accelerated])
def test_norms_in_float32(make):
    network = narrow(make())
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.float()
    assert norms and all(norm.running_var.dtype is torch.float32 for norm in norms)
    assert_right(network, picture(2, 3, 33, 40))


def test_a_layer_in_another_dtype_runs_as_written():
    network = graphs.Net(
        lambda s, x: s.tail(s.c(s.b(s.a(x)).float())),
        a=narrow(graphs.conv(3, 18)),
        b=narrow(graphs.dcd(18, 17, latent_channels=3)),
        c=graphs.conv(17, 5),
        tail=torch.nn.ReLU(),
    ).eval()
    twin = Twin(network, left=("float_1", "c", "tail"))
    twin.wide.function = lambda s, x: s.tail(s.c(s.b(s.a(x))))
    twin.run(picture(2, 3, 19, 18))
    twin.eps = torch.finfo(BF16).eps
    twin.check()
    assert "torch.float32" in str(dcd_kernels.report(twin.optimised))


@each
def test_weights_may_change(make):
    optimised = dcd_kernels.optimize_for_inference(narrow(make()))
    x = picture(2, 3, 33, 40)
    assert_follows(optimised, x)
    before = optimised(x)
    with torch.no_grad():
        next(optimised.parameters()).mul_(0.5)
    assert not torch.equal(optimised(x), before)
    assert_follows(optimised, x)
    for tensor in optimised.parameters():
        if tensor.is_floating_point():
            tensor.data = tensor.data * 0.75
    assert_follows(optimised, x)


@each
def test_copies(make, tmp_path):
    optimised = dcd_kernels.optimize_for_inference(narrow(make()))
    x = picture(2, 3, 33, 40)
    expected = optimised(x)
    torch.save(optimised, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    assert_follows(again, x)
    if make is not accelerated:  # in a pickle the modules are not patched, and numbers are taken elsewhere
        assert torch.equal(again(x), expected)
    other = dcd_kernels.optimize_for_inference(narrow(make()))
    other.load_state_dict(optimised.state_dict())
    assert torch.equal(other(x), expected)


def test_moved_to_another_dtype_and_back():
    optimised = dcd_kernels.optimize_for_inference(released_form())
    wide = image(2, 3, 33, 40)
    assert_follows(optimised, wide)
    optimised.bfloat16()
    assert_follows(optimised, wide.to(BF16))
    assert optimised.plan.dtype is BF16
    optimised.float()
    assert_follows(optimised, wide)


@pytest.mark.parametrize("make", [mobilenet, in_parts], ids=["whole", "in parts"])
def test_another_dtype_raises(make):
    optimised = dcd_kernels.optimize_for_inference(narrow(make()))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64):
        bad = torch.zeros(1, 3, 32, 32, dtype=dtype)
        with pytest.raises(RuntimeError) as written:
            optimised.written(bad)
        with pytest.raises(RuntimeError) as own:
            optimised(bad)
        assert str(own.value) == str(written.value)
    assert_follows(optimised, picture(2, 3, 33, 40))
