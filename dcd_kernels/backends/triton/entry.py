# SPDX-License-Identifier: BSD-3-Clause
"""The operators on Triton kernels: checked operands in, launches, tensors out.

Each function takes the arguments of the op of its name (csrc/ops_*.cpp); the package registers them for CUDA.
Block-diagonal factors (Eq. 7) are widened to dense ones of B·L latent channels first: they are parameters and
L×L matrices, small beside an image, and the kernels stay free of blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.fakes import empty_map
from . import gradients, moments, operands, product, scaling, synthesised
from .launch import Image, image, pixels_of

SMALL_MAP = 16  # pixels under which a sample fills no matrix unit: its sums are taken over the whole batch

_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def pointwise(*call: Tensor | int | None) -> Tensor:
    """y = act(λ⊙(W0 x) + P Φ Qᵀ x + bias + residual)."""
    return _pointwise(*call)[0]


def pointwise_pooled(*call: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """`pointwise` and its output's channel sums (N, Co) in float32, of the values before rounding."""
    out, sums = _pointwise(*call, pooled=True)
    if sums is None:
        return out, out.new_zeros(out.shape[:2], dtype=torch.float32)
    return out, sums.sum(1)


def _pointwise(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    pooled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output and, if ``pooled`` and it is not empty, partial channel sums of it (N, parts, Co)."""
    operands.check_pointwise(input, weight, p, phi, q, lam, bias, residual, activation)
    out = empty_map(input, weight.shape[0], input.shape[2:])
    if not out.numel():
        return out, None
    p, phi, q = operands.widen(p, phi, q)
    x, y, skip = image(input), image(out), None if residual is None else image(residual)
    options = {"bias": bias, "residual": skip, "activation": activation, "pooled": pooled}
    if phi is not None and synthesised.pays(weight.shape[1], pixels_of(input), input.dtype):
        return out, synthesised.run(x, weight, q, phi, p, lam, y, **options)
    scales = product.NO_LAM if lam is None else product.LAM_ON_OUTPUT
    options |= {"lam": lam, "scales": scales, "static": product.COMPUTED}
    return out, product.run(x, weight, q, phi, p, y, **options)


def pointwise_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    needs: int,
) -> _Six:
    """Gradients of the six factors for G = ``grad``; bit i of ``needs`` asks for return i."""
    operands.check_pointwise(input, weight, p, phi, q, lam, None, None)
    operands.check_like("grad", grad, input, weight.shape[0])
    operands.check_needs(needs, input=input, weight=weight, p=p, phi=phi, q=q, lam=lam)
    factors = (input, weight, p, phi, q, lam)
    if not grad.numel() or not input.numel():
        return operands.zeros(factors, needs, 1)
    # copied once here if at all, and not by each kernel
    grad, input = image(grad.to(input.dtype)).tensor, image(input).tensor
    blocks = operands.blocks_of(phi)
    p, phi, q = operands.widen(p, phi, q)
    d_input, latents = _input_gradient(grad, input, weight, p, phi, q, lam, needs & 1, needs >> 2 & 0b111)
    d_phi = _phi_gradient(input, q, latents) if needs & 0b1000 else None
    wants = tuple(bool(needs >> place & 1) for place in (1, 5, 2, 4))
    d_weight, d_lam, d_p, d_q = _parameter_gradients(grad, input, weight, lam, latents, *wants)
    d_p, d_phi, d_q = operands.narrow((d_p, d_phi, d_q), blocks)
    return operands.returned((d_input, d_weight, d_p, d_phi, d_q, d_lam), factors, needs, 1)


def apply(
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """y = act(λ⊙static + P Φ Qᵀ x + bias + residual); without q the input is the latent itself."""
    operands.check_apply(static, input, p, phi, q, lam, bias, residual, activation)
    out = empty_map(static, static.shape[1], static.shape[2:])
    if out.numel():
        p, phi, q = operands.widen(p, phi, q)
        product.run(
            image(static if p is None else input),
            None,
            q,
            phi,
            p,
            image(out),
            lam=lam,
            scales=product.NO_LAM if lam is None else product.LAM_ON_OUTPUT,
            bias=bias,
            residual=None if residual is None else image(residual),
            activation=activation,
            static=product.GIVEN,
            given=image(static),
        )
    return out


def apply_backward(
    grad: Tensor,
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    needs: int,
) -> _Six:
    """Gradients of static, input, p, phi, q and lam; otherwise as `pointwise_backward`."""
    operands.check_apply(static, input, p, phi, q, lam, None, None)
    operands.check_like("grad", grad, static, static.shape[1])
    read = None if p is None else input
    operands.check_needs(needs, static=static, input=read, p=p, phi=phi, q=q, lam=lam)
    factors = (static, input, p, phi, q, lam)
    if not grad.numel():
        return operands.zeros(factors, needs, 2)
    d_static = d_lam = None
    if needs & 1 and lam is None:
        d_static = empty_map(static, static.shape[1], static.shape[2:]).copy_(grad)
    elif needs & 0b100001:
        # G unrounded: a sum over the pixels can be much smaller than what it adds up
        d_static, d_lam = scaling.run(grad, static, lam, needs & 1, needs >> 5 & 1)
    grad = image(grad.to(static.dtype)).tensor
    d_input = d_p = d_phi = d_q = None
    if p is not None:
        blocks = operands.blocks_of(phi)
        p, phi, q = operands.widen(p, phi, q)
        needs_input, needs_factors = needs >> 1 & 1, needs >> 2 & 0b111
        d_input, latents = _input_gradient(grad, input, None, p, phi, q, None, needs_input, needs_factors)
        d_phi = _phi_gradient(input, q, latents) if needs & 0b1000 else None
        d_p = _sum_of_rows(grad, latents.h) if needs & 0b100 else None
        d_q = _sum_of_rows(input, latents.s) if needs & 0b10000 else None
        d_p, d_phi, d_q = operands.narrow((d_p, d_phi, d_q), blocks)
    return operands.returned((d_static, d_input, d_p, d_phi, d_q, d_lam), factors, needs, 2)


def latent_moments(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, L) and centred covariance (N, L, L) of z = Qᵀx over a sample's pixels, float32."""
    operands.check_projection(input, q)
    if not input.numel():
        shape = (input.shape[0], q.shape[1])
        nothing = input.new_full(shape, float("nan"), dtype=torch.float32)
        return nothing, nothing.unsqueeze(2).expand(*shape, shape[1]).contiguous()
    return moments.run(input, q)


def _transposed(
    grad: Tensor,
    weight: Tensor | None,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    d_input: Tensor,
    latent: Tensor | None,
    mixed: Tensor | None,
) -> None:
    """Writes d_input = W0ᵀ(λ⊙G) + Q Φᵀ Pᵀ G, and PᵀG and ΦᵀPᵀG if they are wanted."""
    if p is not None and q is None:  # the input was the latent: its gradient is Φ Pᵀ G itself
        into = _empty_latents(d_input, phi.shape[2]) if mixed is None else mixed
        _latents(grad, p, phi, True, latent, into)
        d_input.copy_(into.transpose(1, 2).reshape(d_input.shape))
        return
    product.run(
        image(grad),
        weight,
        p,
        phi,
        q,
        image(d_input),
        lam=lam,
        scales=product.NO_LAM if lam is None else product.LAM_ON_INPUT,
        static=product.ABSENT if weight is None else product.COMPUTED,
        transpose=True,
        latent=latent,
        mixed=mixed,
    )


def _empty_latents(like: Tensor, latent_channels: int) -> Tensor:
    """(N, pixels, L) in the dtype of ``like``, as `latents` writes it."""
    return like.new_empty((like.shape[0], pixels_of(like), latent_channels))


def _latents(
    input: Tensor, left: Tensor | None, phi: Tensor, transpose: bool, latent: Tensor | None, mixed: Tensor
) -> None:
    """Writes latent = leftᵀ x and mixed = Φ leftᵀ x, or with Φᵀ if ``transpose``."""
    product.run(image(input), None, left, phi, None, None, transpose=transpose, latent=latent, mixed=mixed)


class _Latents(NamedTuple):
    """The latent images of a backward pass, (N, pixels, L) each; None where no gradient needs one."""

    t: Tensor | None = None  # Pᵀ G
    s: Tensor | None = None  # Φᵀ Pᵀ G
    z: Tensor | None = None  # Qᵀ x
    h: Tensor | None = None  # Φ Qᵀ x


def _input_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    needs_input: int,
    needs_factors: int,
) -> tuple[Tensor | None, _Latents]:
    """dX, and the latents that the gradients of p (bit 0), phi (bit 1) and q (bit 2) need."""
    d_input = t = s = z = h = None
    if needs_factors:
        t, s = _empty_latents(input, phi.shape[1]), _empty_latents(input, phi.shape[2])
    if needs_input:
        d_input = empty_map(input, input.shape[1], input.shape[2:])
        _transposed(grad, weight, p, phi, q, lam, d_input, t, s)
    elif needs_factors:
        _latents(grad, p, phi, True, t, s)
    if needs_factors & 0b011:
        h = _empty_latents(input, phi.shape[1])
        z = None if q is None else _empty_latents(input, phi.shape[2])
        _latents(input, q, phi, False, z, h)
    return d_input, _Latents(t, s, z, h)


def _phi_gradient(input: Tensor, q: Tensor | None, latents: _Latents) -> Tensor:
    """dΦ_n = (PᵀG)(Qᵀx)ᵀ, (N, L, L) in float32."""
    z = image(input) if q is None else _latent_image(latents.z)
    return gradients.sample_sums(_latent_image(latents.t), z)


def _parameter_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    lam: Tensor | None,
    latents: _Latents,
    needs_weight: bool,
    needs_lam: bool,
    needs_p: bool,
    needs_q: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dW0 = Σ λ⊙G xᵀ, dλ = rowsum(G xᵀ ⊙ W0), dP = Σ G (ΦQᵀx)ᵀ, dQ = Σ x (ΦᵀPᵀG)ᵀ, each if needed."""
    d_weight = d_lam = d_p = d_q = None
    h, s = latents.h, latents.s
    if pixels_of(input) < SMALL_MAP:
        if needs_weight or needs_lam:
            d_weight, d_lam = _small_weight_gradients(input, grad, weight, lam, needs_weight, needs_lam)
    elif needs_weight or needs_lam:
        fused = needs_weight and needs_p and needs_q and h.shape[2] <= gradients.WIDEST_FUSED
        d_weight, d_p, d_q, d_lam = gradients.sum_pixels(
            image(grad),
            image(input),
            weight.dtype,
            lam=lam,
            weight=weight,
            h=h if fused else None,
            s=s if fused else None,
            wants_sums=needs_weight,
            rows_dtype=lam.dtype if needs_lam else None,
        )
    if needs_p and d_p is None:
        d_p = _sum_of_rows(grad, h)
    if needs_q and d_q is None:
        d_q = _sum_of_rows(input, s)
    return d_weight, d_lam, d_p, d_q


def _small_weight_gradients(
    input: Tensor, grad: Tensor, weight: Tensor, lam: Tensor | None, needs_weight: bool, needs_lam: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dW0 and dλ where a sample has a few pixels or one, as in a classifier: two plain matrix products."""
    x, g = _rows(input), _rows(grad)
    pixels = pixels_of(input)
    d_weight = d_lam = None
    if needs_weight:
        scaled = g if lam is None else g * lam.repeat_interleave(pixels, 0).to(g.dtype)
        d_weight = scaled.t() @ x
    if needs_lam:
        d_lam = (g.float() * (x @ weight.t()).float()).unflatten(0, (-1, pixels)).sum(1)
    return d_weight, d_lam


def _latent_image(latent: Tensor) -> Image:
    """(N, pixels, L) as an image (N, L, pixels)."""
    return Image(latent.transpose(1, 2), True, latent.stride(0), latent.stride(1))


def _sum_of_rows(tensor: Tensor, latent: Tensor) -> Tensor:
    """Σ_n,p tensor[n, :, p] latent[n, p, :]ᵀ, (C, L)."""
    if pixels_of(tensor) < SMALL_MAP:
        return _rows(tensor).t() @ latent.flatten(0, 1)
    return gradients.sum_pixels(image(tensor), _latent_image(latent), tensor.dtype).ab


def _rows(tensor: Tensor) -> Tensor:
    """(N, C, *spatial) as (N·pixels, C)."""
    return tensor.flatten(2).transpose(1, 2).flatten(0, 1)
