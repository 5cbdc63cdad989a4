# SPDX-License-Identifier: BSD-3-Clause
"""Norms on the latent, folded into Φ: neither z = Qᵀx nor Φz goes through memory to be normalised.

With scales s and shifts t of the norms, ``norm₂(Φ norm₁(z)) + norm₁(z) = Φ' z + shift`` where::

    Φ' = (diag(s₂) Φ + I) diag(s₁)        shift = (diag(s₂) Φ + I) t₁ + t₂

(without the identity where there is no latent residual). In training the scales follow from each sample's
mean and covariance of z alone, because ``Φ z`` has mean ``Φ mean`` and covariance ``Φ covariance Φᵀ``.
All of it is in float32 or better: trained latents vary by factors of a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import layers


class Affine(NamedTuple):
    """What a norm does to the latent, (L,), or (N, L) where its statistics are a sample's own."""

    scale: Tensor
    shift: Tensor


def takes_moments(norm: nn.Module | None) -> bool:
    """Whether ``norm`` normalises by the statistics of what it reads, now."""
    if norm is None:
        return False
    if not layers.is_batch_norm(norm):
        return True
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
    pixels = math.prod(shape[2:])
    first = mean = covariance = None
    if latent_bias is not None:
        latent_bias = latent_bias.to(phi.dtype)
    if moments is not None:
        mean, covariance = moments
        if latent_bias is not None:
            mean = mean + latent_bias
    if norm1 is not None:
        variance = None if covariance is None else covariance.diagonal(dim1=1, dim2=2)
        first = _affine(norm1, mean, variance, shape, phi.dtype)
        if mean is not None:
            mean = torch.addcmul(first.shift, mean, first.scale)
            covariance = covariance * (first.scale.unsqueeze(-1) * first.scale.unsqueeze(-2))
    second = None
    if norm2 is not None:
        variance = None
        if mean is not None:
            mean = (phi @ mean.unsqueeze(2)).squeeze(2)
            variance = (phi @ covariance).mul(phi).sum(2)
        flat = shape if len(shape) == 2 else (*shape[:2], pixels)
        second = _affine(norm2, mean, variance, flat, phi.dtype)
        phi = phi * second.scale.unsqueeze(-1)
    if residual:
        phi = phi + torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
    shift = None if second is None else second.shift
    if first is not None:
        through = (phi @ first.shift.unsqueeze(-1)).squeeze(-1)
        shift = through if shift is None else shift + through
        phi = phi * first.scale.unsqueeze(-2)
    if latent_bias is not None:
        through = phi @ latent_bias
        shift = through if shift is None else shift + through
    if shift is not None and shift.dim() == 1:
        shift = shift.expand(phi.shape[0], -1)
    return phi, shift


def _affine(
    norm: nn.Module, mean: Tensor | None, variance: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Affine:
    """Scale and shift of ``norm``; mean and variance (N, L) are over the pixels of each sample."""
    if not layers.is_batch_norm(norm):
        groups = norm.num_groups
        _require_values([shape[0] * shape[1] // groups, groups, *shape[2:]])
        mean, variance = _of_groups(mean, variance, groups)
    elif takes_moments(norm):
        mean, variance = _of_batch(mean, variance)
        _track(norm, mean, variance, shape)
    else:
        mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    if norm.bias is None:
        return Affine(scale, -mean * scale)
    return Affine(scale, torch.addcmul(norm.bias.to(dtype), mean, scale, value=-1))


def _of_batch(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    whole = mean.mean(0)
    return whole, (variance + (mean - whole).square()).mean(0)


def _of_groups(mean: Tensor, variance: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    members = mean.unflatten(1, (groups, -1))
    whole = members.mean(2, keepdim=True)
    spread = (variance.unflatten(1, (groups, -1)) + (members - whole).square()).mean(2, keepdim=True)
    return whole.expand_as(members).flatten(1), spread.expand_as(members).flatten(1)


def _require_values(shape: Sequence[int]) -> int:
    """How many values a channel has; torch's error for a single one."""
    count = shape[0] * math.prod(shape[2:])
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    return count


def _track(norm: nn.Module, mean: Tensor, variance: Tensor, shape: tuple[int, ...]) -> None:
    """Counts the batch and moves the running statistics, as nn.BatchNorm does."""
    tracks = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    count = _require_values(torch.Size(shape))
    if tracks and norm.running_mean is not None:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
