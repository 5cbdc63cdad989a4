# SPDX-License-Identifier: BSD-3-Clause
"""Formulas of the ops for torch's ``FlopCounterMode``: twice the multiply-adds of ``dcd_kernels.madds``.

Counted is the order of the product that the CPU kernels take, in their place on a GPU too. Bias, activation,
skip connection and λ on a finished output are free, as torch counts a convolution. The formulas see shapes.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import madds
from ..latent_map import BATCH, GROUPS

_ops = torch.ops.dcd_kernels


def _latent(p, phi) -> tuple[int, int]:
    """L of one block, and how many blocks."""
    return (0, 1) if p is None else (p[1], phi[1] if len(phi) == 4 else 1)


def _pixels(image) -> int:
    return math.prod(image[2:])


@register_flop_formula([_ops.pointwise, _ops.pointwise_pooled])
def pointwise(input, weight, p, phi, q, lam, bias, residual, activation, *, out_shape=None) -> int:
    out_channels, in_channels = weight
    pixels = _pixels(input)
    dynamic = madds.pointwise_residual(in_channels, out_channels, *_latent(p, phi), pixels)
    return 2 * input[0] * (out_channels * in_channels * pixels + dynamic)


@register_flop_formula(_ops.pointwise_packed)
def pointwise_packed(
    input, packed, out_channels, latent, phi, lam, bias, residual, activation, *, out_shape=None
) -> int:
    pixels = _pixels(input)
    dynamic = madds.pointwise_residual(input[1], out_channels, latent, 1, pixels)
    return 2 * input[0] * (out_channels * input[1] * pixels + dynamic)


@register_flop_formula(_ops.pack_pointwise)
def pack_pointwise(weight, p, q, *, out_shape=None) -> int:
    return 0


@register_flop_formula(_ops.pointwise_backward)
def pointwise_backward(grad, input, weight, p, phi, q, lam, needs, *, out_shape=None) -> int:
    out_channels, in_channels = weight
    sizes = (in_channels, out_channels, *_latent(p, phi), _pixels(input))
    return 2 * input[0] * madds.pointwise_gradients(*sizes, needs)


@register_flop_formula(_ops.apply)
def apply(static, input, p, phi, q, lam, bias, residual, activation, *, out_shape=None) -> int:
    latent, blocks = _latent(p, phi)
    if latent == 0:
        return 0
    sizes, pixels = (input[1], static[1], latent), _pixels(static)
    if q is None:
        return 2 * static[0] * madds.without_q(*sizes, pixels)
    return 2 * static[0] * madds.on_map(*sizes, blocks, pixels)


@register_flop_formula(_ops.apply_backward)
def apply_backward(grad, static, input, p, phi, q, lam, needs, *, out_shape=None) -> int:
    sizes = (input[1], grad[1], *_latent(p, phi), _pixels(grad))
    return 2 * grad[0] * madds.apply_gradients(*sizes, needs, q is not None)


@register_flop_formula(_ops.depthwise)
def depthwise(
    input,
    weight,
    p,
    phi,
    r,
    lam,
    bias,
    residual,
    stride,
    padding,
    dilation,
    activation,
    *,
    out_shape=None,
) -> int:
    taps = math.prod(weight[2:])
    weights = madds.depthwise_weights(weight[0], taps, _latent(p, phi)[0], lam is not None)
    return 2 * input[0] * (weight[0] * taps * _pixels(out_shape) + weights)


@register_flop_formula(_ops.depthwise_backward)
def depthwise_backward(
    grad, input, weight, p, phi, r, lam, stride, padding, dilation, needs, *, out_shape=None
) -> int:
    sizes = (weight[0], math.prod(weight[2:]), _latent(p, phi)[0], _pixels(grad))
    return 2 * grad[0] * madds.depthwise_gradients(*sizes, needs, lam is not None)


@register_flop_formula(_ops.latent_moments)
def latent_moments(input, q, *, out_shape=None) -> int:
    """z = Qᵀx and the upper and lower half of its covariance, at every pixel."""
    return 2 * input[0] * _pixels(input) * (q[0] * q[1] + q[1] ** 2)


@register_flop_formula(_ops.latent_moments_backward)
def latent_moments_backward(input, q, mean, grad_mean, grad_covariance, needs, *, out_shape=None) -> int:
    """z and its product with the covariance's gradient, and the products that give dx and dQ."""
    recomputed = 0 if grad_covariance is None else q[0] * q[1] + q[1] ** 2
    products = (needs & 1) + (needs >> 1 & 1)
    return 2 * input[0] * _pixels(input) * (recomputed + products * q[0] * q[1])


@register_flop_formula(_ops.latent_map)
def latent_map(phi, mean, covariance, norm1, *others, out_shape=None) -> int:
    """Φ and the shift; Φ and the moments of what it multiplies, where the second norm takes statistics."""
    return 2 * phi[0] * (phi[1] ** 2 + _through_moments(phi[1], others))


@register_flop_formula(_ops.latent_map_backward)
def latent_map_backward(
    grad_mapped, grad_shift, phi, mean, covariance, norm1, *others, out_shape=None
) -> int:
    """The sums over Φ' that a scale, a shift and a second scale get; and back through the moments."""
    latent, needs = phi[1], others[-1]
    products = 3 * latent**2 + _through_moments(latent, others)
    if _through_moments(latent, others):
        products += 2 * latent**2 + (latent**3 if needs & 4 else 0)
    return 2 * phi[0] * products


def _through_moments(latent: int, others) -> int:
    """Multiply-adds of Φ mean and diag(Φ covariance Φᵀ); ``others`` are the arguments behind norm1."""
    return latent**2 + latent**3 if others[6] in (BATCH, GROUPS) else 0


@register_flop_formula(_ops.branch)
def branch(
    sums,
    scale,
    squeeze,
    squeeze_bias,
    gate,
    gate_bias,
    expand,
    expand_bias,
    phi,
    *others,
    out_shape=None,
) -> int:
    """The fully connected layers."""
    return 2 * sums[0] * _numbers(squeeze, gate, expand, phi)


@register_flop_formula(_ops.branch_backward)
def branch_backward(
    d_lam,
    d_phi,
    lam,
    sums,
    scale,
    squeeze,
    squeeze_bias,
    gate,
    gate_bias,
    expand,
    phi,
    gate_code,
    lam_code,
    needs,
    *,
    out_shape=None,
) -> int:
    """The hidden units again, the gradient of each layer's input, and of the weights that are asked for."""
    behind = _numbers(gate, expand, phi) + _numbers(squeeze) * (needs & 1)
    asked = (shape for i, shape in ((1, squeeze), (3, gate), (5, expand), (7, phi)) if needs >> i & 1)
    return 2 * sums[0] * (_numbers(squeeze, gate) + behind + _numbers(*asked))


@register_flop_formula(_ops.released_layer)
def released_layer(
    input,
    weight,
    bias,
    p,
    p_bias,
    q,
    q_bias,
    squeeze,
    squeeze_bias,
    gate,
    gate_bias,
    lam,
    lam_bias,
    phi,
    *others,
    out_shape=None,
) -> int:
    """Its branch, Φ and the shift, P of the shift, and the pointwise product."""
    latent, pixels = q[0], _pixels(input)
    branch = _numbers(squeeze, gate, lam, phi) + latent**2 + weight[0] * latent
    dynamic = madds.pointwise_residual(weight[1], weight[0], latent, 1, pixels)
    return 2 * input[0] * (branch + weight[0] * weight[1] * pixels + dynamic)


@register_flop_formula([_ops.batch_norm_act, _ops.batch_norm_act_backward])
def batch_norm_act(*args, out_shape=None) -> int:
    """Nothing: torch counts no norm and no activation."""
    return 0


def _numbers(*shapes) -> int:
    return sum(math.prod(shape) for shape in shapes if shape is not None)
