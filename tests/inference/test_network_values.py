# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks of dcd.models in one op, in every formulation, against the written network in float64."""

import pytest
import torch
from operands import ISAS, threads
from runs import LAYOUTS, Twin, assert_right, image, randomise

import dcd_kernels as dcd
from dcd_kernels import models
from dcd_kernels.models import released

SMALL = {
    "num_classes": 37,
    "stem_channels": 16,
    "last_channels": 48,
    "settings": ((1, 8, 1, 1), (3, 16, 2, 2), (3, 24, 2, 2)),
    "reduction": 4,
}
# no multiple of the block of 16, more and less than one
RESNET = {"num_classes": 19, "channels": (5, 17, 24, 40), "reduction": 4}

MOBILENETS = {
    "dcd": {},
    "lam": {"pointwise": "lam", "classifier": "lam"},
    "fusion": {"pointwise": "fusion", "classifier": "fusion"},
    "static": {"pointwise": "static", "classifier": "static"},
    "depthwise dcd": {"depthwise": "dcd"},
    "depthwise lam": {"depthwise": "lam", "pointwise": "static"},
    "depthwise fusion": {"depthwise": "fusion", "pointwise": "lam", "classifier": "static"},
    "no gate": {"gate": None, "lam_activation": None},
    "relu gate": {"gate": "relu", "lam_activation": "sigmoid"},
    "λ sigmoid2, pool 2": {"lam_activation": "sigmoid2", "pool_size": 2},
    "λ hardsigmoid": {"lam_activation": "hardsigmoid", "branch_dropout": 0.2},
    "pooled squeeze": {"squeeze": "pooled", "pool_size": 3},
    "wide latent": {"latent_channels": 19, "latent_kernel": 5, "depthwise": "dcd"},
    "one latent": {"latent_channels": 1, "classifier_latent_channels": 1},
    "five channels": {"in_channels": 5, "stem_channels": 24, "stem_stride": 1},
    "one channel, wide stem": {"in_channels": 1, "stem_channels": 40, "num_classes": 3},
    "many input channels": {"in_channels": 18},
    "blocks": {"blocks": 2, "latent_channels": 3},
    "blocks, by the rule": {"blocks": 4, "pointwise": "fusion", "depthwise": "dcd"},
    "blocks as narrow as channels": {"blocks": 8, "latent_channels": 1},
}
# what has no kernel here: (name, options, how many layers are left)
LEFT = {
    "wide pool": ({"pool_size": (1, 2)}, "pool_size=(1, 2)"),
}
RESNETS = {
    "resnet10": (models.resnet10, {}),
    "resnet10 lam": (models.resnet10, {"convolutions": "lam"}),
    "resnet10 fusion": (models.resnet10, {"convolutions": "fusion", "classifier": "dcd"}),
    "resnet10 static": (models.resnet10, {"convolutions": "static"}),
    "resnet18": (models.resnet18, {"classifier": "dcd"}),
    "resnet50": (models.resnet50, {"classifier": "dcd"}),
    "resnet50 stride in the 1×1": (models.resnet50, {"bottleneck_stride": "1x1"}),
    "resnet10 blocks": (models.resnet10, {"blocks": 3, "channels": (6, 15, 24, 54)}),
    "resnet50 blocks": (models.resnet50, {"blocks": 2, "channels": (6, 18, 24, 34)}),
    "resnet10 joint": (models.resnet10, {"joint": True}),
    "resnet18 joint fusion": (models.resnet18, {"joint": True, "convolutions": "fusion", "latent_kernel": 2}),
    "resnet50 joint": (models.resnet50, {"joint": True, "classifier": "dcd"}),
}


def mobilenet(**options):
    return randomise(models.mobilenet_v2(**SMALL | options), channels=options.get("in_channels", 3))


@pytest.mark.parametrize("name", MOBILENETS)
def test_mobilenet(name):
    """Two odd sizes and a batch of three on every instruction set."""
    network = mobilenet(**MOBILENETS[name])
    channels = MOBILENETS[name].get("in_channels", 3)
    inputs = [image(3, channels, 35, 42), image(1, channels, 64, 29, layout="channels_last", seed=1)]
    assert_right(network, *inputs, isas=ISAS)


@pytest.mark.parametrize("name", LEFT)
def test_layers_without_a_kernel_run_as_written(name):
    options, reason = LEFT[name]
    twin = assert_right(mobilenet(**options), image(2, 3, 40, 33), pieces=None, left=None)
    assert any(reason in entry.reason for entry in dcd.report(twin.optimised).left)
    assert dcd.report(twin.optimised).taken


@pytest.mark.parametrize("name", RESNETS)
def test_resnet(name):
    make, options = RESNETS[name]
    network = randomise(make(**RESNET | options))
    assert_right(network, image(2, 3, 65, 47), image(1, 3, 96, 64, layout="channels_last"), isas=ISAS)


@pytest.mark.parametrize("width", [0.1, 0.35])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_released_mobilenet(width, dynamic):
    network = randomise(released.mobilenet_v2(width, 41, dynamic=dynamic))
    assert_right(network, image(2, 3, 65, 40), image(1, 3, 64, 64, seed=3), isas=ISAS)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_released_resnet(dynamic):
    network = randomise(released.resnet10(23, dynamic=dynamic))
    assert_right(network, image(2, 3, 65, 40), isas=ISAS[-1:])


@pytest.mark.full
@pytest.mark.parametrize("make", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
def test_released_networks_at_full_size(make):
    # the statistics of random images make ResNet-50, whose latents are of three layers a block, overflow
    network = randomise(getattr(released, make)(), channels=None if make == "resnet50" else 3)
    assert_right(network, image(2, 3, 96, 80), image(1, 3, 224, 224), isas=ISAS)


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (models.mobilenet_v2, {}),
        (models.mobilenet_v2, {"width_mult": 0.5}),
        (models.mobilenet_v2, {"depthwise": "dcd"}),
        (models.mobilenet_v2, {"blocks": 4}),
        (models.resnet18, {"blocks": 4}),
        (models.resnet18, {"joint": True}),
        (models.resnet18, {"classifier": "dcd"}),
        (models.resnet50, {"classifier": "dcd"}),
    ],
    ids=str,
)
def test_networks_at_full_size(make, options):
    assert_right(randomise(make(**options)), image(2, 3, 97, 80), image(1, 3, 224, 224), isas=ISAS)


@pytest.mark.parametrize("make", [released.mobilenet_v2, released.resnet10], ids=["mobilenet", "resnet10"])
def test_accelerated_networks(make):
    options = {"width_mult": 0.1} if make is released.mobilenet_v2 else {}
    network = dcd.accelerate(randomise(make(num_classes=29, **options)))
    assert dcd.report(network).taken
    assert_right(network, image(2, 3, 64, 47))


@pytest.fixture(scope="module")
def small():
    """One network for the tests of what may change from call to call."""
    torch.manual_seed(5)
    return Twin(mobilenet(depthwise="dcd"))


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_size_and_layout_may_change(small, batch, layout):
    for size in ((33, 47), (64, 64), (9, 8), (1, 1), (120, 5)):
        small.run(image(batch, 3, *size, layout=layout, seed=batch), isas=ISAS)
    small.check()


def test_layout_of_the_values_does_not_change_them(small):
    x = image(2, 3, 40, 31)
    expected = small.optimised(x)
    for layout in ("channels_last", "sliced"):
        assert torch.equal(small.optimised(image(2, 3, 40, 31, layout=layout)), expected)
    backwards = x.flip(3).contiguous().flip(3)  # torch has no negative strides: a copy
    assert torch.equal(small.optimised(backwards), expected)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(small.optimised(transposed), expected)


def test_empty_batch(small):
    got = small.optimised(torch.empty(0, 3, 32, 32))
    assert (got.shape, got.dtype) == ((0, 37), torch.float32)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", ISAS)
def test_threads(small, batch, isa):
    """The same bits at the same number of threads, and right at each."""
    x = image(batch, 3, 37, 50, seed=7)
    for count in (1, 2, 3):
        with threads(count):
            small.run(x, isas=(isa,))
            runs = {small.optimised(x).numpy().tobytes() for _ in range(3)}
        assert len(runs) == 1
    small.check()


def test_samples_do_not_touch_each_other(small):
    """A batch is its samples; one of NaN spoils itself alone."""
    x = image(3, 3, 40, 40)
    whole = small.optimised(x)
    x[1] = float("nan")
    spoiled = small.optimised(x)
    assert torch.equal(spoiled[0], whole[0]) and torch.equal(spoiled[2], whole[2])
    assert bool(spoiled[1].isnan().all())


def test_denormals_are_flushed_inside_alone(small):
    small.optimised(image(1, 3, 32, 32) * 1e-40)
    assert (torch.full((8,), 1e-40) * 1.0).ne(0).all()
