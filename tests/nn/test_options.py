# SPDX-License-Identifier: BSD-3-Clause
"""Defaults that follow from other options, and errors that name an option as the user passed it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dcd_kernels as dcd
from dcd_kernels.nn import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear


@pytest.mark.parametrize("layer", [DCDConv1d, DCDConv2d, DCDConv3d])
def test_a_grouped_layer_is_a_drop_in(layer):
    dynamic = layer(8, 12, 3, padding=1, groups=2, latent_channels=3)
    assert dynamic.blocks == 2
    input = torch.randn(2, 8, *(5,) * dynamic.spatial)
    _, phi = dynamic.coefficients(input)
    assert phi.shape == (2, 2, 3, 3)
    assert dynamic(input).shape == (2, 12, *(5,) * dynamic.spatial)


@pytest.mark.parametrize(
    "sides,options",
    [
        ((8, 8, 3), {}),
        ((8, 8, 3), {"groups": 8}),  # depthwise
        ((1, 8, 3), {"groups": 1}),
        ((8, 8, 2), {"groups": 2, "channel_fusion": False}),
        ((8, 8, 3), {"joint": True}),
    ],
)
def test_no_blocks_where_there_is_nothing_to_divide(sides, options):
    assert DCDConv2d(*sides, **options).blocks == 1


def test_one_block_beside_groups_is_still_an_error():
    with pytest.raises(ValueError, match="blocks must be a multiple of groups, got blocks=1, groups=2"):
        DCDConv2d(8, 8, 3, groups=2, blocks=1)
    with pytest.raises(ValueError, match="DCDConv2d: groups must be a positive integer that divides"):
        DCDConv2d(8, 8, 3, groups=3)
    with pytest.raises(ValueError, match=r"joint needs groups and blocks of 1.*got groups=2, blocks=1"):
        DCDConv2d(8, 8, 3, groups=2, joint=True)


@pytest.mark.parametrize("layer,sides", [(DCDConv2d, (8, 8, 1)), (DCDLinear, (8, 8))])
@pytest.mark.parametrize(
    "options,message,error",
    [
        ({"gate": "tanh"}, "gate must be one of .*got 'tanh'", ValueError),
        ({"lam_activation": "tanh"}, "lam_activation must be one of .*got 'tanh'", ValueError),
        ({"reduction": 0}, "reduction must be at least 1, got 0", ValueError),
        ({"reduction": "wide"}, "reduction must be an integer, got 'wide'", TypeError),
        ({"latent_channels": None}, "latent_channels must be an integer, .*, got None", TypeError),
        ({"squeeze_channels": 0}, "squeeze_channels must be at least 1, got 0", ValueError),
        ({"latent_channels": 0}, "latent_channels must be a positive integer, got 0", ValueError),
        ({"latent_channels": "third"}, "latent_channels must be an integer or one of .*'third'", ValueError),
        ({"latent_channels": 1.5}, "latent_channels must be an integer, .*got float", TypeError),
        ({"branch_dropout": 1.0}, "branch_dropout must be at least 0 and below 1, got 1.0", ValueError),
        ({"activation": "tanh"}, "activation must be one of .*'hardswish'.*got 'tanh'", ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_layer_and_the_option(layer, sides, options, message, error):
    with pytest.raises(error, match=rf"^{layer.__name__}: {message}"):
        layer(*sides, **options)


def test_size_of_the_condition_is_named_as_the_layer_names_it():
    with pytest.raises(ValueError, match=r"^DCDConv2d: condition_channels must be at least 1, got 0"):
        DCDConv2d(8, 8, 1, condition_channels=0)
    with pytest.raises(ValueError, match=r"^DCDLinear: condition_features must be at least 1, got 0"):
        DCDLinear(8, 8, condition_features=0)


@pytest.mark.parametrize(
    "layer,input",
    [(DCDConv2d(8, 8, 1), torch.randn(2, 8, 3, 3)), (DCDLinear(8, 8), torch.randn(2, 3, 8))],
    ids=["conv", "linear"],
)
def test_bad_condition(layer, input):
    name = type(layer).__name__
    message = rf"^{name}: condition must have shape \(2, .*batch size of input.*got "
    with pytest.raises(ValueError, match=message + r"\(3, 8\)"):
        layer(input, condition=torch.randn(3, 8))
    with pytest.raises(ValueError, match=message + r"\(2, 7\)"):
        layer(input, condition=torch.randn(2, 7))
    with pytest.raises(TypeError, match=f"^{name}: condition must be a torch.Tensor or None, got str"):
        layer(input, condition="image")
    with pytest.raises(TypeError, match=f"^{name}: input must be a torch.Tensor, got list"):
        layer([input])
    with pytest.raises(ValueError, match=rf"^{name}: condition must .*got \(8,\)"):
        layer(input, condition=torch.randn(8))
    assert layer(input, condition=torch.randn(2, 8)).shape == input.shape


def test_new_parameters_train_in_a_frozen_network_and_are_unknown_to_an_earlier_optimiser():
    network = nn.Sequential(nn.Conv2d(8, 8, 3)).requires_grad_(False)
    held = {id(parameter) for parameter in network.parameters()}
    dcd.convert(network)
    new = {name: p for name, p in network.named_parameters() if id(p) not in held}
    assert {"0.p", "0.q", "0.branch.squeeze.weight", "0.branch.expand.weight"} == set(new)
    assert all(parameter.requires_grad for parameter in new.values())
    assert not network[0].weight.requires_grad
