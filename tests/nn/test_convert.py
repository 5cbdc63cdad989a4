# SPDX-License-Identifier: BSD-3-Clause
"""``convert``: which layers it takes, what stays the same, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dcd_kernels.nn import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear, DynamicBranch, convert


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.Conv2d(32, 16, 2),
        nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def dynamic_layers(model):
    kinds = (DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def test_default_takes_the_dense_convolutions_inside():
    model = network().eval()
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x)
    assert convert(model) is model
    assert dynamic_layers(model) == {"2", "6.1"}
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
    before = [id(module) for module in model.modules()]
    convert(model)
    assert [id(module) for module in model.modules()] == before, "a second call found something to do"


def test_where_and_options():
    model = network()
    asked = {}

    def where(name, module):
        asked[name] = module
        return name in ("0", "3", "4", "9")

    convert(model, where, reduction=4, lam_activation=None)
    assert set(asked) == {"0", "2", "3", "4", "5", "6.1", "9"}
    assert all(isinstance(module, (nn.Conv2d, nn.Linear)) for module in asked.values())
    assert dynamic_layers(model) == {"0", "3", "4", "9"}
    assert model[3].depthwise and model[4].blocks == 4
    assert model[9].branch.squeeze_channels == 4 and model[9].branch.lam_activation is None


def test_parameters_flags_and_mode_are_kept():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)).double()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    weight, bias = model[0].weight, model[0].bias
    convert(model)
    assert model[0].weight is weight and model[0].bias is bias
    assert not model[0].weight.requires_grad and model[0].p.requires_grad
    assert [model[0].training, model[0].branch.training, model[2].training] == [False, False, True]
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_shared_module_stays_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(16, 16, 1)
            self.inner = nn.ModuleDict({"second": self.first, "other": nn.Conv2d(16, 16, 1)})

        def forward(self, x):
            return self.inner["other"](self.inner["second"](self.first(x)))

    model = Shared()
    x = torch.randn(2, 16, 4, 4)
    wanted = model(x)
    asked = []
    convert(model, lambda name, module: asked.append(name) or True)
    assert asked == ["first", "inner.other"]
    assert model.first is model.inner["second"] and isinstance(model.first, DCDConv2d)
    assert isinstance(model.inner["other"], DCDConv2d)
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


def test_a_module_twice_in_one_parent():
    layer = nn.Conv2d(16, 16, 1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    convert(model)
    assert isinstance(model[0], DCDConv2d) and model[2] is model[0]


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv1d(16, 16, 3), DCDConv1d),
        (nn.Conv2d(16, 16, 3), DCDConv2d),
        (nn.Conv3d(16, 16, 3), DCDConv3d),
    ],
)
def test_the_model_itself(layer, kind):
    converted = convert(layer)
    assert type(converted) is kind and converted.weight is layer.weight
    linear = nn.Linear(16, 16)
    assert convert(linear) is linear
    assert type(convert(linear, lambda name, module: name == "")) is DCDLinear


def test_branches_are_left_alone():
    model = nn.Sequential(DCDConv2d(16, 16, 1), DynamicBranch(16, 16, None))
    convert(model, lambda name, module: pytest.fail(f"asked about {name}"))


class Standardised(nn.Conv2d):
    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.ConvTranspose2d(16, 16, 3), "must be one of nn.Conv1d"),
        (lambda: nn.LazyConv2d(16, 3), "must be one of nn.Conv1d"),
        (lambda: Standardised(16, 16, 3), "must be one of nn.Conv1d"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), "must be one of nn.Conv1d"),
        (lambda: prune.random_unstructured(nn.Conv2d(16, 16, 3), "weight", 0.5), "not a parameter"),
    ],
)
def test_refused_layers(layer, message):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), layer())
    untouched = model[0]
    with pytest.raises(TypeError, match=rf"convert: where selected '1' \(\w+\).*{message}"):
        convert(model, lambda name, module: True)
    assert model[0] is untouched, "replaced something before it failed"
    convert(model)
    assert dynamic_layers(model) == {"0"}


def test_refused_where_weights_are_read_without_a_call():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(TypeError, match=r"'linear1'.* nn.TransformerEncoderLayer reads its weight"):
        convert(encoder, lambda name, module: name == "linear1")
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(TypeError, match="'out_proj'"):
        convert(attention, lambda name, module: True)


def test_what_is_no_model_and_no_function():
    with pytest.raises(TypeError, match=r"convert: model must be a torch\.nn\.Module, got str"):
        convert("resnet18")
    with pytest.raises(TypeError, match=r"convert: where must be a function .*, got .1x1"):
        convert(nn.Sequential(nn.Conv2d(16, 16, 1)), where="1x1")


def test_options_that_a_layer_lacks():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 2), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"convert: '1' \(Conv2d\): DCDConv2d: kernel_size must be odd"):
        convert(model, lambda name, module: True)
    with pytest.raises(TypeError, match=r"convert: '2' \(Linear\): .*joint"):
        convert(model, lambda name, module: name == "2", joint=True)
    with pytest.raises(TypeError, match=r"convert: '0' \(Conv2d\): DCDConv2d got an unexpected .*'rank'"):
        convert(model, lambda name, module: name == "0", rank=3)
    with pytest.raises(ValueError, match="lam_activation"):
        convert(model, lam_activation="sigmoid")
    assert dynamic_layers(model) == set()


def test_a_converted_network_trains_and_copies():
    torch.manual_seed(0)
    model = convert(network(), lambda name, module: name not in ("0", "5"))
    x, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "0.bias" not in name)
    lam, phi = model[2].coefficients(torch.rand(4, 16, 8, 8))
    assert (lam - 1).abs().max() > 1e-3 and phi.abs().max() > 1e-3
    model.eval()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
