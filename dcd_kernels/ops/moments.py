# SPDX-License-Identifier: BSD-3-Clause
"""The op latent_moments: fake implementation, gradient, and plain PyTorch where there is no kernel.

With z = Qᵀx, δ the gradient of the mean and Δ of the covariance, dz = [δ + (Δ + Δᵀ)(z − mean)]/pixels: again
a low-rank operator on x, dx = Q dz and dQ = Σ x dzᵀ.
"""

import torch
from torch import Tensor

from .. import reference

OP = torch.ops.dcd_kernels.latent_moments.default


def _fake(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, torch.float32)
    batch, latent = input.shape[0], q.shape[1]
    return input.new_empty((batch, latent), dtype=dtype), input.new_empty(
        (batch, latent, latent), dtype=dtype
    )


def _setup_context(ctx, inputs, outputs):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, outputs[0])


def _backward(ctx, grad_mean, grad_covariance):
    input, q, mean = ctx.saved_tensors
    if grad_mean is None and grad_covariance is None:
        return None, None
    wide = mean.dtype
    pixels = input.shape[2:].numel()
    x, wide_q = input.flatten(2).to(wide), q.to(wide)
    d_z = x.new_zeros(()) if grad_mean is None else grad_mean.unsqueeze(2)
    if grad_covariance is not None:
        centred = wide_q.t() @ x - mean.unsqueeze(2)
        d_z = d_z + (grad_covariance + grad_covariance.mT) @ centred
    d_z = (d_z / pixels).expand(-1, -1, pixels)
    d_input = d_q = None
    if ctx.needs_input_grad[1]:
        d_input = (wide_q @ d_z).to(input.dtype).reshape(input.shape)
    if ctx.needs_input_grad[2]:
        d_q = (x @ d_z.mT).sum(0).to(q.dtype)
    return d_input, d_q


FORMULA = (_setup_context, _backward)


def register(library: torch.library.Library) -> None:
    """Registers the fake implementation, and torch's own operations for the CPU."""
    torch.library.register_fake("dcd_kernels::latent_moments", _fake, lib=library)
    library.impl(OP, reference.moments, "CPU")
