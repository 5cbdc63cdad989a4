# SPDX-License-Identifier: BSD-3-Clause
"""Layers and a whole network on the GPU against the reference backend and float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from on_device import ON_GPU, module_backend, random_map
from torch import nn

import dcd_kernels as dcd
from dcd_kernels.nn import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear

# name -> class, positional and keyword arguments, size of the input's pixels
LAYERS = {
    "pointwise": (DCDConv2d, (24, 40, 1), {}, (14, 14)),
    "pointwise strided": (DCDConv2d, (9, 14, 1), {"stride": 2}, (6, 5)),
    "pointwise activated": (DCDConv2d, (32, 64, 1), {"activation": "relu6"}, (7, 7)),
    "blocks": (DCDConv2d, (12, 6, 1), {"blocks": 3, "latent_channels": 5}, (6, 5)),
    "3x3": (DCDConv2d, (16, 32, 3), {"padding": 1}, (14, 14)),
    "3x3 joint": (DCDConv2d, (9, 14, 3), {"joint": True, "padding": 1, "latent_channels": 3}, (6, 5)),
    "grouped": (DCDConv2d, (8, 12, 3), {"groups": 2, "blocks": 4, "padding": 1}, (6, 5)),
    "depthwise": (DCDConv2d, (32, 32, 3), {"groups": 32, "padding": 1}, (14, 14)),
    "depthwise 5x5 strided": (DCDConv2d, (12, 12, 5), {"groups": 12, "padding": 2, "stride": 2}, (9, 8)),
    "released branch": (DCDConv2d, (9, 14, 1), {"pool_size": 2, "gate": "se", "branch_bias": True}, (7, 5)),
    "1-D": (DCDConv1d, (9, 14, 3), {"padding": 1}, (11,)),
    "3-D pointwise": (DCDConv3d, (5, 6, 1), {}, (4, 3, 5)),
    "one pixel": (DCDConv2d, (9, 14, 1), {}, (1, 1)),
}  # fmt: skip
SMALL = {
    "stem_stride": 1,
    "settings": ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)),
    "stem_channels": 16,
    "last_channels": 64,
}


def gradients(module: nn.Module, input, grad):
    """The output and every gradient, by name."""
    input = input.detach().requires_grad_()
    output = module(input)
    output.backward(grad.to(output.dtype))
    found = {"output": output.detach(), "input": input.grad}
    for name, parameter in module.named_parameters():
        found[name], parameter.grad = parameter.grad, None
    return found


def compare(module, input, grad, autocast: torch.dtype | None, together: bool = False):
    """Our kernels may err twice as much as the reference does at the same precision, plus 4 eps.

    ``together``: all parameters of a network at once, relative to their norms. One by one, two roundings of
    the same sum may by chance be more than a factor of two apart in one tensor of a hundred.
    """
    exact = gradients(copy.deepcopy(module).double(), input.double(), grad.double())
    found = {}
    for backend in (module_backend(), "reference"):
        with (
            dcd.use_backend(backend),
            torch.autocast(input.device.type, autocast, enabled=autocast is not None),
        ):
            found[backend] = gradients(copy.deepcopy(module), input, grad)
    mine, plain = found.values()
    assert mine.keys() == plain.keys() == exact.keys()
    errors = {}
    for name, truth in exact.items():
        if truth is None:
            assert mine[name] is None and plain[name] is None, name
            continue
        assert mine[name].isfinite().all(), name
        size = truth.norm().item() or 1.0
        eps = torch.finfo(autocast or mine[name].dtype).eps
        errors[name] = (*((t[name].double() - truth).norm().item() / size for t in (mine, plain)), eps)
    if together:
        parameters = [errors.pop(name) for name in list(errors) if name not in ("output", "input")]
        errors["parameters"] = tuple(math.hypot(*column) for column in zip(*parameters, strict=True))
    for name, (error, allowed, eps) in errors.items():
        assert error <= 2 * allowed + 4 * eps, (name, error, allowed)


@pytest.mark.parametrize("precision", ("fp32", "bf16", "autocast"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, layout, precision, device):
    kind, arguments, options, size = LAYERS[name]
    if layout == "channels_last" and len(size) != 2:
        pytest.skip("torch's channels_last is for images")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = kind(*arguments, **options).to(device, dtype)
    input = random_map(4, arguments[0], *size, seed=1, dtype=dtype, layout=layout)
    grad = random_map(*layer(input).shape, seed=2, dtype=dtype, layout=layout)
    compare(layer, input, grad, torch.bfloat16 if precision == "autocast" else None)


@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=str)
def test_linear(autocast, device):
    torch.manual_seed(0)
    layer = DCDLinear(64, 100, activation="relu").to(device)
    input = random_map(5, 7, 64, seed=1, dtype=torch.float32)
    compare(layer, input, random_map(5, 7, 100, seed=2, dtype=torch.float32), autocast)


@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("depthwise", ("static", "dcd"))
@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_mobilenet(training, depthwise, layout, autocast, device):
    torch.manual_seed(0)
    network = dcd.models.mobilenet_v2(1.0, 10, depthwise=depthwise, dropout=0.0, **SMALL)
    network = network.to(device).train(training)
    if layout == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    input = random_map(6, 3, 32, 32, seed=1, dtype=torch.float32, layout=layout)
    compare(network, input, random_map(6, 10, seed=2, dtype=torch.float32), autocast, together=True)


@pytest.mark.skipif(not ON_GPU, reason="the whole network takes a GPU")
def test_the_whole_network(device):
    """MobileNetV2 ×1.0 at 224², bf16 autocast, in training."""
    torch.manual_seed(0)
    network = dcd.models.mobilenet_v2(dropout=0.0).to(device, memory_format=torch.channels_last)
    input = random_map(16, 3, 224, 224, seed=1, dtype=torch.float32, layout="channels_last")
    grad = random_map(16, 1000, seed=2, dtype=torch.float32)
    compare(network, input, grad, torch.bfloat16, together=True)


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_compiled(training, device):
    torch._dynamo.reset()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(0)
    network = dcd.models.mobilenet_v2(1.0, 4, depthwise="dcd", dropout=0.0, **SMALL)
    network = network.to(device, memory_format=torch.channels_last).train(training)
    input = random_map(4, 3, 16, 16, seed=1, dtype=torch.float32, layout="channels_last")
    grad = random_map(4, 4, seed=2, dtype=torch.float32)
    exact = gradients(copy.deepcopy(network).double(), input.double(), grad.double())
    eager = gradients(copy.deepcopy(network), input, grad)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    mine = gradients(compiled, input, grad)
    errors = []
    largest = max(truth.norm().item() for truth in exact.values())
    for name, truth in exact.items():
        # a bias in front of a norm has no gradient but for roundings
        size = truth.norm().item() if truth.norm() > 1e-9 * largest else largest
        found = mine[name if name in mine else f"_orig_mod.{name}"], eager[name]
        errors.append([(tensor.double() - truth).norm().item() / size for tensor in found])
    error, allowed = (math.hypot(*column) for column in zip(*errors, strict=True))
    assert error <= 2 * allowed + 1e-6 * len(errors), (error, allowed)


def test_it_learns(device):
    torch.manual_seed(0)
    network = dcd.models.mobilenet_v2(1.0, 4, dropout=0.0, **SMALL).to(device)
    patterns = torch.randn(4, 3, 8, 8)
    labels = (torch.arange(64) % 4).to(device)
    images = (patterns[torch.arange(64) % 4] + 0.5 * torch.randn(64, 3, 8, 8)).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(network(images).float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses
