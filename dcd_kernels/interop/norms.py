# SPDX-License-Identifier: BSD-3-Clause
"""Norms on the latent, folded into Φ: neither z = Qᵀx nor Φz goes through memory to be normalised.

The algebra is that of :mod:`dcd_kernels.latent_map`, all of it in float32 or better: trained latents vary by
factors of a thousand. Here is what it has to do with torch's modules: which statistics each one normalises by
now, and what each keeps of those of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import extension
from ..backends import selection
from ..latent_map import BATCH, GROUPS, RUNNING, Norm, latent_map
from . import layers

if extension.LOADED:
    from ..ops import latent_map as op

_NONE = Norm()


def takes_moments(norm: nn.Module | None) -> bool:
    """Whether ``norm`` normalises by the statistics of what it reads, now."""
    return norm is not None and (not layers.is_batch_norm(norm) or _takes_batch(norm))


def _takes_batch(norm: nn.Module) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def map_latent(
    phi: Tensor,
    norm1: nn.Module | None,
    norm2: nn.Module | None,
    residual: bool,
    moments: tuple[Tensor, Tensor] | None,
    latent_bias: Tensor | None,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """Φ' (N, L, L) and shift (N, L), None for no shift, of ``Φ' Qᵀx + shift``, where z = Qᵀx + latent_bias.

    phi (N, L, L) in float32 or float64. moments are the mean (N, L) and covariance (N, L, L) of Qᵀx, needed
    where a norm takes statistics. Running statistics are updated. ``shape`` is that of z.
    """
    if norm1 is None and norm2 is None and latent_bias is None:
        if residual:
            phi = phi + torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
        return phi, None
    first, track1 = _described(norm1, shape)
    flat = shape if len(shape) == 2 else (*shape[:2], math.prod(shape[2:]))
    second, track2 = _described(norm2, flat)
    mean, covariance = (None, None) if moments is None else moments
    compute = op.latent_map if _is_compiled(phi, mean) else latent_map
    mapped, shift, statistics = compute(phi, mean, covariance, first, second, latent_bias, residual)
    if track1 is not None or track2 is not None:
        rows = iter(statistics)
        for norm, described, track in ((norm1, first, track1), (norm2, second, track2)):
            if described.statistics == BATCH:
                move(norm, next(rows), next(rows), track)
    return mapped, shift


def _is_compiled(phi: Tensor, mean: Tensor | None) -> bool:
    """Whether there is a kernel, and no one has asked to go without."""
    return (
        extension.LOADED
        and phi.is_cpu
        and phi.dtype in (torch.float32, torch.float64)
        and (mean is None or mean.dtype == phi.dtype)
        and selection.current() != "reference"
    )


class _Tracking(NamedTuple):
    """By how much running statistics move, and the factor of the unbiased variance."""

    momentum: float
    unbiased: float


def _described(norm: nn.Module | None, shape: Sequence[int]) -> tuple[Norm, _Tracking | None]:
    """``norm`` as it is now, and how it keeps the statistics of the batch, which it counts here."""
    if norm is None:
        return _NONE, None
    if not layers.is_batch_norm(norm):
        groups = norm.num_groups
        _require_values([shape[0] * shape[1] // groups, groups, *shape[2:]])
        return Norm(GROUPS, groups, norm.eps, norm.weight, norm.bias), None
    if not _takes_batch(norm):
        return Norm(RUNNING, 0, norm.eps, norm.weight, norm.bias, norm.running_mean, norm.running_var), None
    return Norm(BATCH, 0, norm.eps, norm.weight, norm.bias), count_batch(norm, shape)


def count_batch(norm: nn.Module, shape: Sequence[int]) -> _Tracking | None:
    """Counts the batch as nn.BatchNorm does, also one that it then refuses."""
    tracks = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    count = _require_values(torch.Size(shape))
    if tracks and norm.running_mean is not None:
        return _Tracking(momentum, count / (count - 1))
    return None


def _require_values(shape: Sequence[int]) -> int:
    """How many values a channel has; torch's error for a single one."""
    count = shape[0] * math.prod(shape[2:])
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    return count


def move(norm: nn.Module, mean: Tensor, variance: Tensor, track: _Tracking | None) -> None:
    """Moves the running statistics, as nn.BatchNorm does."""
    if track is None:
        return
    if mean.requires_grad:
        mean, variance = mean.detach(), variance.detach()
    running_mean, running_var = norm.running_mean, norm.running_var
    unbiased = variance * track.unbiased
    if mean.dtype is not running_mean.dtype:
        mean, unbiased = mean.to(running_mean.dtype), unbiased.to(running_var.dtype)
    running_mean.lerp_(mean, track.momentum)
    running_var.lerp_(unbiased, track.momentum)
