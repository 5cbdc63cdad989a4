# SPDX-License-Identifier: BSD-3-Clause
"""Norm modules folded into Φ: beside the modules themselves, compiled, and their running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dcd_kernels as dcd
from dcd_kernels import extension
from dcd_kernels.interop import norms

compiled = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)


def norm_pairs():
    track = {"track_running_stats": False}
    yield nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
    yield nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)
    yield nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4)
    yield nn.BatchNorm2d(4, **track), nn.BatchNorm2d(4).eval()
    yield nn.GroupNorm(4, 4), nn.BatchNorm2d(4, **track).eval()
    yield None, nn.BatchNorm2d(4)
    yield nn.BatchNorm2d(4), None
    yield None, None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pair", list(norm_pairs()), ids=str)
def test_modules(pair, bias):
    """The same as the modules called one after the other: values, running statistics, numbers of batches."""
    pair = nn.ModuleList([n or nn.Identity() for n in pair]).double()
    pixels = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    latent_bias = torch.randn(4, dtype=torch.float64) if bias else None
    z = pixels + latent_bias.view(4, 1, 1) if bias else pixels
    phi = torch.randn(3, 4, 4, dtype=torch.float64)
    flat = pixels.flatten(2)
    moments = flat.mean(2), (flat - flat.mean(2, True)) @ (flat - flat.mean(2, True)).mT / 10
    results = []
    for backend in ("auto", "reference"):
        for name, buffer in pair.named_buffers():
            nn.init.constant_(buffer, 1) if "var" in name else nn.init.zeros_(buffer)
        given = [None if isinstance(n, nn.Identity) else n for n in pair]
        with dcd.use_backend(backend):
            for _ in range(2):
                mapped, shift = norms.map_latent(phi, *given, True, moments, latent_bias, z.shape)
        got = (mapped @ flat + (0 if shift is None else shift.unsqueeze(2))).view_as(z)
        results.append([got, *(b.clone() for b in pair.buffers())])
    for name, buffer in pair.named_buffers():
        nn.init.constant_(buffer, 1) if "var" in name else nn.init.zeros_(buffer)
    for _ in range(2):
        inner = pair[0](z)
        wanted = pair[1]((phi @ inner.flatten(2)).view_as(z)) + inner
    for result in results:
        for a, b in zip(result, [wanted, *pair.buffers()], strict=True):
            torch.testing.assert_close(a, b)


@compiled
def test_the_reference_backend_takes_the_composition(monkeypatch):
    def refuse(*_):
        raise AssertionError("the op was called")

    monkeypatch.setattr(norms.op, "latent_map", refuse)
    arguments = torch.randn(2, 4, 4), nn.BatchNorm2d(4).eval(), None, True, None, None, (2, 4, 3, 3)
    with dcd.use_backend("reference"):
        norms.map_latent(*arguments)
    with pytest.raises(AssertionError, match="the op was called"):
        norms.map_latent(*arguments)
    norms.map_latent(arguments[0].to(torch.complex64), *arguments[1:])  # there is no kernel for that


def test_one_value_a_channel():
    """Torch's error, behind torch's count of the batch."""
    phi, moments = torch.randn(1, 4, 4), (torch.randn(1, 4), torch.zeros(1, 4, 4))
    first, second, theirs = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    with pytest.raises(ValueError) as wanted:
        theirs(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError) as got:
        norms.map_latent(phi, first, second, True, moments, None, (1, 4, 1, 1))
    assert str(got.value) == str(wanted.value)
    assert first.num_batches_tracked == theirs.num_batches_tracked == 1
    assert second.num_batches_tracked == 0
    assert not first.running_mean.any()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_norms(training, dynamic):
    """Through the modules, with their running statistics."""

    def run(function, batch, pair):
        torch.manual_seed(batch)
        phi = torch.randn(batch, 4, 4, requires_grad=True)
        z = torch.randn(batch, 4, 9)
        moments = (z.mean(2), z @ z.mT / 9) if training else None
        mapped, shift = function(phi, *pair, True, moments, None, (batch, 4, 3, 3))
        (mapped.sin().sum() + shift.sin().sum()).backward()
        values = [mapped, shift, phi.grad, *(p.grad for p in pair.parameters()), *pair.buffers()]
        pair.zero_grad()
        return [value.clone() for value in values]

    traced = torch.compile(norms.map_latent, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, eager = (nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]).train(training) for _ in range(2))
    for batch in (2, 3):
        for a, b in zip(run(traced, batch, ours), run(norms.map_latent, batch, eager), strict=True):
            torch.testing.assert_close(a, b)
