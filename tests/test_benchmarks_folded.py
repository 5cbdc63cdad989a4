# SPDX-License-Identifier: BSD-3-Clause
"""Networks folded by hand and the baselines compute what the written ones do: benchmarks/networks."""

from __future__ import annotations

import copy
import pathlib
import sys

import pytest
import torch
from torch import nn

# appended, so that an installed dcd_kernels keeps its place before the source tree
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.networks import baselines, folded
from dcd_kernels.models import released

CLASSES = 10


# ------------------------------------------------------------------------------------------------ folded


@pytest.mark.parametrize("form", folded.FORMS)
@pytest.mark.parametrize("network", ["mobilenet_v2_x0.1", "resnet10", "bottleneck"])
@pytest.mark.parametrize("batch", [1, 3])
def test_folded_networks_equal_the_written_ones_in_float64(form, network, batch):
    torch.manual_seed(0)
    if network == "bottleneck":
        made = released.ReleasedResNet(released.resnet.Bottleneck, (1, 1, 1, 1), CLASSES)
    elif network == "resnet10":
        made = released.resnet10(CLASSES)
    else:
        made = released.mobilenet_v2(0.1, CLASSES)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    made = made.double().eval()
    # 96 gives maps of 3 × 3 at the end, whose bins overlap
    images = torch.randn(batch, 3, 96, 96, dtype=torch.float64)
    ours = folded.fold(made, form)
    with torch.inference_mode():
        exact, found = made(images), ours(images)
    assert (found - exact).norm() <= 1e-10 * exact.norm()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in ours.modules())
    assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in made.modules())


def test_forms_differ_in_what_they_compute():
    network = released.mobilenet_v2(0.1, CLASSES)
    made = {form: folded.fold(network, form) for form in folded.FORMS}
    forms = {form: {layer.form for layer in _folded_layers(network_)} for form, network_ in made.items()}
    assert forms[folded.FACTORED] == {folded.FACTORED}
    for form in (folded.PRODUCT, folded.CONVOLUTION):
        # the classifier is in factors
        assert forms[form] == {form, folded.FACTORED}
        assert sum(layer.form == form for layer in _folded_layers(made[form])) == 32
    with pytest.raises(ValueError, match="form must be one of"):
        folded.fold(network, "weights")


def _folded_layers(network):
    return [module for module in network.modules() if isinstance(module, folded.FoldedLayer)]


@pytest.mark.parametrize("size", [(7, 7), (6, 8), (5, 3)])
@pytest.mark.parametrize("bins", [1, 2])
def test_pooling_by_slices(size, bins):
    input = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = nn.functional.adaptive_avg_pool2d(input, bins).flatten(1)
    torch.testing.assert_close(folded.pooled(input, bins), expected)


# --------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize(
    ("kind", "width", "published"),
    [
        (baselines.DY_CONV, 1.0, 11.1),
        (baselines.DY_CONV, 0.5, 4.0),
        (baselines.CONDCONV, 1.0, 27.5),
        (baselines.CONDCONV, 0.5, 15.5),
    ],
)
def test_baselines_have_the_published_parameters(kind, width, published):
    with torch.device("meta"):
        network = baselines.make_dynamic(released.mobilenet_v2(width, dynamic=False), kind)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert parameters == pytest.approx(published, rel=0.025)


@pytest.mark.parametrize("kind", baselines.EXPERTS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 5, 1, bias=False),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False),
        nn.Linear(6, 4),
    ],
)
def test_a_mixture_is_the_sum_of_its_kernels(kind, layer):
    torch.manual_seed(0)
    mixture = baselines.Mixture(layer, kind).double()
    linear = isinstance(layer, nn.Linear)
    if linear:
        nn.init.normal_(mixture.bias)
    input = torch.randn(3, 6, dtype=torch.float64) if linear else torch.randn(3, 6, 5, 5).double()
    shares = mixture.router(input if linear else input.mean((2, 3)))
    assert shares.shape == (3, baselines.EXPERTS[kind])
    single = copy.deepcopy(layer).double()
    for sample in range(3):
        expected = 0
        for k in range(baselines.EXPERTS[kind]):
            single.weight.data = mixture.weight.data[k].view(layer.weight.shape)
            if linear:
                single.bias.data = mixture.bias.data[k]
            expected = expected + shares[sample, k] * single(input[sample : sample + 1])
        torch.testing.assert_close(mixture(input)[sample : sample + 1], expected)
