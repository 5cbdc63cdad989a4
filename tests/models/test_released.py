# SPDX-License-Identifier: BSD-3-Clause
"""The released form: sizes, keys, values against the formulas written out, checkpoints."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcd_kernels import models
from dcd_kernels.models import complexity, released
from dcd_kernels.models.released import BasicConv, BottleneckConv, Classifier, PointwiseConv, ReleasedLayer

# parameters and multiply-adds at 224 × 224 with 1000 classes, dynamic and of the static twin
SIZES = {
    "mobilenet ×1.0": (5_720_028, 398_388_084, 3_504_872, 300_774_272),
    "mobilenet ×0.5": (3_056_616, 132_226_992, 1_968_680, 97_131_840),
    "mobilenet ×0.35": (2_267_932, 79_560_936, 1_677_128, 59_285_808),
    "resnet18": (14_703_332, 1_883_045_531, 11_689_512, 1_814_073_344),
    "resnet50": (29_835_056, 4_372_631_098, 25_557_032, 4_089_184_256),
}


def make(name, **options):
    if name.startswith("mobilenet"):
        return released.mobilenet_v2(float(name.split("×")[1]), **options)
    return getattr(released, name)(**options)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model):
    """As torch counts the calls of a forward pass: convolutions, linear layers and Φ z1."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("name", SIZES)
def test_exact_sizes(name):
    for dynamic, (wanted, madds) in ((True, SIZES[name][:2]), (False, SIZES[name][2:])):
        model = make(name, dynamic=dynamic, device="meta")
        assert parameters(model) == wanted
        assert multiply_adds(model) == madds
        assert complexity(model).factored == complexity(model).executed == madds


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("mobilenet ×0.5", lambda: models.mobilenet_v2(0.5, squeeze="pooled", device="meta")),
        ("resnet18", lambda: models.resnet18(classifier="dcd", device="meta")),
        ("resnet50", lambda: models.resnet50(classifier="dcd", device="meta")),
    ],
)
def test_counts_are_the_paper_form_s_and_the_latent_norms(name, paper):
    ours, theirs = complexity(make(name, device="meta")), complexity(paper())
    for convention in ("static", "published", "factored"):
        assert getattr(ours, convention) == getattr(theirs, convention)
    model = make(name, device="meta")
    norms = sum(4 * layer.latent_channels for layer in model.modules() if isinstance(layer, ReleasedLayer))
    assert ours.parameters - theirs.parameters == norms > 0


def test_keys_of_mobilenet():
    state = released.mobilenet_v2(device="meta").state_dict()
    for key, shape in {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.0.1.num_batches_tracked": (),
        "features.1.conv.0.weight": (32, 1, 3, 3),
        "features.1.conv.3.weight": (16, 32, 1, 1),
        "features.1.conv.4.running_var": (16,),
        "features.2.conv.0.conv.weight": (96, 16, 1, 1),
        "features.2.conv.0.conv_q.weight": (8, 16, 1, 1),
        "features.2.conv.0.conv_p.weight": (96, 8, 1, 1),
        "features.2.conv.0.bn1.weight": (8,),
        "features.2.conv.0.bn2.running_mean": (8,),
        "features.2.conv.0.fc.0.weight": (4, 64),
        "features.2.conv.0.fc.1.fc.0.weight": (4, 4),
        "features.2.conv.0.fc_phi.weight": (64, 4),
        "features.2.conv.0.fc_scale.weight": (96, 4),
        "features.2.conv.1.weight": (96,),
        "features.2.conv.3.weight": (96, 1, 3, 3),
        "features.2.conv.6.conv.weight": (24, 96, 1, 1),
        "features.2.conv.6.conv_q.weight": (12, 96, 1, 1),
        "features.2.conv.6.fc.0.weight": (9, 96),
        "features.2.conv.7.bias": (24,),
        "features.17.conv.6.conv.weight": (320, 960, 1, 1),
        "features.17.conv.6.conv_q.weight": (40, 960, 1, 1),
        "features.17.conv.6.fc.1.fc.0.weight": (100, 100),
        "conv.0.weight": (1280, 320, 1, 1),
        "conv.1.running_mean": (1280,),
        "classifier.1.cls.weight": (1000, 1280),
        "classifier.1.cls.bias": (1000,),
        "classifier.1.cls_q.weight": (32, 1280),
        "classifier.1.cls_p.weight": (1000, 32),
        "classifier.1.fc.0.weight": (32, 1280),
        "classifier.1.fc_phi.weight": (1024, 32),
        "classifier.1.fc_scale.weight": (1000, 32),
    }.items():
        assert state[key].shape == shape, key
    # stem, static block, dynamic blocks (17 entries a layer, five a norm), last convolution, classifier
    assert len(state) == 6 + 12 + 16 * (2 * 17 + 1 + 3 * 5) + 6 + 18
    assert not any("classifier.0" in key for key in state)
    without = released.mobilenet_v2(dropout=None, device="meta").state_dict()
    assert "classifier.0.cls.weight" in without and not any("classifier.1" in key for key in without)


def test_keys_of_resnet():
    state = released.resnet50(device="meta").state_dict()
    for key, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.conv1.conv.weight": (64, 64, 1, 1),
        "layer1.0.conv1.q.weight": (8, 64, 1, 1),
        "layer1.0.conv2.conv.weight": (64, 64, 3, 3),
        "layer1.0.conv3.p.weight": (256, 8, 1, 1),
        "layer1.0.bn3.weight": (256,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.bias": (256,),
        "layer3.0.conv1.fc.0.weight": (32, 512),
        "layer3.0.conv1.fc.1.fc.0.weight": (32, 32),
        "layer3.0.conv1.fc_phi.weight": (484, 32),
        "layer3.0.conv1.fc_scale.weight": (256, 32),
        "layer4.2.conv1.q.weight": (45, 2048, 1, 1),
        "layer4.2.conv1.bn2.running_var": (45,),
        "classifier.1.cls.weight": (1000, 2048),
    }.items():
        assert state[key].shape == shape, key
    assert "layer1.1.downsample.0.weight" not in state and "fc.weight" not in state

    state = released.resnet18(10, device="meta").state_dict()
    for key, shape in {
        "layer1.0.conv1.q.weight": (16, 64, 1, 1),
        "layer1.0.conv1.fc.0.weight": (16, 256),
        "layer2.0.conv1.conv.weight": (128, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer4.1.conv2.fc.0.weight": (128, 2048),
        "layer4.1.conv2.fc_phi.weight": (45 * 45, 128),
        "classifier.0.cls.bias": (10,),
    }.items():
        assert state[key].shape == shape, key


def test_order_of_the_parts():
    """An optimizer's state in a checkpoint goes by the order of the parameters."""
    branch = ["fc.0", "fc.1.fc.0", "fc_phi", "fc_scale"]
    for layer, names in (
        (BasicConv(4, 4), ["conv", "q", "p", "bn1", "bn2", *branch]),
        (PointwiseConv(4, 4), ["conv", "conv_q", *branch, "conv_p", "bn1", "bn2"]),
        (Classifier(4, 4), ["cls", "cls_q", "cls_p", *branch, "bn1", "bn2"]),
    ):
        found = [name.removesuffix(".weight") for name, _ in layer.named_parameters() if "bias" not in name]
        assert found == names


@pytest.mark.parametrize("name", ["mobilenet ×0.35", "mobilenet ×1.4", "resnet10", "resnet34", "resnet50"])
def test_the_static_twin_has_plain_layers_in_the_same_places(name):
    dynamic, static = make(name, device="meta"), make(name, dynamic=False, device="meta")
    layers = {key: m for key, m in dynamic.named_modules() if isinstance(m, ReleasedLayer)}
    places = {"mobilenet": 32, "resnet10": 8, "resnet34": 32, "resnet50": 48}[name.split(" ")[0]] + 1
    assert len(layers) == places
    for key, layer in layers.items():
        twin = static.get_submodule(key)
        assert type(twin) is type(layer.static) and type(twin) in (nn.Conv2d, nn.Linear)
        assert repr(twin) == repr(layer.static)
    assert not any(isinstance(module, ReleasedLayer) for module in static.modules())
    inside = tuple(f"{key}." for key in layers)
    others = [key for key in dynamic.state_dict() if not key.startswith(inside)]
    assert others == [key for key in static.state_dict() if not key.startswith(inside)]


def test_widths():
    wide = released.mobilenet_v2(1.4, device="meta")
    assert wide.conv[0].weight.shape == (1792, 448, 1, 1)
    narrow = released.mobilenet_v2(0.1, device="meta")
    # multiples of 4, which no other width has
    assert narrow.features[0][0].out_channels == 4 and narrow.conv[0].weight.shape == (1280, 32, 1, 1)

    # 48 → 16 with L = 8 and 96 → 24 with L = 12: L² is the wider one in both
    for width, options, squeeze in ((0.5, {}, 64 // 8), (0.75, {}, 144 // 16), (0.75, {"fc_squeeze": 3}, 48)):
        model = released.mobilenet_v2(width, device="meta", **options)
        assert model.features[2].conv[6].squeeze_channels == squeeze


LAYERS = {
    "basic": (lambda: BasicConv(5, 7), (5, 6, 7)),
    "basic, stride 2": (lambda: BasicConv(6, 3, stride=2), (6, 7, 7)),
    "bottleneck 1×1": (lambda: BottleneckConv(32, 9, 1), (32, 5, 4)),
    "bottleneck 3×3, stride 2": (lambda: BottleneckConv(18, 9, 3, stride=2), (18, 6, 5)),
    "bottleneck 5×5, stride 3": (lambda: BottleneckConv(19, 5, 5, stride=3), (19, 7, 8)),
    "expanding": (lambda: PointwiseConv(6, 36, 8), (6, 7, 5)),
    "projecting": (lambda: PointwiseConv(48, 10, 8), (48, 3, 5)),
    "one pixel": (lambda: PointwiseConv(6, 36), (6, 1, 1)),
    "classifier": (lambda: Classifier(11, 6), (11,)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    build, shape = LAYERS[request.param]
    return scrambled(build().double()), torch.randn(3, *shape, dtype=torch.float64)


def scrambled(module):
    """λ and Φ far from their start, statistics and affine parameters of the norms too."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.3, 3)
            elif value.is_floating_point():
                value.normal_(std=0.6)
    return module


def written_out(layer, x):
    """The layer in NumPy from its state alone; ``layer`` gives kernel size, stride and mode."""
    state = {key: value.numpy() for key, value in layer.state_dict().items()}
    prefix = {"conv": "", "conv_q": "conv_", "cls_q": "cls_"}[
        next(key for key in ("cls_q", "conv_q", "conv") if f"{key}.weight" in state)
    ]
    static = "cls" if prefix == "cls_" else "conv"
    w0, q, p = (state[f"{name}.weight"] for name in (static, f"{prefix}q", f"{prefix}p"))
    x = x.numpy()
    if x.ndim == 2:
        x = x[:, :, None, None]
        w0, q, p = (matrix[:, :, None, None] for matrix in (w0, q, p))
        bins = 1
    else:
        bins = round((state["fc.0.weight"].shape[1] / x.shape[1]) ** 0.5)
    n, _, height, width = x.shape
    stride = 1 if static == "cls" else layer.conv.stride[0]

    def norm(name, z):
        axes = (0, *range(2, z.ndim))
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if layer.training:
            mean, variance = z.mean(axes), z.var(axes)
        scale = state[f"{name}.weight"] / np.sqrt(variance + 1e-5)
        shift = state[f"{name}.bias"] - scale * mean
        across = (None, slice(None), *[None] * (z.ndim - 2))
        return z * scale[across] + shift[across]

    def clipped(z):
        return np.clip(z + 3, 0, 6) / 3

    rows = [slice(i * height // bins, -(-(i + 1) * height // bins)) for i in range(bins)]
    columns = [slice(i * width // bins, -(-(i + 1) * width // bins)) for i in range(bins)]
    pooled = np.stack([x[:, :, a, b].mean((2, 3)) for a in rows for b in columns], 2).reshape(n, -1)
    squeezed = pooled @ state["fc.0.weight"].T
    squeezed = squeezed * clipped(squeezed @ state["fc.1.fc.0.weight"].T)
    lam = clipped(squeezed @ state["fc_scale.weight"].T)
    latents = q.shape[0]
    phi = (squeezed @ state["fc_phi.weight"].T).reshape(n, latents, latents)

    k = w0.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    pixels = [(a, b) for a in range(0, height, stride) for b in range(0, width, stride)]
    patches = np.stack([padded[:, :, a : a + k, b : b + k] for a, b in pixels], -1)
    y = np.einsum("oikl,niklh->noh", w0, patches)
    if static == "cls":
        y = y + state["cls.bias"][:, None]
    sampled = x[:, :, ::stride, ::stride].reshape(n, x.shape[1], -1)
    z1 = norm("bn1", np.einsum("li,nih->nlh", q[:, :, 0, 0], sampled))
    z = norm("bn2", np.einsum("nab,nbh->nah", phi, z1)) + z1
    y = lam[:, :, None] * y + np.einsum("ol,nlh->noh", p[:, :, 0, 0], z)
    shape = (-(-height // stride), -(-width // stride))
    return torch.from_numpy(y[:, :, 0] if static == "cls" else y.reshape(n, -1, *shape))


@pytest.mark.parametrize("training", [False, True])
def test_layers_are_the_formulas(layer_and_input, training):
    layer, x = layer_and_input
    layer.train(training)
    if training and x.shape[2:] == (1, 1) and isinstance(layer, PointwiseConv):
        x = torch.cat([x, torch.randn_like(x)])  # more values a channel than three
    wanted = written_out(layer, x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
    assert layer.bn1.num_batches_tracked == layer.bn2.num_batches_tracked == int(training)


def test_layers_are_straight_to_trace(layer_and_input):
    """By torch.fx, which sees every product as a module's or as Φ z1; another batch than the traced one."""
    layer, x = layer_and_input
    traced = torch.fx.symbolic_trace(layer.eval())
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {name for name in called if name != "pool"} == {
        name
        for name, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    torch.testing.assert_close(traced(x[:2]), layer(x[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("layer_and_input", [name for name in LAYERS if name != "classifier"], indirect=True)
def test_layers_on_channels_last(layer_and_input):
    layer, x = layer_and_input
    x = torch.cat([x, torch.randn_like(x)])
    gradients = []
    for format in (torch.contiguous_format, torch.channels_last):
        input = x.clone(memory_format=format).requires_grad_()
        copied = copy.deepcopy(layer).to(memory_format=format)
        output = copied(input)
        assert output.is_contiguous(memory_format=format)
        output.square().sum().backward()
        gradients.append([output, input.grad, *(parameter.grad for parameter in copied.parameters())])
    for plain, last in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, last, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("training", [False, True])
def test_a_squeeze_of_nothing(training):
    """Below 16 channels: Φ = 0 and λ = 1, and the latent residual stays."""
    layer = scrambled(BottleneckConv(15, 4, 3).double()).train(training)
    assert layer.squeeze_channels == 0 and layer.latent_channels == 3
    x = torch.randn(2, 15, 6, 5, dtype=torch.float64)
    output = layer(x)
    z1 = copy.deepcopy(layer).bn1(layer.q(x))
    constant = layer.bn2.bias
    if not training:
        norm = layer.bn2
        constant = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(output, layer.conv(x) + layer.p(z1 + constant[:, None, None]))
    output.sum().backward()
    assert layer.fc_phi.weight.grad.shape == (9, 0) and layer.q.weight.grad.abs().max() > 0
    torch.fx.symbolic_trace(layer)


@pytest.mark.parametrize("name", ["mobilenet ×0.35", "resnet10", "resnet50"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_networks_run_and_every_parameter_has_a_gradient(name, dynamic):
    model = make(name, num_classes=7, dynamic=dynamic)
    output = model(torch.randn(4, 3, 64, 64))
    assert output.shape == (4, 7)
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["mobilenet ×0.35", "resnet18", "resnet50"])
def test_untrained_networks_see_their_input(name):
    model = make(name).eval()
    with torch.no_grad():
        logits = model(torch.randn(3, 3, 64, 64))
        one = torch.randn(1, 3, 64, 64)
        alone = model(one)
        assert logits.isfinite().all() and logits.std(0).mean() > 0.02 * logits.std()
        torch.testing.assert_close(model(torch.cat([one, one]))[:1], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet ×0.35", "resnet10", "resnet50"])
def test_networks_on_channels_last(name):
    model = scrambled_statistics(make(name, num_classes=5, dtype=torch.float64).eval())
    x = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    wanted = model(x)
    assert wanted.abs().max() > 0
    model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def scrambled_statistics(model):
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif key.endswith("running_mean"):
            value.normal_(std=0.1)
    return model


def test_one_sample_in_training_is_torch_s_own_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        released.resnet10(5)(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: released.mobilenet_v2(0), "mobilenet_v2: width_mult must be positive, got 0"),
        (lambda: released.mobilenet_v2(num_classes=0), "mobilenet_v2: num_classes must be at least 1, got 0"),
        (lambda: released.mobilenet_v2(fc_squeeze=0), "mobilenet_v2: fc_squeeze must be at least 1, got 0"),
        (lambda: released.resnet34(0), "resnet: num_classes must be at least 1, got 0"),
        (lambda: released.resnet10(in_channels=0), "resnet: in_channels must be at least 1, got 0"),
        (lambda: BasicConv(3, 3, 0), "BasicConv: stride must be at least 1, got 0"),
        (lambda: BasicConv(0, 3), "BasicConv: in_channels must be at least 1, got 0"),
        (lambda: BottleneckConv(3, -1, 1), "BottleneckConv: out_channels must be at least 1, got -1"),
        (lambda: BottleneckConv(3, 3, 2), "BottleneckConv: kernel_size must be odd and positive, got 2"),
        (lambda: PointwiseConv(3, 3, 0), "PointwiseConv: fc_squeeze must be at least 1, got 0"),
        (lambda: Classifier(0, 3), "Classifier: in_features must be at least 1, got 0"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_options_reach_every_part():
    for model in (
        released.mobilenet_v2(0.35, 3, in_channels=1, dtype=torch.float64),
        released.resnet50(3, in_channels=1, dtype=torch.float64),
    ):
        floating = [value for value in model.state_dict().values() if value.is_floating_point()]
        assert {value.dtype for value in floating} == {torch.float64}
        assert model.eval()(torch.randn(1, 1, 40, 33, dtype=torch.float64)).shape == (1, 3)
