# SPDX-License-Identifier: BSD-3-Clause
"""The demo's digits: twins that start alike, and a score that says how sure it is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich", reason="the demo needs the packages of the extra 'demo'")
pytest.importorskip("matplotlib", reason="the demo needs the packages of the extra 'demo'")
pytest.importorskip("sklearn", reason="the demo needs the packages of the extra 'demo'")

from dcd_kernels.demo import digits, pictures
from dcd_kernels.nn import DCDConv2d


@pytest.fixture(scope="module")
def data():
    return digits.load(seed=0)


def test_the_split_holds_every_class_in_proportion_and_no_image_twice(data):
    assert data.train_images.shape[1:] == (1, digits.SIZE, digits.SIZE)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert 0.6 < data.train_images.max() <= 1 and data.train_images.min() >= 0
    counts = torch.stack([data.train_labels.bincount(), data.test_labels.bincount()]).float()
    assert (counts[1] / counts.sum(0) - digits.HELD_OUT).abs().max() < 0.01


def test_the_twins_compute_the_same_before_the_first_step(data):
    dynamic, static = digits.twins(seed=3)
    layers = [m for m in dynamic.modules() if isinstance(m, DCDConv2d)]
    assert len(layers) == 8
    x = data.test_images[:5]
    with torch.no_grad():
        torch.testing.assert_close(dynamic.eval()(x), static.eval()(x))
    shared = {id(p) for p in dynamic.parameters()} & {id(p) for p in static.parameters()}
    assert not shared, "training one twin must not train the other"


def test_training_teaches_and_moves_the_coefficients(data):
    dynamic, _ = digits.twins(seed=0)
    losses = []
    digits.train(dynamic, data, epochs=2, seed=0, on_step=losses.append)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    chosen = digits.one_of_each(data.test_labels, 4)
    assert data.test_labels[chosen].tolist() == [0, 1, 2, 3]
    name, lam, phi = digits.coefficients(dynamic, data.test_images[chosen])
    assert name == "bottleneck4.project"
    assert lam.shape == (4, 40) and phi.shape[0] == 4 and phi.shape[1] == phi.shape[2]
    assert (lam.std(0) > 0).any() and (phi.std(0) > 0).any()


def test_both_twins_see_the_same_batches(data, monkeypatch):
    seen = []
    monkeypatch.setattr(digits.F, "cross_entropy", lambda y, labels: seen.append(labels) or y.sum())
    for network in digits.twins(seed=1):
        digits.train(network, data, epochs=1, seed=1, on_step=lambda loss: None)
    half = len(seen) // 2
    assert half == len(data.train_labels) // digits.BATCH
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right, n, low, high):
    # method 3 in Table I of Newcombe, Statistics in Medicine 17 (1998)
    assert digits.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_the_picture_is_drawn(tmp_path):
    torch.manual_seed(0)
    lam, phi = torch.rand(3, 10).numpy(), torch.randn(3, 4, 4).numpy()
    pictures.coefficients(tmp_path / "a.png", torch.rand(3, 16, 16).numpy(), [0, 1, 2], lam, phi, "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
