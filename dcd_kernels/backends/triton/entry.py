# SPDX-License-Identifier: BSD-3-Clause
"""The operators on Triton kernels: checked operands in, launches, tensors out.

Each function has the signature of the op of its name (csrc/ops_*.cpp); register.py makes them the CUDA
implementations. Block-diagonal factors (Eq. 7) are widened to dense ones of B·L latent channels first: they
are parameters and L×L matrices, small beside an image, and the kernels stay free of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.fakes import empty_map
from . import gradients, moments, operands, product, synthesised
from .launch import Image, image, pixels_of

SMALL_MAP = 16  # pixels under which a sample fills no matrix unit: its sums are taken over the whole batch

_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def pointwise(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    """y = act(λ⊙(W0 x) + P Φ Qᵀ x + bias + residual)."""
    operands.check_pointwise(input, weight, p, phi, q, lam, bias, residual)
    out = empty_map(input, weight.shape[0], input.shape[2:])
    if out.numel():
        p, phi, q = operands.widen(p, phi, q)
        _forward(input, weight, p, phi, q, lam, bias, residual, activation, out)
    return out


def pointwise_pooled(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """`pointwise` and its output's channel sums (N, Co) in float32, of the values before rounding."""
    operands.check_pointwise(input, weight, p, phi, q, lam, bias, residual)
    out = empty_map(input, weight.shape[0], input.shape[2:])
    if not out.numel():
        return out, out.new_zeros((input.shape[0], weight.shape[0]), dtype=torch.float32)
    p, phi, q = operands.widen(p, phi, q)
    sums = _forward(input, weight, p, phi, q, lam, bias, residual, activation, out, pooled=True)
    return out, sums.sum(1)


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
    factors = (input, weight, p, phi, q, lam)
    if not grad.numel() or not input.numel():
        return operands.zeros(factors, needs, 1)
    grad = grad.to(input.dtype)
    blocks = operands.blocks_of(phi)
    p, phi, q = operands.widen(p, phi, q)
    found = _low_rank_gradients(grad, input, weight, p, phi, q, lam, needs & 1, needs >> 2 & 0b111, blocks)
    found[1], found[5] = _weight_gradients(input, grad, weight, lam, needs >> 1 & 1, needs >> 5 & 1)
    return operands.returned(found, factors, needs, 1)


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
    operands.check_apply(static, input, p, phi, q, lam, bias, residual)
    out = empty_map(static, static.shape[1], static.shape[2:])
    if out.numel():
        p, phi, q = operands.widen(p, phi, q)
        _addition(static, input, p, phi, q, lam, bias, residual, activation, out)
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
    factors = (static, input, p, phi, q, lam)
    if not grad.numel():
        return operands.zeros(factors, needs, 2)
    grad = grad.to(static.dtype)
    d_static = d_lam = None
    if needs & 1 and lam is None:
        d_static = empty_map(static, static.shape[1], static.shape[2:]).copy_(grad)
    elif needs & 0b100001:
        d_static, d_lam = gradients.static_gradients(grad, static, lam, needs & 1, needs >> 5 & 1)
    found: list[Tensor | None] = [None] * 6
    if p is not None:
        blocks = operands.blocks_of(phi)
        p, phi, q = operands.widen(p, phi, q)
        found = _low_rank_gradients(
            grad, input, None, p, phi, q, None, needs >> 1 & 1, needs >> 2 & 0b111, blocks
        )
    return operands.returned((d_static, found[0], *found[2:5], d_lam), factors, needs, 2)


def _low_rank_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    needs_input: int,
    needs_factors: int,
    blocks: int,
) -> list[Tensor | None]:
    """Six gradients with those of input, p, phi and q filled in, as far as they are needed."""
    found: list[Tensor | None] = [None] * 6
    latent = mixed = None
    if needs_factors:
        latent, mixed = _empty_latents(input, phi.shape[1]), _empty_latents(input, phi.shape[2])
    if needs_input:
        found[0] = empty_map(input, input.shape[1], input.shape[2:])
        _transposed(grad, weight, p, phi, q, lam, found[0], latent, mixed)
    elif needs_factors:
        _latents(grad, p, phi, True, latent, mixed)
    if needs_factors:
        gradients = _factor_gradients(input, grad, phi, q, latent, mixed, needs_factors)
        found[2:5] = operands.narrow(gradients, blocks)
    return found


def latent_moments(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, L) and centred covariance (N, L, L) of z = Qᵀx over a sample's pixels, float32."""
    operands.check_projection(input, q)
    if not input.numel():
        shape = (input.shape[0], q.shape[1])
        nothing = input.new_full(shape, float("nan"), dtype=torch.float32)
        return nothing, nothing.unsqueeze(2).expand(*shape, shape[1]).contiguous()
    return moments.run(input, q)


def _forward(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    out: Tensor,
    pooled: bool = False,
) -> Tensor | None:
    """Writes out; returns its partial channel sums (N, parts, Co) if ``pooled``."""
    x, y, skip = image(input), image(out), None if residual is None else image(residual)
    options = {"bias": bias, "residual": skip, "activation": activation, "pooled": pooled}
    if phi is not None and synthesised.pays(weight.shape[1], pixels_of(input)):
        return synthesised.run(x, weight, q, phi, p, lam, y, **options)
    scales = product.NO_LAM if lam is None else product.LAM_ON_OUTPUT
    return product.run(x, weight, q, phi, p, y, lam=lam, scales=scales, static=product.COMPUTED, **options)


def _addition(
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    out: Tensor,
) -> None:
    """Writes out = act(λ⊙static + P Φ Qᵀ x + bias + residual)."""
    x = image(static if p is None else input)
    product.run(
        x,
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


def _weight_gradients(
    input: Tensor, grad: Tensor, weight: Tensor, lam: Tensor | None, needs_weight: int, needs_lam: int
) -> tuple[Tensor | None, Tensor | None]:
    """dW0 (Co, Ci) = Σ λ⊙G xᵀ and dλ (N, Co) = rowsum(G xᵀ ⊙ W0), each if needed."""
    if not (needs_weight or needs_lam):
        return None, None
    if pixels_of(input) < SMALL_MAP:
        return _small_weight_gradients(input, grad, weight, lam, needs_weight, needs_lam)
    wanted = (bool(needs_weight), bool(needs_lam))
    return gradients.sum_pixels(image(grad), image(input), lam=lam, weight=weight, wanted=wanted)


def _small_weight_gradients(input, grad, weight, lam, needs_weight, needs_lam):
    """The same where a sample has a few pixels or one, as in a classifier: two plain matrix products."""
    x, g = _rows(input), _rows(grad)
    pixels = pixels_of(input)
    d_weight = d_lam = None
    if needs_weight:
        scaled = g if lam is None else g * lam.repeat_interleave(pixels, 0).to(g.dtype)
        d_weight = scaled.t() @ x
    if needs_lam:
        d_lam = (g.float() * (x @ weight.t()).float()).unflatten(0, (-1, pixels)).sum(1)
    return d_weight, d_lam


def _factor_gradients(
    input: Tensor,
    grad: Tensor,
    phi: Tensor,
    q: Tensor | None,
    latent: Tensor,
    mixed: Tensor,
    needs: int,
) -> list[Tensor | None]:
    """dP = Σ G (ΦQᵀx)ᵀ, dΦ_n = (PᵀG)(Qᵀx)ᵀ, dQ = Σ x (ΦᵀPᵀG)ᵀ; latent is PᵀG, mixed is ΦᵀPᵀG."""
    d_p = d_phi = d_q = None
    if needs & 0b011:
        turned = _empty_latents(input, phi.shape[1])
        projected = None if q is None else _empty_latents(input, phi.shape[2])
        _latents(input, q, phi, False, projected, turned)
    if needs & 0b001:
        d_p = _sum_of_rows(grad, turned)
    if needs & 0b010:
        z = image(input) if q is None else _latent_image(projected)
        d_phi, _ = gradients.sum_pixels(_latent_image(latent), z, each_sample=True)
    if needs & 0b100:
        d_q = _sum_of_rows(input, mixed)
    return [d_p, d_phi, d_q]


def _latent_image(latent: Tensor) -> Image:
    """(N, pixels, L) as an image (N, L, pixels)."""
    return Image(latent.transpose(1, 2), True, latent.stride(0), latent.stride(1))


def _sum_of_rows(tensor: Tensor, latent: Tensor) -> Tensor:
    """Σ_n,p tensor[n, :, p] latent[n, p, :]ᵀ, (C, L)."""
    if pixels_of(tensor) < SMALL_MAP:
        return _rows(tensor).t() @ latent.flatten(0, 1)
    return gradients.sum_pixels(image(tensor), _latent_image(latent))[0]


def _rows(tensor: Tensor) -> Tensor:
    """(N, C, *spatial) as (N·pixels, C)."""
    return tensor.flatten(2).transpose(1, 2).flatten(0, 1)
