# SPDX-License-Identifier: BSD-3-Clause
"""Every form of dynamic convolution decomposition in plain PyTorch: the definition of right.

The same signatures as the fused operators (without packed weights), any floating-point or complex dtype, any
device, differentiable any number of times. All of it runs factored, ``y = λ⊙(W0 * x) + P Φ Qᵀ x``: no
per-sample weight (N×Co×Ci) is formed, except by :func:`dcd_weight`, whose purpose that is. Equations are
those of "Revisiting Dynamic Convolution via Matrix Decomposition" (ICLR 2021).

In half precision lam, phi and bias may be float32: the products with them are then float32 and only the
result is rounded. Under autocast the tensors are converted as the fused operators' autocast rule does it
(input, weight, p, q, r and residual to the autocast dtype; lam, phi and bias stay).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, checks, geometry
from .geometry import Geometry

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def dcd_conv1d(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Plain PyTorch for :func:`dcd_kernels.dcd_conv1d`: same arguments, shapes, dtypes and errors."""
    plan = checks.conv(
        1, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )
    return conv(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, activation)


def dcd_conv2d(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Plain PyTorch for :func:`dcd_kernels.dcd_conv2d`: same arguments, shapes, dtypes and errors."""
    plan = checks.conv(
        2, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )
    return conv(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, activation)


def dcd_conv3d(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Plain PyTorch for :func:`dcd_kernels.dcd_conv3d`: same arguments, shapes, dtypes and errors."""
    plan = checks.conv(
        3, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
    )
    return conv(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, activation)


def dcd_linear(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    *,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Plain PyTorch for :func:`dcd_kernels.dcd_linear`: same arguments, shapes, dtypes and errors."""
    checks.linear("dcd_linear", input, weight, p, phi, q, lam, bias, residual, activation)
    return linear(input, weight, p, phi, q, lam, bias, residual, activation)


def dcd_apply(
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    *,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride=1,
    offset=0,
    activation: str | None = None,
) -> Tensor:
    """Plain PyTorch for :func:`dcd_kernels.dcd_apply`: same arguments, shapes, dtypes and errors."""
    stride, offset = checks.apply(
        "dcd_apply", static, input, p, phi, q, lam, bias, residual, stride, offset, activation
    )
    return apply(static, input, p, phi, q, lam, bias, residual, stride, offset, activation)


def latent_moments(input: Tensor, q: Tensor, *, stride=1, offset=0) -> tuple[Tensor, Tensor]:
    """Plain PyTorch for :func:`dcd_kernels.latent_moments`: same arguments, shapes, dtypes and errors."""
    stride, offset = checks.moments("latent_moments", input, q, stride, offset)
    return moments(geometry.every(input, stride, offset), q)


def dcd_weight(
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    *,
    r: Tensor | None = None,
    lam: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    r"""The materialised per-sample weights, ``W_n = Λ_n W0 + P Φ_n Qᵀ`` (Eq. 6) or the other forms of it.

    N times the memory of the weights: for tests and for the naive baseline only. For a k×k weight with q and
    without r the residual stands at the centre tap (Fig. 4b); with r alone it is ``P Φ_n Rᵀ`` (Eq. 8); with
    both, ``Σ P[o,a] phi[n,c,a,b] Q[i,b] R[τ,c]`` (Eq. 9); with a 4-D phi it is block-diagonal (Eq. 7).

    Args:
        weight: (Co, Ci / groups, \*kernel); (Co, Ci) for linear.
        p, phi, q, r, lam: as for the operators; phi or lam must be given, as they carry the batch size.
        groups: of the convolution that these weights are for.

    Returns:
        (N, \*weight.shape), dtype of weight.

    Raises:
        TypeError, ValueError: as the operators; also when neither phi nor lam is given.
    """
    form = checks.weight("dcd_weight", weight, p, phi, q, r, lam, groups)
    n = (phi if phi is not None else lam).shape[0]
    kernel = tuple(weight.shape[2:])
    if lam is None:
        static = weight.expand(n, *weight.shape)
    else:
        static = weight * lam.reshape(*lam.shape, *(1 for _ in range(weight.dim() - 1)))
    if form == "static":
        return static.to(weight.dtype)
    co, ci = weight.shape[:2]
    wide = torch.promote_types(phi.dtype, p.dtype)
    p, phi = p.to(wide), phi.to(wide)
    if form == "depthwise":
        dynamic = (p @ phi @ r.to(wide).t()).reshape(n, co, 1, *kernel)
    elif form == "joint":
        slices = p @ phi @ q.to(wide).t()
        dynamic = torch.einsum("ncoi,tc->noit", slices, r.to(wide)).reshape(n, co, ci, *kernel)
    else:
        phi = phi if phi.dim() == 4 else phi.unsqueeze(1)
        blocks = phi.shape[1]
        q_blocks = q.to(wide).reshape(blocks, -1, q.shape[1])
        diagonal = p.reshape(blocks, -1, p.shape[1]) @ phi @ q_blocks.transpose(1, 2)
        # A group of the convolution holds `inner` blocks; its rows of the weight know only its own columns.
        inner = blocks // groups
        diagonal = diagonal.reshape(n, groups, inner, co // blocks, q_blocks.shape[1])
        dense = torch.diag_embed(diagonal.permute(0, 1, 3, 4, 2), dim1=2, dim2=4)
        dynamic = _at_centre(dense.reshape(n, co, ci), kernel)
    return (static + dynamic).to(weight.dtype)


def _at_centre(matrix: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """(N, Co, Ci) as (N, Co, Ci, *kernel), zero but for the centre tap."""
    for _ in kernel:
        matrix = matrix.unsqueeze(-1)
    margins = [k // 2 for k in reversed(kernel) for _ in range(2)]
    return F.pad(matrix, margins) if any(margins) else matrix


def conv(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, activation) -> Tensor:
    """A convolution whose arguments are checked; ``plan`` is what the check returned."""
    device = input.device.type
    if arguments.autocast_enabled(device):
        input, weight, p, q, r, residual = _autocast(device, input, weight, p, q, r, residual)
        with torch.autocast(device, enabled=False):
            return conv(plan, input, weight, p, phi, q, r, lam, bias, residual, groups, activation)
    where = None if plan is None else plan.geometry
    if where is None:
        static = _CONVOLUTIONS[input.dim() - 2](input, weight)
    else:
        static = convolve(input, weight, where, groups)
    if p is None:
        dynamic = None
    elif r is not None:
        latent = input if q is None else _project(input, q.t())
        latent = stencil(latent, r, where)
        if q is None:
            dynamic = _fuse_taps(latent, p, phi, input.shape[1])
        else:
            dynamic = _expand(_fuse(latent, joint_phi(phi)), p)
    else:
        if where is not None:
            input = geometry.sample(input, where.stride, where.centre, where.output)
        dynamic = _fuse_channels(input, p, phi, q)
    return _finish(static, dynamic, lam, bias, residual, activation, input.dtype)


def apply(static, input, p, phi, q, lam, bias, residual, stride, offset, activation) -> Tensor:
    """dcd_apply with checked arguments; stride and offset have one entry per spatial dimension."""
    device = static.device.type
    if arguments.autocast_enabled(device):
        static, input, p, q, residual = _autocast(device, static, input, p, q, residual)
        with torch.autocast(device, enabled=False):
            return apply(static, input, p, phi, q, lam, bias, residual, stride, offset, activation)
    dynamic = None
    if p is not None:
        input = geometry.sample(input, stride, offset, tuple(static.shape[2:]))
        dynamic = _expand(_fuse(input, phi), p) if q is None else _fuse_channels(input, p, phi, q)
    return _finish(static, dynamic, lam, bias, residual, activation, static.dtype)


def linear(input, weight, p, phi, q, lam, bias, residual, activation) -> Tensor:
    """dcd_linear with checked arguments."""
    device = input.device.type
    if arguments.autocast_enabled(device):
        input, weight, p, q, residual = _autocast(device, input, weight, p, q, residual)
        with torch.autocast(device, enabled=False):
            return linear(input, weight, p, phi, q, lam, bias, residual, activation)
    dynamic = None
    if p is not None:
        phi = phi if phi.dim() == 4 else phi.unsqueeze(1)
        blocks = phi.shape[1]
        rows = input.flatten(1, -2) if input.dim() > 2 else input.unsqueeze(1)
        rows = rows.unflatten(2, (blocks, -1))
        latent = torch.einsum("nmbi,bil->nbml", rows, q.unflatten(0, (blocks, -1)))
        fused = (latent.to(phi.dtype) @ phi.transpose(2, 3)).to(p.dtype)
        dynamic = torch.einsum("nbml,bol->nmbo", fused, p.unflatten(0, (blocks, -1)))
        dynamic = dynamic.reshape(*input.shape[:-1], p.shape[0])
    # _finish wants channels second, a view for any number of inner dimensions.
    static = F.linear(input, weight).movedim(-1, 1)
    dynamic = None if dynamic is None else dynamic.movedim(-1, 1)
    residual = None if residual is None else residual.movedim(-1, 1)
    return _finish(static, dynamic, lam, bias, residual, activation, input.dtype).movedim(1, -1)


def moments(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """latent_moments of every pixel of a checked call, in float32 or better throughout."""
    wide = torch.promote_types(input.dtype, torch.float32)
    with torch.autocast(input.device.type, enabled=False):
        latent = _project(input.to(wide), q.to(wide).t()).flatten(2)
        mean = latent.mean(2)
        centred = latent - mean.unsqueeze(2)
        return mean, centred @ centred.mT / latent.shape[2]


def convolve(input: Tensor, weight: Tensor, where: Geometry, groups: int = 1) -> Tensor:
    """Torch's own convolution of the same rank, without a bias."""
    convolution = _CONVOLUTIONS[len(where.kernel)]
    padded = geometry.pad_uneven(input, where)
    return convolution(padded, weight, None, where.stride, where.low, where.dilation, groups)


def stencil(latent: Tensor, r: Tensor, where: Geometry) -> Tensor:
    """Each channel of (N, L, *size) under each column of r: (N, L·L_k, *output), channel l·L_k + c.

    Channels go into the batch, as all of them see the same L_k kernels: one ordinary convolution whose weight
    gradient is r's, without a batch-dependent number of groups.
    """
    n, channels = latent.shape[:2]
    kernels = r.t().reshape(r.shape[1], 1, *where.kernel)
    out = convolve(latent.reshape(n * channels, 1, *latent.shape[2:]), kernels, where)
    return out.reshape(n, channels * r.shape[1], *out.shape[2:])


def joint_phi(phi: Tensor) -> Tensor:
    """Eq. 9's (N, L_k, L, L) as the (N, L, L·L_k) matrix that takes what :func:`stencil` makes of Qᵀx."""
    return phi.permute(0, 2, 3, 1).flatten(2)


def _project(input: Tensor, rows: Tensor, groups: int = 1) -> Tensor:
    """rows (Co, Ci / groups) times every pixel of (N, Ci, *size)."""
    spatial = input.dim() - 2
    if spatial > 3:
        return _project(input.flatten(2), rows, groups).unflatten(2, input.shape[2:])
    return _CONVOLUTIONS[spatial](input, rows.reshape(*rows.shape, *(1,) * spatial), groups=groups)


def _fuse(latent: Tensor, phi: Tensor) -> Tensor:
    """phi (N, I, J), or (N, B, I, J), times every pixel of (N, J or B·J, *size), in phi's precision."""
    flat = latent.flatten(2).to(phi.dtype)
    if phi.dim() == 4:
        flat = flat.unflatten(1, phi.shape[1:2] + phi.shape[3:])
        return (phi @ flat).flatten(1, 2).unflatten(2, latent.shape[2:])
    return (phi @ flat).unflatten(2, latent.shape[2:])


def _expand(latent: Tensor, p: Tensor, blocks: int = 1) -> Tensor:
    return _project(latent.to(p.dtype), p, blocks)


def _fuse_channels(input: Tensor, p: Tensor, phi: Tensor, q: Tensor) -> Tensor:
    """P Φ Qᵀ x (Eqs. 5 and 6), block by block for a 4-D phi (Eq. 7)."""
    if phi.dim() == 3:
        return _expand(_fuse(_project(input, q.t()), phi), p)
    blocks = phi.shape[1]
    rows = q.unflatten(0, (blocks, -1)).transpose(1, 2).flatten(0, 1)
    return _expand(_fuse(_project(input, rows, blocks), phi), p, blocks)


def _fuse_taps(latent: Tensor, p: Tensor, phi: Tensor, ci: int) -> Tensor:
    """P Φ Rᵀ (Eq. 8) on each input channel's L_k stencils; output channel o reads input channel o // m."""
    n = phi.shape[0]
    co = p.shape[0]
    mixed = (p.to(phi.dtype) @ phi).reshape(n, ci, co // ci, p.shape[1])
    stencils = latent.flatten(2).unflatten(1, (ci, -1)).to(mixed.dtype)
    return (mixed @ stencils).flatten(1, 2).unflatten(2, latent.shape[2:])


def _finish(static, dynamic, lam, bias, residual, activation, dtype) -> Tensor:
    """act(λ⊙static + dynamic + bias + residual) on (N, Co, *size)."""
    ones = (1,) * (static.dim() - 2)
    y = static if lam is None else static * lam.reshape(*lam.shape, *ones)
    if dynamic is not None:
        y = y + dynamic
    if bias is not None:
        y = y + (bias.reshape(1, -1, *ones) if bias.dim() == 1 else bias.reshape(*bias.shape, *ones))
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    return y.to(dtype)


def _autocast(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype in _AUTOCAST else t for t in tensors]
