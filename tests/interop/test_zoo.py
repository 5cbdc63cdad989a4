# SPDX-License-Identifier: BSD-3-Clause
"""The zoo itself: shapes and names as released, values against the formulas in NumPy."""

import families
import numpy as np
import oracle
import pytest
import torch
import twins
import zoo


def arrays(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def hard_sigmoid_2(s):
    return np.clip(s + 3, 0, 6) / 3


def normalised(z, weights, name, training):
    """BatchNorm over every axis but the second."""
    axes = tuple(axis for axis in range(z.ndim) if axis != 1)
    mean = z.mean(axes) if training else weights[f"{name}.running_mean"]
    variance = z.var(axes) if training else weights[f"{name}.running_var"]
    around = (None, slice(None), *[None] * (z.ndim - 2))
    scale = weights[f"{name}.weight"] / np.sqrt(variance + 1e-5)
    return (z - mean[around]) * scale[around] + weights[f"{name}.bias"][around]


def pooled(x, bins):
    """Means over bins × bins cells that start at ⌊i·H/bins⌋ and end before ⌈(i + 1)·H/bins⌉."""
    n, c, h, w = x.shape
    cells = np.zeros((n, c, bins, bins))
    for i in range(bins):
        for j in range(bins):
            rows = slice(i * h // bins, -(-(i + 1) * h // bins))
            columns = slice(j * w // bins, -(-(j + 1) * w // bins))
            cells[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return cells.reshape(n, -1)


def released(weights, x, *, q="q", p="p", conv="conv", bins=1, stride=1, padding=0, training=False):
    """y = P(bn2(Φ z1) + z1) + λ⊙conv(x), sample by sample and pixel by pixel."""
    y = (x if x.ndim == 2 else pooled(x, bins)) @ weights["fc.0.weight"].T
    y = y * hard_sigmoid_2(y @ weights["fc.1.fc.0.weight"].T)
    lam = hard_sigmoid_2(y @ weights["fc_scale.weight"].T)
    matrix_q, matrix_p = (weights[f"{n}.weight"].reshape(len(weights[f"{n}.weight"]), -1) for n in (q, p))
    latent = len(matrix_q)
    phi = (y @ weights["fc_phi.weight"].T).reshape(len(x), latent, latent)
    if x.ndim == 2:
        static = x @ weights[f"{conv}.weight"].T + weights[f"{conv}.bias"]
        sampled = x
    else:
        static = oracle.conv(x, weights[f"{conv}.weight"], stride=stride, padding=padding)
        sampled = x[:, :, ::stride, ::stride]
    z1 = normalised(np.einsum("lc,nc...->nl...", matrix_q, sampled), weights, "bn1", training)
    z = normalised(np.einsum("nij,nj...->ni...", phi, z1), weights, "bn2", training) + z1
    return np.einsum("ol,nl...->no...", matrix_p, z) + np.einsum("no,no...->no...", lam, static)


AGAINST_NUMPY = {
    "conv_dy 3×3": {"padding": 1},
    "conv_dy stride 2": {"stride": 2, "padding": 1},
    "conv_dy squeeze of 0": {"padding": 1},
    "conv_basic_dy": {"padding": 1, "bins": 2},
    "conv_basic_dy stride 2": {"padding": 1, "stride": 2, "bins": 2},
    "DYModule expand": {"q": "conv_q", "p": "conv_p", "bins": 2},
    "DYModule project": {"q": "conv_q", "p": "conv_p"},
    "DYCls": {"q": "cls_q", "p": "cls_p", "conv": "cls"},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", AGAINST_NUMPY)
def test_released_modules_are_the_formulas(name, training):
    module = families.make(name).train(training)
    (x,) = families.inputs(name)
    right = released(arrays(module), x.numpy(), training=training, **AGAINST_NUMPY[name])
    np.testing.assert_allclose(module(x).detach().numpy(), right, rtol=1e-11, atol=1e-11)


def test_names_of_the_released_modules():
    def layers(module):
        return {name.rsplit(".", 1)[0] for name, _ in module.named_parameters()}

    names = {"conv", "q", "p", "bn1", "bn2", "fc.0", "fc.1.fc.0", "fc_phi", "fc_scale"}
    assert layers(zoo.ConvDY(16, 8)) == layers(zoo.ConvBasicDY(8, 8)) == names
    assert layers(zoo.DYModule(16, 8)) == names - {"q", "p"} | {"conv_q", "conv_p"}
    assert layers(zoo.DYCls(16, 8)) == names - {"q", "p", "conv"} | {"cls", "cls_q", "cls_p"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("module", "latent", "squeeze"),
    [
        (lambda: zoo.ConvDY(64, 64), 8, 4),
        (lambda: zoo.ConvDY(10, 64), 3, 0),
        (lambda: zoo.ConvBasicDY(64, 128), 16, 16),
        (lambda: zoo.ConvBasicDY(4, 4), 4, 4),
        (lambda: zoo.DYModule(16, 96, 16), 8, 4),
        (lambda: zoo.DYModule(96, 24, 16), 12, 9),
        (lambda: zoo.DYModule(960, 320, 16), 40, 100),
        (lambda: zoo.DYCls(512, 1000), 32, 32),
    ],
)
def test_sizes_of_the_released_modules(module, latent, squeeze):
    made = module()
    assert (made.dim, made.fc[0].out_features) == (latent, squeeze)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_everything_runs_and_depends_on_everything(name, training):
    """Finite, and no parameter without an effect: one that has none could be dropped unseen."""
    module = families.make(name).train(training)
    results = twins.run(module, families.inputs(name))
    assert all(bool(t.isfinite().all()) for t in results.values())
    for parameter, tensor in module.named_parameters():
        gradient = results[f"{parameter}.grad"]
        assert gradient.shape == tensor.shape
        if _feeds_a_batch_norm(parameter, module, training) or tensor.numel() == 0 or "squeeze of 0" in name:
            continue
        assert gradient.abs().max() > 1e-6, f"{parameter} has no effect"


def _feeds_a_batch_norm(parameter, module, training):
    """A shift ahead of BatchNorm in training has no effect: its gradient is zero."""
    norm = next((m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)), None)
    batch_statistics = norm is not None and (training or not norm.track_running_stats)
    return batch_statistics and parameter in {"q.bias", "b.bias", "down.bias"}


def test_randomise_repeats_itself():
    first, second = (arrays(families.make("DYModule odd")) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["bn1.running_var"], np.ones_like(first["bn1.running_var"]))
