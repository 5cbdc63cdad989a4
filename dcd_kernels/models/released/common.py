# SPDX-License-Identifier: BSD-3-Clause
"""What the released networks share: how they start, and how they end."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dcd_kernels.models.released.layers import Classifier, ReleasedLayer


def make_classifier(
    in_features: int, num_classes: int, dynamic: bool, dropout: float | None, factory: dict
) -> nn.Sequential:
    """The last layer, behind dropout where there is any, even of 0: the keys count the modules."""
    linear = (Classifier if dynamic else nn.Linear)(in_features, num_classes, **factory)
    return nn.Sequential(*([] if dropout is None else [nn.Dropout(dropout)]), linear)


def initialise(model: nn.Module, last: Iterable[nn.Module], scale: float = 1.0) -> None:
    """Kernels with variance 2/fan_in, Q with 1/fan_in, P with 1/L², linear layers with 1e-4.

    The ``last`` layer of each block, which no activation follows, has ``scale²/fan_in`` and ``scale²/L²``.
    The released code starts with 2/(k²·out_channels) everywhere. An untrained ResNet in eval mode, whose
    norms do not normalise yet, then overflows: Φ grows with the features and multiplies them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    last = set(last)
    for module in model.modules():
        dynamic = isinstance(module, ReleasedLayer)
        shrink = scale if module in last else 1.0
        if dynamic:
            nn.init.normal_(module.q.weight, std=module.in_channels**-0.5)
            nn.init.normal_(module.p.weight, std=shrink / module.latent_channels)
        if module in last:
            weight = module.static.weight if dynamic else module.weight
            nn.init.normal_(weight, std=shrink * weight[0].numel() ** -0.5)
