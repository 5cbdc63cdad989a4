# SPDX-License-Identifier: BSD-3-Clause
"""Every form of the layers against per-sample kernels written out densely; what a module has to survive."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

from dcd_kernels import reference
from dcd_kernels.nn import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear

# name -> class, positional and keyword arguments, spatial size of the input
FORMS = {
    "pointwise": (DCDConv2d, (9, 14, 1), {}, (6, 5)),
    "pointwise strided": (DCDConv2d, (9, 14, 1), {"stride": 2}, (6, 5)),
    "pointwise padded": (DCDConv2d, (9, 14, 1), {"padding": (0, 2), "stride": (1, 2)}, (6, 5)),
    "no lambda": (DCDConv2d, (9, 14, 1), {"channel_attention": False}, (6, 5)),
    "no phi": (DCDConv2d, (9, 14, 1), {"channel_fusion": False}, (6, 5)),
    "blocks": (DCDConv2d, (12, 6, 1), {"blocks": 3, "latent_channels": 5}, (6, 5)),
    "3x3": (DCDConv2d, (9, 14, 3), {"padding": 1}, (6, 5)),
    "3x3 strided, dilated": (DCDConv2d, (9, 14, 3), {"stride": 2, "padding": 1, "dilation": 2}, (9, 8)),
    "(3, 1) same": (DCDConv2d, (9, 14, (3, 1)), {"padding": "same", "dilation": (2, 1)}, (6, 5)),
    "3x3 blocks": (DCDConv2d, (8, 12, 3), {"blocks": 2, "padding": 1}, (6, 5)),
    "grouped": (
        DCDConv2d,
        (8, 12, 3),
        {"groups": 2, "blocks": 4, "padding": 1, "latent_channels": 3},
        (6, 5),
    ),
    "grouped, even, no phi": (DCDConv2d, (8, 12, 2), {"groups": 2, "channel_fusion": False}, (6, 5)),
    "depthwise": (DCDConv2d, (6, 6, 3), {"groups": 6, "padding": 1}, (6, 5)),
    "depthwise multiplier": (DCDConv2d, (4, 12, 5), {"groups": 4, "stride": 2, "padding": 2}, (7, 8)),
    "depthwise even": (DCDConv2d, (4, 4, (2, 4)), {"groups": 4, "latent_kernel": 3}, (6, 5)),
    "joint": (DCDConv2d, (9, 14, 3), {"joint": True, "padding": 1, "latent_channels": 3}, (6, 5)),
    "joint even same": (DCDConv2d, (9, 14, (2, 4)), {"joint": True, "padding": "same"}, (6, 5)),
    "reflect": (DCDConv2d, (9, 14, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (6, 5)),
    "circular same": (DCDConv2d, (9, 14, 3), {"padding": "same", "padding_mode": "circular"}, (6, 5)),
    "circular same even": (
        DCDConv2d,
        (9, 14, (4, 2)),
        {"padding": "same", "padding_mode": "circular", "joint": True},
        (6, 5),
    ),
    "replicate depthwise": (
        DCDConv2d,
        (6, 6, 3),
        {"groups": 6, "padding": 1, "padding_mode": "replicate", "stride": 2},
        (6, 5),
    ),
    "released branch": (DCDConv2d, (9, 14, 1), {"pool_size": 2, "gate": "se", "branch_bias": True}, (7, 5)),
    "1-D": (DCDConv1d, (9, 14, 3), {"padding": 1, "stride": 2}, (11,)),
    "1-D pointwise": (DCDConv1d, (9, 14, 1), {"pool_size": 3}, (11,)),
    "1-D depthwise": (DCDConv1d, (6, 6, 5), {"groups": 6, "padding": "same"}, (11,)),
    "3-D": (DCDConv3d, (5, 6, 3), {"padding": 1, "pool_size": (2, 1, 2)}, (4, 3, 5)),
    "3-D pointwise": (DCDConv3d, (5, 6, 1), {}, (4, 3, 5)),
    "3-D depthwise": (DCDConv3d, (4, 4, 3), {"groups": 4, "padding": 1}, (4, 3, 5)),
    "one pixel": (DCDConv2d, (9, 14, 1), {}, (1, 1)),
}
F_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ACTIVATE = {
    None: lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@pytest.fixture
def compiler():
    """torch.compile, without what earlier tests have used of its limit on versions of one function."""
    torch._dynamo.reset()
    return lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")


def make(form, batch=3, dtype=torch.float64, **options):
    """A layer of ``form`` whose coefficients are far from λ = 1 and Φ = 0, and an input for it."""
    cls, arguments, keywords, size = FORMS[form]
    torch.manual_seed(list(FORMS).index(form))
    layer = cls(*arguments, **keywords, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.branch.parameters():
            parameter.normal_()
    return layer, torch.randn(batch, arguments[0], *size, dtype=dtype)


def dense_kernel(layer, lam, phi):
    """W_n of one sample as (Co, Ci, *k), zeros between the groups, straight from the equations."""
    size = layer.kernel_size
    co, ci, groups = layer.out_channels, layer.in_channels, layer.groups
    kernel = torch.zeros(co, ci, *size, dtype=layer.weight.dtype)
    for o in range(co):
        first = o // (co // groups) * (ci // groups)
        scale = 1 if lam is None else lam[o]
        kernel[o, first : first + ci // groups] = scale * layer.weight[o]
    flat = kernel.flatten(2)
    if phi is None:
        return kernel
    if layer.joint:
        flat += torch.einsum("oa,cab,ib,tc->oit", layer.p, phi, layer.q, layer.r)
    elif layer.r is not None:
        taps = layer.p @ phi @ layer.r.T
        for o in range(co):
            flat[o, o // (co // ci)] += taps[o]
    else:
        middle = flat.shape[2] // 2  # of an odd kernel, row-major
        for b, block in enumerate(phi if phi.dim() == 3 else phi[None]):
            o = slice(b * co // layer.blocks, (b + 1) * co // layer.blocks)
            i = slice(b * ci // layer.blocks, (b + 1) * ci // layer.blocks)
            flat[o, i, middle] += layer.p[o] @ block @ layer.q[i].T
    return kernel


def materialised(layer, x, lam, phi):
    """One dense convolution a sample, on an input padded beforehand; bias added, no activation."""
    margins = []
    for axis in reversed(range(layer.spatial)):
        total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if layer.padding == "same":
            margins += [total // 2, total - total // 2]
        else:
            margins += [layer.padding[axis]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, margins, mode=mode)
    samples = []
    for n in range(len(x)):
        kernel = dense_kernel(layer, None if lam is None else lam[n], None if phi is None else phi[n])
        samples.append(
            F_CONV[layer.spatial](
                x[n : n + 1], kernel, layer.bias, stride=layer.stride, dilation=layer.dilation
            )
        )
    return torch.cat(samples)


@pytest.mark.parametrize("form", FORMS)
def test_against_materialised_kernels(form):
    layer, x = make(form)
    with torch.no_grad():
        lam, phi = layer.coefficients(x)
        wanted = materialised(layer, x, lam, phi)
        static = materialised(layer, x, None, None)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
        assert (wanted - static).norm() > 0.05 * static.norm(), (
            "λ and Φ made no difference: nothing was tested"
        )


@pytest.mark.parametrize("form", [form for form in FORMS if "padding_mode" not in FORMS[form][2]])
def test_against_the_reference_operator(form):
    layer, x = make(form)
    lam, phi = layer.coefficients(x)
    operator = {1: reference.dcd_conv1d, 2: reference.dcd_conv2d, 3: reference.dcd_conv3d}[layer.spatial]
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    wanted = operator(x, layer.weight, layer.p, phi, layer.q, r=layer.r, lam=lam, bias=layer.bias, **geometry)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("form", ["pointwise", "3x3", "depthwise", "joint"])
def test_residual_and_activation(form, activation):
    layer, x = make(form, activation=activation)
    plain = materialised(layer, x, *layer.coefficients(x))
    residual = 3 * torch.randn_like(plain)
    torch.testing.assert_close(layer(x), ACTIVATE[activation](plain), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        layer(x, residual), ACTIVATE[activation](plain + residual), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("form", ["pointwise", "3x3", "depthwise", "1-D"])
def test_coefficients_of_another_tensor(form):
    layer, x = make(form, condition_channels=5)
    condition = torch.randn(3, 5, 2, 2, 2, dtype=x.dtype)
    wanted = materialised(layer, x, *layer.branch(condition.mean((2, 3, 4))))
    torch.testing.assert_close(layer(x, condition=condition), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="input of the branch"):
        layer(x)


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_independent(form):
    layer, x = make(form)
    together = layer(x)
    for n in range(len(x)):
        torch.testing.assert_close(layer(x[n : n + 1])[0], together[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (3, 4, 9), (2, 3, 2, 9), (2, 1, 9)])
@pytest.mark.parametrize(
    "options", [{}, {"blocks": 3}, {"channel_attention": False}, {"channel_fusion": False}]
)
def test_linear(shape, options):
    torch.manual_seed(0)
    layer = DCDLinear(9, 12, dtype=torch.float64, activation="hardswish", **options)
    with torch.no_grad():
        for parameter in layer.branch.parameters():
            parameter.normal_()
    x, residual = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 12, dtype=torch.float64)
    lam, phi = layer.branch(x.reshape(shape[0], -1, 9).mean(1))
    samples = []
    for n in range(shape[0]):
        weight = layer.weight if lam is None else lam[n][:, None] * layer.weight
        if phi is not None:
            middle = phi[n] if options.get("blocks") is None else None
            if middle is not None:
                weight = weight + layer.p @ middle @ layer.q.T
            else:
                blocks = [
                    layer.p[4 * b : 4 * b + 4] @ phi[n, b] @ layer.q[3 * b : 3 * b + 3].T for b in range(3)
                ]
                weight = weight + torch.block_diag(*blocks)
        samples.append(F.hardswish(F.linear(x[n], weight, layer.bias) + residual[n]))
    torch.testing.assert_close(layer(x, residual), torch.stack(samples), rtol=1e-10, atol=1e-10)
    condition = torch.randn_like(x)
    assert torch.equal(layer(x, condition=x), layer(x))
    assert not torch.allclose(layer(x, condition=condition), layer(x))


@pytest.mark.parametrize("shape", [(5, 9), (3, 4, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_compiled_and_in_half(shape, dtype, compiler):
    torch.manual_seed(0)
    layer = DCDLinear(9, 12, activation="silu", gate="se")
    with torch.no_grad():
        for parameter in layer.branch.parameters():
            parameter.normal_()
    x = torch.randn(shape)
    wanted = layer(x)
    torch.testing.assert_close(compiler(layer)(x), wanted)
    with torch.autocast("cpu", dtype):
        under_autocast = layer(x)
    for y in (under_autocast, copy.deepcopy(layer).to(dtype)(x.to(dtype))):
        assert y.dtype == dtype
        assert (y - wanted).abs().max() < 16 * torch.finfo(dtype).eps * wanted.abs().max()
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), wanted)


def fresh(form, **options):
    cls, arguments, keywords, size = FORMS[form]
    torch.manual_seed(list(FORMS).index(form))
    return cls(*arguments, **keywords, **options), torch.randn(4, arguments[0], *size)


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_layer_is_near_static_and_learns_everything_at_once(form):
    layer, x = fresh(form)
    y = layer(x)
    static = materialised(layer, x, None, None)
    deviation = (y - static).norm() / static.norm()
    assert 0 < deviation < 0.3
    (y - torch.randn_like(y)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_fresh_layer_is_near_static_at_real_widths():
    torch.manual_seed(0)
    for in_channels, out_channels, kernel, options in (
        (960, 160, 1, {"latent_channels": "released"}),
        (96, 576, 1, {"latent_channels": "released"}),
        (256, 256, 3, {}),
        (256, 256, 3, {"joint": True}),
        (960, 960, 5, {"groups": 960}),
    ):
        # Φ alone: λ differs from 1 by as much at any width
        layer = DCDConv2d(
            in_channels, out_channels, kernel, padding=kernel // 2, channel_attention=False, **options
        )
        x = F.relu6(torch.randn(4, in_channels, 7, 7))
        padding, groups = layer.padding, layer.groups
        static = F.conv2d(x, layer.weight, layer.bias, padding=padding, groups=groups)
        assert 0.01 < (layer(x) - static).norm() / static.norm() < 0.15


@pytest.mark.parametrize(
    "form", ["pointwise", "blocks", "3x3", "depthwise", "joint", "1-D", "3-D", "reflect"]
)
def test_training_lowers_the_loss(form):
    """The target is a static convolution scaled per sample, by a number that only the branch can find."""
    layer, x = fresh(form)
    x = torch.randn(16, *x.shape[1:]) + torch.linspace(-1, 1, 16).view(-1, *[1] * (x.dim() - 1))
    target = materialised(layer, x, None, None).detach()
    target *= 1 + 0.8 * torch.tanh(3 * x.flatten(1).mean(1)).view(-1, *[1] * (x.dim() - 1))

    def train(model):
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(60):
            loss = F.mse_loss(model(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    static = copy.deepcopy(layer)
    static.branch.reset_to_static()
    static.branch.requires_grad_(False)
    dynamic_losses, static_losses = train(layer), train(static)
    assert dynamic_losses[-1] < 0.3 * dynamic_losses[0]
    assert dynamic_losses[-1] < 0.7 * static_losses[-1]


@pytest.mark.parametrize(
    "form", ["pointwise", "blocks", "3x3", "grouped", "depthwise", "joint", "1-D", "3-D"]
)
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_compiles_without_a_break(form, activation, compiler):
    layer, x = make(form, dtype=torch.float32, activation=activation)
    torch.testing.assert_close(compiler(layer)(x), layer(x))


@pytest.mark.parametrize("form", ["pointwise", "released branch", "3x3", "depthwise", "joint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_and_autocast(form, dtype, compiler):
    layer, x = make(form, dtype=torch.float32)
    wanted = layer(x)
    scale = wanted.abs().max().item()
    with torch.autocast("cpu", dtype):
        under_autocast = layer(x)
        again = layer(x.to(dtype))
    assert under_autocast.dtype == again.dtype == dtype
    as_half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert as_half.dtype == dtype
    for y in (under_autocast, again, as_half):
        assert (y - wanted).abs().max() < 16 * torch.finfo(dtype).eps * scale
    with torch.autocast("cpu", dtype):
        compiled = compiler(layer)(x)
    assert compiled.dtype == dtype
    assert (compiled - wanted).abs().max() < 16 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("form", ["pointwise", "released branch", "3x3", "depthwise", "joint", "reflect"])
def test_channels_last(form):
    layer, x = make(form)
    wanted = layer(x)
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    if form != "reflect":  # torch's reflection padding writes contiguous output
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_copy_and_pickle(form):
    layer, x = make(form, dtype=torch.float32)
    wanted = layer(x)
    cls, arguments, keywords, _ = FORMS[form]
    other = cls(*arguments, **keywords)
    assert not torch.equal(other(x), wanted)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), wanted)
        assert repr(twin) == repr(layer)


def test_functional_call():
    layer, x = make("pointwise")
    other, _ = make("pointwise padded")
    got = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert not torch.allclose(got, layer(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(got, layer(x))


def test_without_memory():
    layer = DCDConv2d(64, 128, 3, padding=1, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(2, 64, 8, 7, device="meta")).shape == (2, 128, 8, 7)
    with torch._subclasses.FakeTensorMode():
        layer = DCDConv2d(64, 128, 3, padding=1, pool_size=2, dtype=torch.bfloat16)
        y = layer(torch.empty(2, 64, 7, 8, dtype=torch.bfloat16))
    assert y.shape == (2, 128, 7, 8) and y.dtype == torch.bfloat16


def test_sizes_and_repr():
    layer = DCDConv2d(64, 256, 1, latent_channels="released", blocks=2, bias=False, activation="relu")
    assert layer.latent_channels == 16 and layer.p.shape == (256, 16) and layer.q.shape == (64, 16)
    assert layer.branch.phi_shape == (2, 16, 16) and layer.branch.squeeze.weight.shape == (16, 64)
    text = repr(layer)
    for part in ("64, 256", "bias=False", "latent_channels=16", "blocks=2", "activation='relu'"):
        assert part in text
    joint = DCDConv2d(64, 64, 3, joint=True)
    assert joint.r.shape == (9, 4) and joint.branch.phi_shape == (4, 2, 2)
    depthwise = DCDConv2d(64, 128, 5, groups=64)
    assert depthwise.p.shape == (128, 12) and depthwise.q is None and depthwise.latent_channels is None
    # the complexity of Section 3.4: C² + 2CL + (2C + L²)C/r, with 2 C for squeeze and Λ
    layer = DCDConv2d(256, 256, 1, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 256**2 + 2 * 256 * 8 + (2 * 256 + 64) * 256 // 16


BAD = [
    ("in_channels", (0, 8, 1), {}),
    ("out_channels", (8, -1, 1), {}),
    ("kernel_size", (8, 8, 0), {}),
    ("kernel_size", (8, 8, (3, 3, 3)), {}),
    ("kernel_size must be odd", (8, 8, 2), {}),
    ("stride", (8, 8, 1), {"stride": 0}),
    ("dilation", (8, 8, 1), {"dilation": 0}),
    ("padding", (8, 8, 1), {"padding": -1}),
    ("padding", (8, 8, 1), {"padding": "full"}),
    ("padding='same' needs stride 1", (8, 8, 3), {"padding": "same", "stride": 2}),
    ("padding_mode", (8, 8, 1), {"padding_mode": "wrap"}),
    ("groups", (8, 8, 1), {"groups": 3}),
    ("groups", (8, 8, 1), {"groups": 0}),
    ("blocks must divide", (8, 8, 1), {"blocks": 3}),
    ("blocks must be a multiple of groups.*dcd_apply", (8, 8, 1), {"groups": 4, "blocks": 2}),
    ("blocks must be 1 for a depthwise", (8, 8, 3), {"groups": 8, "blocks": 8}),
    ("blocks", (8, 8, 1), {"blocks": 2, "channel_fusion": False}),
    ("joint", (8, 8, 3), {"joint": True, "groups": 2}),
    ("joint", (8, 8, 3), {"joint": True, "blocks": 2}),
    ("joint", (8, 8, 3), {"joint": True, "channel_fusion": False}),
    ("joint needs a kernel", (8, 8, 1), {"joint": True}),
    ("latent_kernel", (8, 8, 3), {"latent_kernel": 4}),
    ("latent_kernel", (8, 8, 3), {"joint": True, "latent_kernel": 0}),
    ("latent_channels", (8, 8, 1), {"latent_channels": 0}),
    ("latent_channels", (8, 8, 1), {"latent_channels": "half"}),
    ("latent_channels", (8, 8, 3), {"groups": 8, "latent_channels": 4}),
    (
        "channel_attention and channel_fusion",
        (8, 8, 1),
        {"channel_attention": False, "channel_fusion": False},
    ),
    ("reduction", (8, 8, 1), {"reduction": 0}),
    ("squeeze_channels", (8, 8, 1), {"squeeze_channels": 0}),
    ("pool_size", (8, 8, 1), {"pool_size": (2, 2, 2)}),
    ("pool_size", (8, 8, 1), {"pool_size": 0}),
    ("gate", (8, 8, 1), {"gate": "softmax"}),
    ("lam_activation", (8, 8, 1), {"lam_activation": "relu"}),
    ("dropout", (8, 8, 1), {"branch_dropout": 1.5}),
    ("condition_channels", (8, 8, 1), {"condition_channels": 0}),
    ("activation", (8, 8, 1), {"activation": "gelu"}),
]


@pytest.mark.parametrize(("message", "arguments", "options"), BAD)
def test_bad_arguments(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        DCDConv2d(*arguments, **options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("blocks must divide in_features and out_features", {"blocks": 5}),
        ("blocks", {"blocks": 2, "channel_fusion": False}),
        ("activation", {"activation": "tanh"}),
        ("channel_attention and channel_fusion", {"channel_attention": False, "channel_fusion": False}),
    ],
)
def test_bad_linear_arguments(message, options):
    with pytest.raises(ValueError, match=message):
        DCDLinear(8, 8, **options)


@pytest.mark.parametrize("shape", [(8, 4, 4), (2, 7, 4, 4), (2, 8, 4), (8,), (2, 8, 4, 4, 4)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"DCDConv2d: input must have shape \(N, 8, H, W\), got"):
        DCDConv2d(8, 8, 1)(torch.randn(shape))
    if shape[-1] != 8 or len(shape) == 1:
        with pytest.raises(ValueError, match=r"DCDLinear: input must have shape \(N, ..., 8\), got"):
            DCDLinear(8, 8)(torch.randn(shape))


def test_empty_batch_and_nan():
    for form, batch in itertools.product(("pointwise", "3x3", "depthwise", "joint"), (0, 2)):
        layer, x = make(form, batch=batch)
        if batch:
            x[0, 0, 0, 0] = float("nan")
        y = layer(x)
        assert y.shape[0] == batch
        if batch:
            assert torch.isnan(y[0]).all() and torch.isfinite(y[1]).all()
