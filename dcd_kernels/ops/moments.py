# SPDX-License-Identifier: BSD-3-Clause
"""The ops latent_moments and latent_moments_backward: fake implementations and gradient.

With z = Qᵀx, δ the gradient of the mean and Δ of the covariance, dz = [δ + (Δ + Δᵀ)(z − mean)]/pixels: again
a low-rank operator on x, dx = Q dz and dQ = Σ x dzᵀ.
"""

import torch
from torch import Tensor

from .fakes import empty_map, is_channels_last

OP = torch.ops.dcd_kernels.latent_moments.default
BACKWARD = torch.ops.dcd_kernels.latent_moments_backward.default


def _fake(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    batch, latent = input.shape[0], q.shape[1]
    return input.new_empty((batch, latent), dtype=dtype), input.new_empty(
        (batch, latent, latent), dtype=dtype
    )


def _fake_backward(input, q, mean, grad_mean, grad_covariance, needs: int) -> tuple[Tensor, Tensor]:
    d_input = empty_map(input, input.shape[1], input.shape[2:]) if needs & 1 else input.new_empty((0,))
    return d_input, q.new_empty(q.shape if needs & 2 else (0,))


def _setup_context(ctx, inputs, outputs):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, outputs[0])


def _backward(ctx, grad_mean, grad_covariance):
    if grad_mean is None and grad_covariance is None:
        return None, None
    wanted = ctx.needs_input_grad[1:3]
    needs = wanted[0] + 2 * wanted[1]
    # The op has no derivative of its own.
    gradients = _composed if torch.is_grad_enabled() else BACKWARD
    found = gradients(*ctx.saved_tensors, grad_mean, grad_covariance, needs)
    return tuple(gradient if asked else None for gradient, asked in zip(found, wanted, strict=True))


def _composed(
    input: Tensor,
    q: Tensor,
    mean: Tensor,
    grad_mean: Tensor | None,
    grad_covariance: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """latent_moments_backward in differentiable operations of torch."""
    wide = mean.dtype
    pixels = input.shape[2:].numel()
    x, wide_q = input.flatten(2).to(wide), q.to(wide)
    d_z = x.new_zeros(()) if grad_mean is None else grad_mean.unsqueeze(2)
    if grad_covariance is not None:
        centred = wide_q.t() @ x - mean.unsqueeze(2)
        d_z = d_z + (grad_covariance + grad_covariance.mT) @ centred
    d_z = (d_z / pixels).expand(-1, -1, pixels)
    d_input, d_q = input.new_empty((0,)), q.new_empty((0,))
    if needs & 1:
        # laid out like the input
        d_x = (d_z.mT @ wide_q.t()).mT if is_channels_last(input) else wide_q @ d_z
        d_input = d_x.to(input.dtype).unflatten(2, input.shape[2:])
    if needs & 2:
        d_q = (x @ d_z.mT).sum(0).to(q.dtype)
    return d_input, d_q


FORMULA = (_setup_context, _backward)


def register(library: torch.library.Library) -> None:
    """Registers the fake implementations, and torch's own operations where backward has no kernel."""
    torch.library.register_fake("dcd_kernels::latent_moments", _fake, lib=library)
    torch.library.register_fake("dcd_kernels::latent_moments_backward", _fake_backward, lib=library)
    library.impl(BACKWARD, _composed, "CUDA")
