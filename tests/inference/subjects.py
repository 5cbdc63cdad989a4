# SPDX-License-Identifier: BSD-3-Clause
"""The networks whose life the tests follow, and whether a result is that of the weights that they have."""

from __future__ import annotations

import pytest
import torch
from graphs import Net, chain, conv, dcd, deep, norm
from runs import Twin, image, randomise
from torch import nn

import dcd_kernels
from dcd_kernels import models
from dcd_kernels.models import released
from dcd_kernels.nn import DCDLinear


def mobilenet(**options):
    settings = ((1, 8, 1, 1), (3, 16, 2, 2), (3, 24, 2, 2))
    network = models.mobilenet_v2(num_classes=11, last_channels=48, settings=settings, reduction=4, **options)
    return randomise(network)


def _parts(s, x):
    return s.c(torch.sigmoid(s.n(s.b(torch.relu(s.a(x))))))


def in_parts():
    """Two pieces, with a function between them that has no kernel."""
    return randomise(
        Net(
            _parts,
            a=conv(3, 18),
            b=dcd(18, 20, latent_channels=3),
            n=norm(20),
            c=deep(20),
        )
    )


def released_form():
    classifier = released.Classifier(18, 7)
    layers = (released.PointwiseConv(16, 35, 4), norm(35), nn.ReLU(), deep(35), released.BasicConv(35, 18))
    return randomise(chain(conv(3, 16), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier))


def accelerated():
    network = dcd_kernels.accelerate(released_form())
    assert len(dcd_kernels.report(network).taken) == 3
    return network


def sparse_and_joint():
    """Residuals of Eq. 7 and 9."""
    sparse = dcd(16, 36, blocks=4, latent_channels=2)
    joint = dcd(36, 18, 3, joint=True, latent_channels=3)
    classifier = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), DCDLinear(18, 6, blocks=2, latent_channels=2)
    )
    return randomise(chain(conv(3, 16), sparse, norm(36), nn.ReLU(), joint, norm(18), classifier))


NETWORKS = {
    "whole": mobilenet,
    "in parts": in_parts,
    "released": released_form,
    "accelerated": accelerated,
    "sparse and joint": sparse_and_joint,
}
each = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def written(network, x):
    with torch.no_grad(), dcd_kernels.use_backend("reference"):
        return network(x)


def assert_follows(optimised, x=None):
    """The result is that of the written network with the weights that it has now, in all their digits."""
    twin = Twin.of(optimised)
    twin.run(image(2, 3, 33, 40) if x is None else x)
    twin.check()
