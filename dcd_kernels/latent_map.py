# SPDX-License-Identifier: BSD-3-Clause
"""Norms on the latent as an affine map of it, in plain PyTorch: the definition of the op latent_map.

With scales s and shifts t of the norms, ``norm₂(Φ norm₁(z)) + norm₁(z) = Φ' z + shift`` where::

    Φ' = (diag(s₂) Φ + I) diag(s₁)        shift = (diag(s₂) Φ + I) t₁ + t₂

(without the identity where there is no latent residual). Where a norm normalises by the statistics of what
it reads, the scales follow from each sample's mean and covariance of z alone, because ``Φ z`` has mean
``Φ mean`` and covariance ``Φ covariance Φᵀ``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Where a norm's mean and variance come from: codes of csrc/cpu/latent_map.h.
NO_NORM, RUNNING, BATCH, GROUPS = range(4)


class Norm(NamedTuple):
    """``weight (z − mean) / sqrt(variance + eps) + bias`` of each channel.

    ``statistics`` is a code: RUNNING takes ``running_mean`` and ``running_var``, BATCH each channel's mean
    and variance over all samples, GROUPS each sample's over the channels of each of ``groups`` groups. The
    tensors are (L,) in any floating-point dtype; weight and bias may be None, the last two are for RUNNING
    alone.
    """

    statistics: int = NO_NORM
    groups: int = 0
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


class _Affine(NamedTuple):
    """What a norm does to the latent, (L,), or (N, L) where its statistics are a sample's own."""

    scale: Tensor
    shift: Tensor


def latent_map(
    phi: Tensor,
    mean: Tensor | None,
    covariance: Tensor | None,
    norm1: Norm,
    norm2: Norm,
    latent_bias: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Φ' (N, L, L) and shift (N, L) of ``norm₂(Φ norm₁(z)) (+ norm₁(z)) = Φ' Qᵀx + shift``.

    z is Qᵀx + latent_bias (L,). phi (N, L, L); mean (N, L) and covariance (N, L, L) are those of Qᵀx over
    each sample's pixels, in the dtype of phi, and needed where a norm takes statistics of the batch or of
    groups.

    Returns Φ', shift, and mean and biased variance, (L,) each, of each norm that takes those of the batch,
    first norm first. No gradient flows into the statistics.
    """
    statistics: list[Tensor] = []
    first = second = None
    if latent_bias is not None:
        latent_bias = latent_bias.to(phi.dtype)
        if mean is not None:
            mean = mean + latent_bias
    if norm1.statistics != NO_NORM:
        variance = None if covariance is None else covariance.diagonal(dim1=1, dim2=2)
        first = _affine(norm1, mean, variance, phi.dtype, statistics)
    if norm2.statistics != NO_NORM:
        variance = None
        if norm2.statistics != RUNNING:
            if first is not None:
                mean = torch.addcmul(first.shift, mean, first.scale)
                covariance = covariance * (first.scale.unsqueeze(-1) * first.scale.unsqueeze(-2))
            mean = (phi @ mean.unsqueeze(2)).squeeze(2)
            variance = (phi @ covariance).mul(phi).sum(2)
        second = _affine(norm2, mean, variance, phi.dtype, statistics)
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
    if shift is None:
        shift = phi.new_zeros(phi.shape[:2])
    elif shift.dim() == 1:
        shift = shift.expand(phi.shape[0], -1)
    return phi, shift, statistics


def _affine(
    norm: Norm, mean: Tensor | None, variance: Tensor | None, dtype: torch.dtype, statistics: list[Tensor]
) -> _Affine:
    """Scale and shift; mean and variance (N, L) are over the pixels of each sample."""
    if norm.statistics == GROUPS:
        mean, variance = _of_groups(mean, variance, norm.groups)
    elif norm.statistics == BATCH:
        mean, variance = _of_batch(mean, variance)
        statistics += [mean.detach(), variance.detach()]
    else:
        mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    if norm.bias is None:
        return _Affine(scale, -mean * scale)
    return _Affine(scale, torch.addcmul(norm.bias.to(dtype), mean, scale, value=-1))


def _of_batch(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    whole = mean.mean(0)
    return whole, (variance + (mean - whole).square()).mean(0)


def _of_groups(mean: Tensor, variance: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    members = mean.unflatten(1, (groups, -1))
    whole = members.mean(2, keepdim=True)
    spread = (variance.unflatten(1, (groups, -1)) + (members - whole).square()).mean(2, keepdim=True)
    return whole.expand_as(members).flatten(1), spread.expand_as(members).flatten(1)
