# SPDX-License-Identifier: BSD-3-Clause
"""What the entry points do to operands before and after the kernels: checks, blocks, returned gradients.

The public functions have checked already; these checks are for whoever calls ``torch.ops.dcd_kernels``
directly, where a wrong shape would make a kernel read outside its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...arguments import ACTIVATIONS
from ...ops.fakes import empty_map

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAY_BE_SINGLE = ("phi", "lam", "bias", "grad")
_LIMIT = 2**31
_ROW_LIMIT = 2**31 - 256  # the last tile may reach behind the last pixel


def check_pointwise(
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int = 0,
) -> None:
    """Raises RuntimeError naming the argument, what it got and what it needs."""
    _check_activation(activation)
    _require(input.dim() >= 3, "input", input, "at least 3 dimensions")
    _require(
        weight.dim() == 2 and weight.shape[1] == input.shape[1], "weight", weight, f"(Co, {input.shape[1]})"
    )
    out_channels = weight.shape[0]
    if 0 in weight.shape:
        raise RuntimeError(f"input and weight must have at least one channel, got {tuple(weight.shape)}")
    _check_latent(input, out_channels, p, phi, q, False)
    _check_rest(input, out_channels, lam, bias, residual)
    _check_tensors(input, weight=weight, p=p, phi=phi, q=q, lam=lam, bias=bias, residual=residual)


def check_apply(
    static: Tensor,
    input: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    q: Tensor | None,
    lam: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int = 0,
) -> None:
    """Raises RuntimeError naming the argument, what it got and what it needs."""
    _check_activation(activation)
    _require(static.dim() >= 3, "static", static, "at least 3 dimensions")
    if p is not None or phi is not None or q is not None:
        wanted = (static.shape[0], "Ci", *static.shape[2:])
        fits = input.dim() == static.dim() and (input.shape[0], *input.shape[2:]) == (wanted[0], *wanted[2:])
        _require(fits, "input", input, wanted)
        _check_extent(input, static.shape[1])
        _check_latent(input, static.shape[1], p, phi, q, True)
    _check_rest(static, static.shape[1], lam, bias, residual)
    read = input if p is not None else None
    _check_tensors(static, input=read, p=p, phi=phi, q=q, lam=lam, bias=bias, residual=residual)


def check_projection(input: Tensor, q: Tensor) -> None:
    """Raises RuntimeError naming the argument, what it got and what it needs."""
    _require(input.dim() >= 3, "input", input, "at least 3 dimensions")
    _require(q.dim() == 2 and q.shape[0] == input.shape[1], "q", q, f"({input.shape[1]}, L)")
    _check_extent(input, input.shape[1])
    _check_tensors(input, q=q)


def check_like(name: str, tensor: Tensor, image: Tensor, channels: int) -> None:
    """Raises RuntimeError unless ``tensor`` is an image like ``image`` with that many channels."""
    wanted = (image.shape[0], channels, *image.shape[2:])
    _require(tuple(tensor.shape) == wanted, name, tensor, wanted)
    _check_tensors(image, **{name: tensor})


def _check_activation(activation: int) -> None:
    if activation not in ACTIVATIONS.values():
        raise RuntimeError(f"activation must be one of the codes {ACTIVATIONS}, got {activation}")


def _check_latent(image: Tensor, out_channels: int, p, phi, q, given_latent: bool) -> None:
    batch, in_channels = image.shape[:2]
    whole = (p is None) == (phi is None) and (q is None or p is not None)
    if not whole or (p is not None and q is None and not given_latent):
        raise RuntimeError("p, phi and q must be given together")
    if p is None:
        return
    _require(p.dim() == 2 and p.shape[0] == out_channels, "p", p, f"({out_channels}, L)")
    latent = p.shape[1]
    if q is None:
        _require(tuple(phi.shape) == (batch, latent, in_channels), "phi", phi, (batch, latent, in_channels))
        return
    _require(tuple(q.shape) == (in_channels, latent), "q", q, (in_channels, latent))
    blocks = blocks_of(phi)
    wanted = (batch, latent, latent) if phi.dim() == 3 else (batch, blocks, latent, latent)
    _require(tuple(phi.shape) == wanted, "phi", phi, wanted)
    if blocks < 1 or in_channels % blocks or out_channels % blocks:
        raise RuntimeError(
            f"phi's {blocks} blocks must divide {in_channels} input and {out_channels} output channels"
        )


def _check_rest(image: Tensor, out_channels: int, lam, bias, residual) -> None:
    batch = image.shape[0]
    if lam is not None:
        _require(tuple(lam.shape) == (batch, out_channels), "lam", lam, (batch, out_channels))
    if bias is not None:
        fits = tuple(bias.shape) in ((out_channels,), (batch, out_channels))
        _require(fits, "bias", bias, f"({out_channels},) or ({batch}, {out_channels})")
    if residual is not None:
        wanted = (batch, out_channels, *image.shape[2:])
        _require(tuple(residual.shape) == wanted, "residual", residual, wanted)
    _check_extent(image, out_channels)


def _check_extent(image: Tensor, out_channels: int) -> None:
    pixels = image.shape[2:].numel()
    if max(image.shape[1], out_channels) * pixels >= _LIMIT:
        raise RuntimeError(
            f"one sample must have fewer than 2**31 elements, got {tuple(image.shape)} and "
            f"{out_channels} output channels"
        )
    if image.shape[0] * pixels >= _ROW_LIMIT:
        raise RuntimeError(f"a batch must have fewer than 2**31 - 256 pixels, got {tuple(image.shape)}")


def _check_tensors(image: Tensor, **others: Tensor | None) -> None:
    if image.dtype not in _DTYPES:
        raise RuntimeError(f"the image must be float32, bfloat16 or float16, got {image.dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != image.device:
            raise RuntimeError(f"{name} must be on {image.device} like the image, got {tensor.device}")
        single = name in _MAY_BE_SINGLE and tensor.dtype == torch.float32
        if tensor.dtype != image.dtype and not single:
            raise RuntimeError(f"{name} must be {image.dtype} like the image, got {tensor.dtype}")


def _require(holds: bool, name: str, tensor: Tensor, wanted) -> None:
    if not holds:
        raise RuntimeError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")


def check_needs(needs: int, **factors: Tensor | None) -> None:
    """Raises RuntimeError if bit i of ``needs`` asks for the gradient of a factor that is absent."""
    for place, (name, factor) in enumerate(factors.items()):
        if needs >> place & 1 and factor is None:
            raise RuntimeError(
                f"needs must not ask for the gradient of {name}, which is not given, got {needs}"
            )


def blocks_of(phi: Tensor | None) -> int:
    """B of a block-diagonal phi (N, B, L, L), else 1."""
    return phi.shape[1] if phi is not None and phi.dim() == 4 else 1


def widen(p: Tensor | None, phi: Tensor | None, q: Tensor | None) -> tuple[Tensor | None, ...]:
    """Dense factors of B·L latent channels, contiguous as the kernels read them."""
    if p is None:
        return None, None, None
    blocks = blocks_of(phi)
    if blocks > 1:
        p, q = _columns(p, blocks), _columns(q, blocks)
        eye = torch.eye(blocks, dtype=phi.dtype, device=phi.device)
        # (N, B, L, L) -> (N, B, L, B, L), zero off the diagonal
        phi = (phi.unsqueeze(3) * eye[:, None, :, None]).flatten(3, 4).flatten(1, 2)
    elif phi.dim() == 4:
        phi = phi.squeeze(1)
    return p.contiguous(), phi.contiguous(), None if q is None else q.contiguous()


def _columns(factor: Tensor, blocks: int) -> Tensor:
    """(C, L) -> (C, B·L): the rows of block b keep only the columns of block b."""
    eye = torch.eye(blocks, dtype=factor.dtype, device=factor.device)
    rows = factor.unflatten(0, (blocks, -1))
    return (rows.unsqueeze(2) * eye[:, None, :, None]).flatten(2, 3).flatten(0, 1)


def narrow(gradients: Sequence[Tensor | None], blocks: int) -> list[Tensor | None]:
    """The way back of `widen` for the gradients of p, phi and q: the diagonal blocks."""
    if blocks == 1:
        return list(gradients)
    d_p, d_phi, d_q = gradients

    def rows(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        split = gradient.unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1))
        return split.diagonal(dim1=0, dim2=2).permute(2, 0, 1).flatten(0, 1)

    if d_phi is not None:
        split = d_phi.unflatten(2, (blocks, -1)).unflatten(1, (blocks, -1))
        d_phi = split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return [rows(d_p), d_phi, rows(d_q)]


def returned(
    found: Sequence[Tensor | None], factors: Sequence[Tensor | None], needs: int, images: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the shapes and dtypes of their factors; an empty tensor for what was not asked for.

    The first ``images`` factors' gradients were made in their final form.
    """
    gradients = []
    for index, (gradient, factor) in enumerate(zip(found, factors, strict=True)):
        if not needs >> index & 1:
            dtype = torch.float32 if factor is None else factor.dtype
            gradients.append(factors[0].new_empty((0,), dtype=dtype))
        elif index < images:
            gradients.append(gradient)
        else:
            gradients.append(gradient.reshape(factor.shape).to(factor.dtype).contiguous())
    return tuple(gradients)


def zeros(factors: Sequence[Tensor | None], needs: int, images: int) -> tuple[Tensor, ...]:
    """`returned` where there is no pixel or no sample: every sum is empty."""
    found: list[Tensor | None] = [None] * len(factors)
    for index, factor in enumerate(factors):
        if needs >> index & 1:
            image = index < images
            empty = (
                empty_map(factor, factor.shape[1], factor.shape[2:]) if image else torch.empty_like(factor)
            )
            found[index] = empty.zero_()
    return returned(found, factors, needs, images)
