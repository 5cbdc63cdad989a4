# SPDX-License-Identifier: BSD-3-Clause
"""Multiply-adds of the forms for one sample, and the parameters of a layer (paper, Section 3.4).

What the CPU kernels execute on one thread: the cheaper of the two orders for each layer. A piece of a
synthesised W_n stays in cache while all pixels of the sample pass it, so none is formed twice; with more
threads than samples, every share of the output channels forms its own PΦ. Not counted are bias, activation,
skip connection and, where it scales a finished output, λ. Kernels for GPUs may choose another order.
"""

from __future__ import annotations

import math


def synthesis_pays(in_channels: int, out_channels: int, latent: int, blocks: int, pixels: int) -> bool:
    """Whether a pointwise layer forms W_n, by the estimate of ``csrc/cpu/plan.h``, which single layers obey.

    Optimised networks form it where that saves a third (``csrc/cpu/kernels/network/dense.h``).
    """
    product = in_channels * out_channels
    estimate = product // blocks * latent + min(in_channels, out_channels) * latent**2 + product
    return latent > 0 and estimate < on_map(in_channels, out_channels, latent, blocks, pixels)


def synthesised(in_channels: int, out_channels: int, latent: int, blocks: int = 1) -> int:
    """PΦ, then (PΦ)Qᵀ within the blocks, without the sum with ΛW0: ``Co·Ci·L/B + Co·L²``."""
    return in_channels * out_channels // blocks * latent + out_channels * latent**2


def on_map(in_channels: int, out_channels: int, latent: int, blocks: int, pixels: int) -> int:
    """Qᵀx, Φ and P, one after the other at every pixel: ``(L·(Ci + Co) + B·L²)`` a pixel."""
    return pixels * (latent * (in_channels + out_channels) + blocks * latent**2)


def without_q(in_channels: int, out_channels: int, latent: int, pixels: int) -> int:
    """Φ of shape (L, Ci) on the input, which is the latent itself, then P."""
    return pixels * latent * (in_channels + out_channels)


def pointwise_residual(in_channels: int, out_channels: int, latent: int, blocks: int, pixels: int) -> int:
    """The dynamic residual of a pointwise or linear layer in the order that the kernels take.

    ``(L·(Ci + Co) + B·L²)·pixels``, or ``Co·Ci·L/B + Co·L² + Co·Ci`` whatever the pixels (the last for adding
    ΛW0), where the estimate says that this pays.
    """
    if synthesis_pays(in_channels, out_channels, latent, blocks, pixels):
        product = in_channels * out_channels
        return synthesised(in_channels, out_channels, latent, blocks) + product
    return on_map(in_channels, out_channels, latent, blocks, pixels)


def depthwise_weights(out_channels: int, taps: int, latent_kernel: int, lam: bool = True) -> int:
    """A depthwise layer's weights for one sample: ΦRᵀ, times P, and λW0 or none of it."""
    residual = latent_kernel**2 * taps + out_channels * taps * latent_kernel
    return residual + (out_channels * taps if lam else 0)


def joint_residual(
    in_channels: int,
    out_channels: int,
    latent: int,
    latent_kernel: int,
    taps: int,
    input_pixels: int,
    pixels: int,
) -> int:
    """Eq. 9: Qᵀx at every input pixel, ``L_k`` fixed stencils on each latent channel, then Φ and P."""
    stencils = pixels * latent * latent_kernel * taps
    fusion = without_q(latent * latent_kernel, out_channels, latent, pixels)
    return input_pixels * in_channels * latent + stencils + fusion


def pointwise_gradients(
    in_channels: int, out_channels: int, latent: int, blocks: int, pixels: int, needs: int
) -> int:
    """Backward of a pointwise layer; bit i of ``needs`` asks for the i-th of input, W0, P, Φ, Q, λ.

    d_x is the forward product transposed. With ``S = G xᵀ``, ``Co·Ci`` a pixel, follow d_W0 and d_λ, and for
    large maps the others too; on small ones these are taken from Qᵀx and PᵀG, ``L`` numbers a pixel.
    """
    wants_input, wants_weight, wants_p, wants_phi, wants_q, wants_lam = (needs >> bit & 1 for bit in range(6))
    product, square = in_channels * out_channels, out_channels * latent**2
    total = 0
    if wants_input:
        total += product * pixels + pointwise_residual(in_channels, out_channels, latent, blocks, pixels)
    wants_latent = latent > 0 and (wants_p or wants_phi or wants_q)
    from_outer = wants_latent and product // blocks < pixels * (in_channels + out_channels)
    if wants_weight or wants_lam or from_outer:
        total += product * (pixels + wants_weight + wants_lam)
    if from_outer:
        narrow = product // blocks * latent
        if wants_p or wants_phi:
            total += narrow + square * (wants_p + wants_phi)
        if wants_q:
            total += square + narrow
    elif wants_latent:
        total += latent_gradients(
            in_channels, out_channels, latent, blocks, pixels, wants_p, wants_phi, wants_q
        )
    return total


def latent_gradients(
    in_channels: int,
    out_channels: int,
    latent: int,
    blocks: int,
    pixels: int,
    wants_p: int,
    wants_phi: int,
    wants_q: int,
) -> int:
    """d_P, d_Φ, d_Q from ``T = Qᵀx``, ``ΦT`` and ``H = PᵀG``, ``ΦᵀH`` at every pixel."""
    mixing = blocks * latent**2
    a_pixel = 0
    if wants_p or wants_phi:
        a_pixel += latent * in_channels + mixing
    if wants_q or wants_phi:
        a_pixel += latent * out_channels + mixing
    a_pixel += wants_p * latent * out_channels + wants_phi * mixing + wants_q * latent * in_channels
    return pixels * a_pixel


def apply_gradients(
    in_channels: int, out_channels: int, latent: int, blocks: int, pixels: int, needs: int, has_q: bool
) -> int:
    """Backward of ``apply``; bit i of ``needs`` asks for the i-th of static, input, P, Φ, Q, λ.

    d_static scales G by λ and is not counted; d_λ sums ``G·static``.
    """
    _, wants_input, wants_p, wants_phi, wants_q, wants_lam = (needs >> bit & 1 for bit in range(6))
    total = wants_lam * out_channels * pixels
    if latent == 0:
        return total
    if has_q:
        if wants_input:
            total += on_map(in_channels, out_channels, latent, blocks, pixels)
        return total + latent_gradients(
            in_channels, out_channels, latent, blocks, pixels, wants_p, wants_phi, wants_q
        )
    # without Q: Φx for d_P (and beside d_Φ), PᵀG for d_Φ, and their products with G and x
    wide, narrow = latent * in_channels, latent * out_channels
    if wants_input:
        total += without_q(in_channels, out_channels, latent, pixels)
    total += pixels * ((wants_p or wants_phi) * wide + wants_p * narrow + wants_phi * (narrow + wide))
    return total


def depthwise_gradients(
    out_channels: int, taps: int, latent_kernel: int, pixels: int, needs: int, lam: bool
) -> int:
    """Backward of a depthwise layer; bit i of ``needs`` asks for the i-th of input, W0, P, Φ, R, λ.

    d_x is a convolution with the sample's weights; everything else follows from the sums S (Co, taps) over
    the output's pixels, once a sample.
    """
    wants_input, wants_weight, wants_p, wants_phi, wants_r, wants_lam = (needs >> bit & 1 for bit in range(6))
    all_taps = out_channels * taps
    total = 0
    if wants_input:
        total += all_taps * pixels + depthwise_weights(out_channels, taps, latent_kernel, lam)
    if needs >> 1:
        total += all_taps * (pixels + wants_weight + wants_lam)
        narrow, square = all_taps * latent_kernel, out_channels * latent_kernel**2
        if wants_p or wants_phi:
            total += narrow + square * (wants_p + wants_phi)
        if wants_r:
            total += square + narrow
    return total


def dcd_parameters(channels: int, latent: int, reduction: int) -> float:
    """Parameters of a DCD layer with ``channels`` inputs and outputs: ``C² + 2CL + (2C + L²)·C/r``.

    W0, then P and Q, then the branch: C·C/r into the squeeze, (C + L²)·C/r out of it. Paper, Section 3.4.
    """
    return channels**2 + 2 * channels * latent + (2 * channels + latent**2) * channels / reduction


def dcd_parameter_bound(channels: int, reduction: int) -> float:
    """What :func:`dcd_parameters` stays below for ``L² < C``: ``(1 + 3/r)·C² + 2C√C``. Paper, Section 3.4."""
    return (1 + 3 / reduction) * channels**2 + 2 * channels * math.sqrt(channels)


def kernels_parameters(channels: int, kernels: int) -> int:
    """``K·C²``, a layer that mixes K static kernels (DY-Conv, CondConv), without its branch. Section 3.4."""
    return kernels * channels**2
