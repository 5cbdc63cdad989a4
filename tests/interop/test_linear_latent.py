# SPDX-License-Identifier: BSD-3-Clause
"""The latent of a linear layer, where its mean is far larger than its deviation, as behind a pooling."""

from __future__ import annotations

import copy

import pytest
import torch

import dcd_kernels as dcd
from dcd_kernels.models.released import Classifier

BATCH, FEATURES, CLASSES = 8, 1280, 40


@pytest.fixture(params=range(3))
def layer(request):
    torch.manual_seed(request.param)
    layer = Classifier(FEATURES, CLASSES)
    with torch.no_grad():
        for norm in (layer.bn1, layer.bn2):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    return layer


@pytest.fixture
def input(layer):
    # each feature thirty deviations from zero
    return 2 * torch.rand(FEATURES) * (1 + torch.randn(BATCH, FEATURES) / 30)


def results(layer, input, grad):
    layer = copy.deepcopy(layer)
    input = input.clone().requires_grad_()
    output = layer(input)
    output.backward(grad)
    statistics = {name: buffer for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "input": input.grad, **gradients, **statistics}


@pytest.mark.parametrize("training", [True, False])
def test_the_error_is_that_of_the_layer_as_written(layer, input, training):
    layer.train()(input)
    layer.train()(input)  # running statistics are about these features, then
    layer.train(training)
    fused = dcd.accelerate(copy.deepcopy(layer))
    assert [entry.taken for entry in dcd.report(fused)] == [True]
    grad = torch.randn(BATCH, CLASSES)
    exact = results(copy.deepcopy(layer).double(), input.double(), grad.double())
    plain, found = results(layer, input, grad), results(fused, input, grad)
    assert found.keys() == exact.keys()
    eps = torch.finfo(torch.float32).eps
    for name, truth in exact.items():
        allowed = 2 * (plain[name].double() - truth).norm() + 4 * eps * truth.norm()
        assert (found[name].double() - truth).norm() <= allowed, name


def test_float64_is_the_same(layer, input):
    layer.double().train()
    fused = dcd.accelerate(copy.deepcopy(layer))
    grad = torch.randn(BATCH, CLASSES, dtype=torch.float64)
    exact, found = (results(one, input.double(), grad) for one in (layer, fused))
    for name, truth in exact.items():
        assert (found[name] - truth).norm() <= 1e-10 * truth.norm(), name
