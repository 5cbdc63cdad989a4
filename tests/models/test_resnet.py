# SPDX-License-Identifier: BSD-3-Clause
"""ResNet: which layers are dynamic, parameter counts, and that it runs and learns."""

import copy

import pytest
import torch
import torch.nn.functional as F

import dcd_kernels as dcd
from dcd_kernels.models import resnet10, resnet18, resnet34, resnet50
from dcd_kernels.nn import DCDConv2d, DCDLinear

SMALL = {
    "in_channels": 1,
    "channels": (8, 12, 16, 20),
    "stem_kernel": 3,
    "stem_stride": 1,
    "stem_pool": False,
    "reduction": 4,
}


def parameters(make, **options):
    return sum(p.numel() for p in make(device="meta", **options).parameters())


def dynamic_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (DCDConv2d, DCDLinear))}


@pytest.mark.parametrize(
    ("make", "static"),
    [(resnet10, 5_418_792), (resnet18, 11_689_512), (resnet34, 21_797_672), (resnet50, 25_557_032)],
)
def test_parameters_of_the_static_network(make, static):
    """As known from elsewhere; ResNet-10 is ResNet-18 less four blocks and no shortcut's convolution."""
    assert parameters(make, convolutions="static") == static


def added_by_hand(in_channels, out_channels, pooled):
    """P, Q and the branch of one layer: L = ⌊√I⌋, squeeze I/16, a gate of s × s, no biases."""
    latent = int(pooled**0.5)
    squeeze = max(pooled // 16, 4)
    return (
        latent * (in_channels + out_channels)
        + squeeze * (pooled + squeeze)
        + squeeze * (out_channels + latent * latent)
    )


def test_parameters_of_the_dynamic_networks():
    basic = bottleneck = 0
    width = 64
    for channels in (64, 128, 256, 512):
        basic += added_by_hand(width, channels, 4 * width) + 3 * added_by_hand(
            channels, channels, 4 * channels
        )
        width = channels
    assert basic == 2_881_408
    assert parameters(resnet18) == 11_689_512 + basic
    width = 64
    for channels, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(depth):
            for pair in ((width, channels), (channels, channels), (channels, 4 * channels)):
                bottleneck += added_by_hand(*pair, pair[0])
            width = 4 * channels
    assert parameters(resnet50) == 25_557_032 + bottleneck
    # published without the classifier's 513,000 for ResNet-18, 14.0 M
    assert abs(parameters(resnet18) - 513_000 - 14.0e6) < 0.01 * 14.0e6
    # the released networks: a dynamic classifier, and two BatchNorms of the latent a layer, 4 L parameters
    for make, released in ((resnet18, 14_703_332), (resnet50, 29_835_056)):
        model = make(device="meta", classifier="dcd")
        norms = sum(4 * layer.latent_channels for layer in dynamic_layers(model).values())
        assert sum(p.numel() for p in model.parameters()) + norms == released
    for classifier, inputs in ((resnet18, 512), (resnet50, 2048)):
        added = parameters(classifier, classifier="dcd") - parameters(classifier)
        assert added == inputs * 32 + 32 * 32 + 32 * (1000 + 32 * 32) + 32 * (inputs + 1000)


def test_which_layers_are_dynamic():
    layers = dynamic_layers(resnet18(device="meta"))
    assert list(layers) == [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)]
    layer = layers["layer2.0.conv1"]
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) == (
        64,
        128,
        (3, 3),
        (2, 2),
    )
    assert layer.latent_channels == 16 and not layer.joint and layer.branch.pool_size == (2, 2)
    assert [layers[f"layer{s}.1.conv2"].latent_channels for s in (1, 2, 3, 4)] == [16, 22, 32, 45]
    assert layers["layer4.1.conv2"].branch.squeeze.weight.shape == (128, 2048)

    layers = dynamic_layers(resnet50(device="meta", classifier="dcd"))
    assert len(layers) == 3 * 16 + 1 and "fc" in layers
    layer = layers["layer4.2.conv1"]
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (2048, 512, (1, 1))
    assert (layer.latent_channels, layer.branch.pool_size) == (45, None)
    assert layers["layer2.0.conv2"].stride == (2, 2) and layers["layer2.0.conv1"].stride == (1, 1)
    assert layers["fc"].latent_channels == layers["fc"].branch.squeeze_channels == 32

    first = dynamic_layers(resnet50(device="meta", bottleneck_stride="1x1"))
    assert first["layer2.0.conv2"].stride == (1, 1) and first["layer2.0.conv1"].stride == (2, 2)
    joint = dynamic_layers(resnet50(device="meta", joint=True))
    assert {name[-5:] for name, layer in joint.items() if layer.joint} == {"conv2"}
    joint = dynamic_layers(resnet18(device="meta", joint=True))
    layer = joint["layer1.0.conv1"]
    # L_k = 4 of nine kernel elements, and the rule for 64 // 4 channels
    assert all(layer.joint for layer in joint.values()) and layer.latent_kernel == 4
    assert layer.latent_channels == 8 and layer.branch.phi_shape == (4, 8, 8)


@pytest.mark.parametrize("name", ["lam", "fusion", "dcd"])
def test_formulations(name):
    layers = dynamic_layers(resnet34(convolutions=name, classifier=name, device="meta")).values()
    assert len(layers) == 2 * 16 + 1
    assert {layer.channel_attention for layer in layers} == {name != "fusion"}
    assert {layer.channel_fusion for layer in layers} == {name != "lam"}


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_keys_of_the_static_network(make):
    """W0 of a trained static network loads by key, also into the dynamic one."""
    static = make(convolutions="static", device="meta").state_dict()
    expansion = 4 if make is resnet50 else 1
    for key, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv2.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128 * expansion, 64 * expansion, 1, 1),
        "layer2.0.downsample.1.bias": (128 * expansion,),
        "layer4.1.bn2.weight": (512,),
        "fc.weight": (1000, 512 * expansion),
        "fc.bias": (1000,),
    }.items():
        assert static[key].shape == shape
    assert ("layer1.0.downsample.0.weight" in static) == (make is resnet50)
    assert ("layer3.5.bn3.bias" in static) == (make is resnet50)
    dynamic = make(device="meta", classifier="dcd").state_dict()
    assert static.keys() <= dynamic.keys()
    assert all(dynamic[key].shape == value.shape for key, value in static.items())


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_static_network_written_out(make):
    """The static network against torch's functions, from its keys alone."""
    torch.manual_seed(0)
    model = make(5, convolutions="static", dtype=torch.float64, **SMALL).eval()
    state = model.state_dict()
    for key, value in state.items():
        if "bn" in key or "downsample.1" in key:
            if key.endswith(("running_mean", "bias")):
                value.normal_()
            elif key.endswith("running_var"):
                value.uniform_(0.5, 2)

    def layer(x, conv, norm, stride=1, activate=True):
        weight = state[conv + ".weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(state[f"{norm}.{name}"] for name in names), eps=1e-5)
        return x.clamp(min=0) if activate else x

    x = torch.randn(2, 1, 13, 11, dtype=torch.float64)
    y = layer(x, "conv1", "bn1")
    convolutions = 3 if make is resnet50 else 2
    for stage, depth in enumerate((3, 4, 6, 3) if make is resnet50 else (2, 2, 2, 2), 1):
        for index in range(depth):
            block, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            z = y
            for number in range(1, convolutions + 1):
                step = stride if number == convolutions - 1 else 1
                z = layer(z, f"{block}.conv{number}", f"{block}.bn{number}", step, number < convolutions)
            if f"{block}.downsample.0.weight" in state:
                y = layer(y, f"{block}.downsample.0", f"{block}.downsample.1", stride, False)
            y = (y + z).clamp(min=0)
    wanted = y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [resnet18, resnet50])
@pytest.mark.parametrize("options", [{}, {"joint": True}, {"blocks": 2}], ids=["centre", "joint", "blocks"])
def test_equal_to_the_reference(make, options, backend):
    """Under each backend by name, against the reference, and not without its Φ."""
    torch.manual_seed(0)
    model = make(5, classifier="dcd", dtype=torch.float64, **SMALL, **options).eval()
    x = torch.randn(2, 1, 9, 14, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        with dcd.use_backend("reference"):
            wanted = model(x)
            for layer in dynamic_layers(model).values():
                layer.p.data.zero_()
            without = model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    assert (without - wanted).norm() > 0.01 * wanted.norm()


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_an_untrained_network_sees_its_input(make):
    torch.manual_seed(0)
    model = make(20).eval()
    features = []
    for name in model.stages:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: features.append(output.square().mean().sqrt())
        )
    with torch.no_grad():
        logits = model(torch.randn(3, 3, 48, 48))
    assert len(features) == 4 and all(0.2 < rms < 5 for rms in features)
    assert logits.std(0).mean() > 0.05 * logits.std()


@pytest.mark.parametrize(
    ("make", "options"), [(resnet10, {"joint": True}), (resnet18, {"blocks": 2}), (resnet50, {})]
)
def test_runs_and_every_parameter_has_a_gradient(make, options):
    torch.manual_seed(0)
    model = make(7, classifier="dcd", **SMALL, **options)
    y = model(torch.randn(4, 1, 16, 16))
    assert y.shape == (4, 7)
    y.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


def test_the_whole_network_on_a_photograph_and_on_one_pixel():
    torch.manual_seed(0)
    model = resnet18().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 65, 40)).shape == (1, 1000)
        assert model(torch.randn(2, 3, 1, 1)).isfinite().all()


def test_small_network_learns():
    torch.manual_seed(0)
    model = resnet10(4, **SMALL)
    patterns = torch.randn(4, 1, 8, 8)
    labels = torch.arange(64) % 4
    images = patterns[labels] + 0.7 * torch.randn(64, 1, 8, 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("make", [resnet10, resnet50])
def test_eval_samples_are_independent_in_both_layouts(make):
    torch.manual_seed(0)
    model = make(4, classifier="dcd", dtype=torch.float64, **SMALL).eval()
    x = torch.randn(3, 1, 9, 7, dtype=torch.float64)
    together = model(x)
    torch.testing.assert_close(
        torch.cat([model(x[i : i + 1]) for i in range(3)]), together, rtol=1e-9, atol=1e-9
    )
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    y = last(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, together, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_compile_of_a_block(make, fresh_compiler):
    torch.manual_seed(0)
    block = make(4, **SMALL).layer2[0].eval()
    x = torch.randn(2, block.conv1.in_channels, 9, 7).relu()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_compile_autocast_and_half(fresh_compiler):
    torch.manual_seed(0)
    model = resnet10(4, classifier="dcd", **SMALL).eval()
    x = torch.randn(2, 1, 12, 12)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(x)
    as_half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    for y in (under_autocast, as_half):
        assert y.dtype == torch.bfloat16
        assert (y - wanted).norm() < 0.1 * wanted.norm()


def test_options_reach_the_layers():
    options = {
        "latent_channels": "halving",
        "reduction": 4,
        "squeeze": "wider",
        "pool_size": 1,
        "gate": "relu",
        "lam_activation": "sigmoid2",
        "branch_dropout": 0.3,
        "classifier": "fusion",
        "classifier_latent_channels": 5,
        "classifier_squeeze_channels": None,
        "device": "meta",
    }
    model = resnet50(dropout=0.4, **options)
    layer, linear = model.layer2[0].conv1, model.fc
    assert layer.latent_channels == 8 and layer.branch.pool_size is None  # 128 halved until below √128
    assert layer.branch.squeeze_channels == 256 // 4
    assert linear.latent_channels == 5 and linear.branch.squeeze_channels == 2048 // 4
    for module in (layer, linear):
        branch = module.branch
        assert (branch.gate_name, branch.lam_activation, branch.dropout) == ("relu", "sigmoid2", 0.3)
    assert model.dropout.p == 0.4
    assert resnet50(device="meta").dropout.p == 0.1 and resnet18(device="meta").dropout.p == 0
    assert resnet18(device="meta", joint=True, latent_kernel=2).layer1[0].conv1.latent_kernel == 2
    assert resnet18(device="meta", pool_size=3).layer1[0].conv1.latent_channels == 24
    # Φ of a wide latent asks for the wider squeeze: 64² / 16 against 256 / 16
    assert resnet18(device="meta", latent_channels=64).layer1[0].conv1.branch.squeeze_channels == 256
    assert resnet18(device="meta", joint=True).layer1[0].conv1.branch.squeeze_channels == 16
    assert resnet18(device="meta", blocks=4).layer1[0].conv1.branch.phi_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("num_classes", {"num_classes": 0}),
        ("convolutions", {"convolutions": "dynamic"}),
        ("classifier", {"classifier": "full"}),
        ("blocks", {"blocks": 2, "convolutions": "lam"}),
        ("blocks", {"blocks": 3}),
        ("blocks", {"blocks": 2, "joint": True}),
        ("joint", {"joint": True, "convolutions": "static"}),
        ("latent_kernel", {"latent_kernel": 2}),
        ("latent_channels", {"latent_channels": "half"}),
        ("squeeze", {"squeeze": "narrow"}),
        ("bottleneck_stride", {"bottleneck_stride": "5x5"}),
        ("channels", {"channels": (8, 16)}),
        ("channels", {"channels": (8, 16, 0, 8)}),
        ("stem_kernel", {"stem_kernel": 4}),
        ("gate", {"gate": "softmax"}),
        ("reduction", {"reduction": 0}),
    ],
)
def test_bad_options(argument, options):
    with pytest.raises(ValueError, match=argument):
        resnet18(device="meta", **options)
