# SPDX-License-Identifier: BSD-3-Clause
"""Counts of a network: layer by layer against numbers added up by hand, and of the released networks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dcd_kernels as dcd
from dcd_kernels import extension
from dcd_kernels.models import complexity, mobilenet_v2, resnet10, resnet18, resnet50
from dcd_kernels.nn import DCDConv1d, DCDConv2d, DCDLinear, DynamicBranch


def only(layer, input_size):
    (count,) = complexity(layer, input_size).layers
    return count


def test_static_layers():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(1),
        nn.Linear(8 * 2 * 1, 5),
    )
    counted = complexity(network, (3, 7, 5))
    assert [layer.name for layer in counted.layers] == ["0", "3", "5"]
    # 4 × 3 pixels of 8·27; 2 × 1 of 8·18
    assert [layer.static for layer in counted.layers] == [12 * 216, 2 * 144, 16 * 5]
    assert [layer.parameters for layer in counted.layers] == [216 + 8, 144 + 8, 85]
    assert counted.parameters == 224 + 16 + 152 + 85
    assert (
        counted.static == counted.published == counted.executed == counted.factored == 12 * 216 + 2 * 144 + 80
    )


def test_pointwise_layer_by_hand():
    layer = DCDConv2d(6, 10, 1, bias=False, latent_channels=3, squeeze_channels=4, gate="se", pool_size=2)
    count = only(layer, (6, 4, 5))
    branch = 24 * 4 + 16 + 4 * (10 + 9)
    assert count.parameters == 60 + 30 + 18 + branch
    assert (count.static, count.branch) == (20 * 60, branch)
    # on the map 18 + 9 + 30 a pixel; PΦ 90 and (PΦ)Qᵀ 180; W0 60
    assert (count.on_map, count.synthesised, count.added) == (20 * 57, 270, 60)
    assert count.residual == 330
    few = only(layer, (6, 2, 2))
    assert (few.on_map, few.residual) == (4 * 57, 4 * 57)

    counted = complexity(layer, (6, 4, 5))
    assert counted.published == 1200 + branch + 270 + 60
    assert counted.factored == 1200 + branch + 1140
    assert counted.executed == 1200 + branch + 330


def test_the_other_forms_by_hand():
    branch = {"squeeze_channels": 4, "bias": False}
    lam = only(DCDConv2d(6, 10, 1, channel_fusion=False, **branch), (6, 4, 5))
    assert (lam.on_map, lam.synthesised, lam.added, lam.residual) == (0, 0, 0, 0)
    assert lam.branch == 6 * 4 + 4 * 10
    blocks = only(DCDConv2d(6, 10, 1, blocks=2, latent_channels=3, **branch), (6, 4, 5))
    assert (blocks.on_map, blocks.synthesised, blocks.added) == (20 * 66, 90 + 90, 60)
    # beside a 3×3 convolution in factors, however many pixels
    centre = only(DCDConv2d(6, 10, 3, padding=1, stride=2, latent_channels=3, **branch), (6, 40, 40))
    assert (centre.static, centre.on_map, centre.residual) == (400 * 540, 400 * 57, 400 * 57)
    assert (centre.synthesised, centre.added) == (270, 60)
    grouped = only(DCDConv2d(6, 10, 1, groups=2, latent_channels=3, **branch), (6, 40, 40))
    assert (grouped.static, grouped.residual, grouped.added) == (1600 * 30, 1600 * 66, 30)
    depthwise = only(DCDConv2d(10, 10, 3, padding=1, groups=10, **branch), (10, 4, 5))
    assert depthwise.static == 20 * 90 and depthwise.residual == 144 + 360 + 90
    assert (depthwise.synthesised, depthwise.added) == (10 * 4 * 9 + 10 * 16, 90)
    scaled = only(DCDConv2d(10, 10, 3, padding=1, groups=10, channel_fusion=False, **branch), (10, 4, 5))
    assert (scaled.residual, scaled.synthesised, scaled.added) == (90, 0, 0)
    options = {"latent_channels": 3, "latent_kernel": 2, **branch}
    joint = only(DCDConv2d(6, 10, 3, padding=1, stride=2, joint=True, **options), (6, 5, 4))
    assert joint.residual == joint.on_map == 20 * 18 + 6 * (2 * 3 * 9 + 18 + 30)
    linear = only(DCDLinear(6, 10, latent_channels=3, squeeze_channels=4), (6,))
    assert (linear.static, linear.on_map, linear.added, linear.residual) == (60, 57, 0, 57)
    rows = only(DCDLinear(6, 10, latent_channels=3, squeeze_channels=4), (7, 6))
    assert (rows.static, rows.on_map) == (7 * 60, 7 * 57)
    one = only(DCDConv1d(6, 10, 1, latent_channels=3, **branch), (6, 20))
    assert (one.static, one.residual) == (1200, 330)
    alone = only(DynamicBranch(6, 10, (3, 3), squeeze_channels=4), (6, 9, 9))
    assert (alone.static, alone.branch) == (0, 24 + 4 * 19)


@pytest.mark.parametrize(
    ("width", "parameters", "madds", "latents"),
    [
        (1.0, 5_720_028, 398_388_084, 656),
        (0.5, 3_056_616, 132_226_992, 472),
        (0.35, 2_267_932, 79_560_936, 390),
    ],
)
def test_exact_counts_of_the_released_mobilenet(width, parameters, madds, latents):
    """What the released code executes, factored everywhere; it also has two norms of each latent."""
    counted = complexity(mobilenet_v2(width, squeeze="pooled", device="meta"))
    assert counted.factored == madds
    assert counted.parameters + 4 * latents == parameters


@pytest.mark.parametrize(
    ("make", "parameters", "madds", "latents"),
    [(resnet18, 14_703_332, 1_883_045_531, 463), (resnet50, 29_835_056, 4_372_631_098, 918)],
)
def test_exact_counts_of_the_released_resnets(make, parameters, madds, latents):
    counted = complexity(make(classifier="dcd", device="meta"))
    assert counted.factored == madds
    assert counted.parameters + 4 * latents == parameters


def test_what_ours_execute():
    """The published 326.0 M and 104.8 M, where the released code executes 398.4 M and 132.2 M."""
    for width, published, released in ((1.0, 326.0e6, 398.4e6), (0.5, 104.8e6, 132.2e6)):
        executed = complexity(mobilenet_v2(width, squeeze="pooled", device="meta")).executed
        assert abs(executed - published) < 0.005 * published
        assert executed < 0.83 * released


@pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)
@pytest.mark.parametrize(
    "model", [lambda: mobilenet_v2(0.35, 10, depthwise="dcd"), lambda: resnet10(10, classifier="dcd")]
)
def test_executed_is_what_a_flop_counter_sees(model):
    """Two ways to one number: from the layers' sizes, and from the calls of a forward pass with data."""
    model = model().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), dcd.use_backend("cpu"):
        model(torch.randn(1, 3, 64, 64))
    assert counter.get_total_flops() == 2 * complexity(model, (3, 64, 64)).executed


def test_the_model_stays_as_it_is():
    torch.manual_seed(0)
    model = resnet10(4, channels=(8, 8, 8, 8), stem_pool=False)
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = complexity(model, (3, 16, 16))
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in model.modules())
    assert first == complexity(model.half(), (3, 16, 16))

    failing = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(RuntimeError):
        complexity(failing, (2, 5, 5))
    assert failing.training and not failing[0]._forward_hooks


def test_a_layer_called_twice_and_a_shared_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    counted = complexity(Twice(), (4,))
    assert counted.parameters == 16 and counted.static == 32


@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(3, 4, 2), nn.Bilinear(3, 3, 3)]
)
def test_other_matrices_raise(module):
    with pytest.raises(TypeError, match=r"complexity: model must be a torch\.nn\.Module, got type"):
        complexity(type(module))
    with pytest.raises(TypeError, match=f"complexity: model .* {type(module).__name__} 'inner'"):
        complexity(nn.ModuleDict({"inner": module}))


def test_norms_are_free():
    assert complexity(nn.Sequential(nn.LayerNorm((3, 4))), (3, 4)).executed == 0
