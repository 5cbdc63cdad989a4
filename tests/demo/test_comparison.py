# SPDX-License-Identifier: BSD-3-Clause
"""The demo's six ways of computing one network."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

pytest.importorskip("rich", reason="the demo needs the packages of the extra 'demo'")
pytest.importorskip("matplotlib", reason="the demo needs the packages of the extra 'demo'")

import dcd_kernels.demo as demo
from dcd_kernels.backends.selection import use_backend
from dcd_kernels.demo import comparison, formulations, measure, memory, photographs
from dcd_kernels.nn import DCDConv2d, DCDLinear

PLAIN = list(comparison.PLAIN.values())


def layer_and_input(linear: bool):
    torch.manual_seed(1)
    if linear:
        layer, x = DCDLinear(20, 7, latent_channels=3), torch.randn(4, 20)
    else:
        layer, x = DCDConv2d(12, 18, 1, latent_channels=3, activation="relu6"), torch.randn(3, 12, 5, 7)
    torch.nn.init.normal_(layer.branch.expand.weight)
    return layer.double(), x.double()


@pytest.mark.parametrize("linear", [False, True], ids=["pointwise", "linear"])
@pytest.mark.parametrize("formulation", PLAIN, ids=lambda f: f.__name__)
def test_a_plain_layer_is_the_layer(formulation, linear):
    layer, x = layer_and_input(linear)
    lam, phi = layer.coefficients(x)
    assert lam.std() > 0.05 and phi.std() > 0.05, "the coefficients must count in this test"
    with torch.no_grad(), use_backend("reference"):
        y = layer(x)
        plain = formulations.PlainLayer(layer, formulation)(x)
    torch.testing.assert_close(plain, y, rtol=1e-12, atol=1e-12)


def test_a_rewritten_network_shares_every_parameter_and_leaves_the_first_alone():
    layer, _ = layer_and_input(linear=False)
    network = torch.nn.Sequential(layer, torch.nn.BatchNorm2d(18).double())
    plain = formulations.rewritten(network, formulations.factored)
    assert isinstance(plain[0], formulations.PlainLayer) and network[0] is layer
    assert {id(p) for p in plain.parameters()} == {id(p) for p in network.parameters()}
    assert {id(b) for b in plain.buffers()} == {id(b) for b in network.buffers()}


@pytest.mark.parametrize(
    "layer",
    [DCDConv2d(8, 8, 3, padding=1), DCDConv2d(8, 8, 3, groups=8), DCDConv2d(8, 8, 1, blocks=2)],
    ids=["3×3", "depthwise", "blocks"],
)
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match="layer must be pointwise or linear"):
        formulations.PlainLayer(layer, formulations.factored)


def rows(**errors: float):
    named = dict.fromkeys(comparison.NAMES, 3e-07) | errors
    return [measure.Measurement(name, error=error) for name, error in named.items()]


@pytest.mark.parametrize(
    ("error", "verdict"), [(4e-7, True), (1.3e-6, False), (float("nan"), False), (1.0, False)]
)
def test_the_verdict_follows_the_error(error, verdict):
    assert comparison.agree(rows(**{comparison.FUSED: error})) is verdict


def test_a_wrong_reference_does_not_widen_the_bound():
    assert not comparison.agree(rows(**{comparison.REFERENCE: 0.5, comparison.FUSED: 0.5}))


def test_interleaved_times_every_call_equally_often():
    counts = [0, 0, 0]

    def call(index):
        counts[index] += 1

    times = measure.interleaved([lambda i=i: call(i) for i in range(3)], rounds=5, seconds=60)
    assert counts == [6, 6, 6]  # one not timed
    assert [len(row) for row in times] == [5, 5, 5]
    assert [len(row) for row in measure.interleaved([lambda: None], rounds=9, seconds=0)] == [3]
    assert measure.paired_ratio([2, 30, 4], [1, 10, 2]) == 2


@pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")
def test_the_peak_is_what_one_call_takes():
    size = 64 * 2**20
    peak = memory.peak_of_one_call(lambda: torch.ones(size // 4).sum())
    assert 0.9 * size < peak < 1.3 * size


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        image=None, out=tmp_path / "new", only="photographs", rounds=3, epochs=1, seed=0
    )


@pytest.fixture
def small(monkeypatch):
    """The demo on a network of two bottlenecks and small images, without the memory's processes."""
    make = comparison.mobilenet_v2

    def two_bottlenecks(width_mult, **given):
        return make(0.25, 10, settings=((1, 16, 1, 1), (6, 24, 2, 2)), last_channels=64, **given)

    batch = photographs.batch
    monkeypatch.setattr(comparison, "mobilenet_v2", two_bottlenecks)
    monkeypatch.setattr(photographs, "batch", lambda taken: batch(taken, 32))
    monkeypatch.setattr(memory, "can_measure", lambda: False)


def test_the_demo_compares_and_draws(options, small, capsys):
    assert demo.run(options) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*comparison.NAMES, comparison.STATIC))
    assert "Outputs agree" in text and "not measured" in text
    assert (options.out / "formulations.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_fails_when_one_formulation_is_wrong(options, small, monkeypatch, capsys):
    def without_phi(input, weight, p, phi, q, lam):
        return formulations.factored(input, weight, p, torch.zeros_like(phi), q, lam)

    monkeypatch.setitem(comparison.PLAIN, "factored eager", without_phi)
    assert demo.run(options) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")
def test_the_memory_of_each_formulation_is_measured(tmp_path):
    images = torch.randn(2, 3, 224, 224)
    subject = comparison.make_subject(0, images)
    torch.save(subject, tmp_path / "subject.pt")
    for name in (*comparison.NAMES, comparison.STATIC):
        peak = memory.peak_of(tmp_path / "subject.pt", name)
        # the largest image, 96 channels at 112 × 112, is there at least twice: before and behind a layer;
        # in one call it is computed row by row, and the largest image is one of 32 channels of one sample
        largest = 2 * 2 * 96 * 112**2 * 4 * 0.9
        least, most = (32 * 112**2 * 4, largest) if name == comparison.OPTIMISED else (largest, 500 * 2**20)
        assert least < peak < most, (name, peak)
    with pytest.raises(RuntimeError, match="unheard-of"):
        memory.peak_of(tmp_path / "subject.pt", "unheard-of")


def test_photographs_become_a_normalised_batch(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    wide = image_module.new("RGB", (90, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 20, 40))  # left of the centred square
    wide.save(tmp_path / "wide.png")
    taken = photographs.open_all([tmp_path / "wide.png"])
    batch = photographs.batch([*taken, *taken], size=24)
    assert batch.shape == (2, 3, 24, 24) and batch.is_contiguous()
    pixel = batch[0] * torch.tensor(photographs.DEVIATION).view(3, 1, 1)
    pixel = pixel + torch.tensor(photographs.MEAN).view(3, 1, 1)
    wanted = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 24, 24)
    torch.testing.assert_close(pixel, wanted, rtol=0, atol=1e-5)
    assert math.isclose(float(pixel[2].max()), 0, abs_tol=1e-5)
