# SPDX-License-Identifier: BSD-3-Clause
"""Weights packed once for many calls: `pack_weight`, and what a public operator does with the result."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments, checks, extension, geometry
from .backends import selection

PANEL = 16  # lanes of a panel, csrc/cpu/packed.h
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PackedWeight:
    """W0, P and Q of a pointwise layer as the CPU kernels read them, made by :func:`pack_weight`.

    Given as ``weight`` to ``dcd_conv1d``, ``dcd_conv2d``, ``dcd_conv3d`` or ``dcd_linear``, with p and q left
    out. It is a copy: later edits of the tensors that it was made from do not reach it. Immutable: any
    number of threads may share one. It can be pickled, and holds on every machine.

    Attributes:
        in_channels, out_channels: of W0.
        latent_channels: L; 0 for W0 alone.
        dtype: of the tensors it was made from. The numbers are kept in float32, in float64 for float64.
    """

    def __init__(self, data: Tensor, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.data = data
        self.in_channels, self.out_channels, self.latent_channels = sizes
        self.dtype = dtype

    def unpack(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight (Co, Ci), p (Co, L), q (Ci, L)) in ``dtype``; p and q are None without a latent."""
        weight, p, q = unpack(self.data, self.in_channels, self.out_channels, self.latent_channels)
        if self.data.dtype != self.dtype:
            weight, p, q = (None if t is None else t.to(self.dtype) for t in (weight, p, q))
        return weight, p, q

    def __reduce__(self):
        return pack_weight, self.unpack()

    def __repr__(self) -> str:
        return (
            f"PackedWeight({self.in_channels} -> {self.out_channels}, "
            f"latent_channels={self.latent_channels}, {self.dtype})"
        )


def pack_weight(weight: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> PackedWeight:
    """Pack the static weight and the factors of a pointwise layer for calls without a gradient to them.

    The call that is given the result saves the reordering of the weights, which at small images costs as much
    as a tenth of the call. The layers in :mod:`dcd_kernels.nn` do this by themselves.

    Args:
        weight: W0, (Co, Ci) or (Co, Ci, 1), (Co, Ci, 1, 1), (Co, Ci, 1, 1, 1), on the CPU.
        p, q: (Co, L) and (Ci, L) of a dense residual (Eq. 6); both or none.

    Returns:
        A :class:`PackedWeight`: a copy, through which no gradient flows to weight, p and q.

    Raises:
        TypeError: not tensors, a dtype other than float32, float64, bfloat16 and float16, or different ones.
        ValueError: shape, device, p without q.
        RuntimeError: the compiled extension is not available.
    """
    caller = "pack_weight"
    arguments.check_tensors(caller, weight=weight, p=p, q=q)
    if not extension.LOADED:
        raise RuntimeError(f"{caller}: {extension.REASON}")
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"{caller}: weight must be one of float32, float64, bfloat16, float16, got {weight.dtype}"
        )
    if weight.dim() < 2 or 0 in weight.shape or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(
            f"{caller}: weight must be (out_channels, in_channels) or that with a kernel of ones, got "
            f"{geometry.show(weight.shape)}"
        )
    if not weight.is_cpu:
        raise ValueError(f"{caller}: weight must be on the CPU, got {weight.device}")
    if (p is None) != (q is None):
        missing, given = ("p", "q") if p is None else ("q", "p")
        raise ValueError(f"{caller}: {missing} is missing, got {given}; a dynamic residual needs both")
    out_channels, in_channels = weight.shape[:2]
    latent = 0
    if p is not None:
        for name, factor, channels in (("p", p, out_channels), ("q", q, in_channels)):
            arguments.check_kind(caller, name, factor, weight.dtype, weight.device)
            wanted = p.shape[1] if p.dim() == 2 and p.shape[1] > 0 else "L"
            if factor.shape != (channels, wanted):
                arguments.fail_shape(caller, name, factor, (channels, wanted), "(channels, L)")
        latent = p.shape[1]
    with torch.no_grad():
        data = torch.ops.dcd_kernels.pack_pointwise(weight.flatten(1), p, q)
    return PackedWeight(data, (in_channels, out_channels, latent), weight.dtype)


def unpack(
    data: Tensor, in_channels: int, out_channels: int, latent: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tensors that `pack_pointwise` made ``data`` from, in its dtype."""
    panels = -(-out_channels // PANEL)

    def channels_first(start: int, columns: int) -> Tensor:
        part = data[start : start + panels * columns * PANEL].view(panels, columns, PANEL)
        return part.transpose(1, 2).reshape(panels * PANEL, columns)[:out_channels]

    weight = channels_first(0, in_channels)
    if latent == 0:
        return weight, None, None
    start = panels * in_channels * PANEL
    p = channels_first(start, latent)
    q = data[start + panels * latent * PANEL :].view(in_channels, -1)[:, :latent]
    return weight, p, q.contiguous()


def runs_packed(input: Tensor) -> bool:
    """Whether ``input`` goes to the kernels that read packed weights, as it is."""
    return (
        input.is_cpu
        and selection.current() in ("auto", "cpu")
        and not selection.is_observed()
        and not torch.is_autocast_enabled("cpu")
    )


def check(caller, input, packed, batch_first, p, phi, q, lam, bias, activation) -> None:
    """Check what a call with packed weights shares with every other; ``batch_first`` is (N, Ci).

    Raises:
        TypeError: an argument that is not a strided tensor, a dtype that does not match.
        ValueError: shape, device, p or q beside packed weights, a missing or surplus phi, activation.
    """
    n, ci = batch_first
    if p is not None or q is not None:
        raise ValueError(
            f"{caller}: {'p' if p is not None else 'q'} must be left out beside a PackedWeight, it is in it"
        )
    dtype, device = input.dtype, input.device
    if ci != packed.in_channels:
        raise ValueError(
            f"{caller}: input must have the {packed.in_channels} channels of {packed}, got "
            f"{geometry.show(input.shape)}"
        )
    if dtype is not packed.dtype or not input.is_cpu or input.layout is not torch.strided:
        arguments.check_kind(caller, "input", input, packed.dtype, packed.data.device, beside="PackedWeight")
    latent = packed.latent_channels
    if (phi is None) != (latent == 0):
        raise ValueError(
            f"{caller}: phi must be {'left out' if latent == 0 else 'given'} beside {packed}, got "
            f"{'none' if phi is None else geometry.show(phi.shape)}"
        )
    if phi is not None:
        if phi.dtype is not dtype or phi.device != device or phi.layout is not torch.strided:
            arguments.check_kind(caller, "phi", phi, dtype, device, True)
        if phi.shape != (n, latent, latent):
            arguments.fail_shape(caller, "phi", phi, (n, latent, latent), f"(batch, L, L), L of {packed}")
    if lam is not None:
        arguments.check_lam(caller, lam, n, packed.out_channels, dtype, device)
    if bias is not None:
        arguments.check_bias(caller, bias, n, packed.out_channels, dtype, device)
    if activation is not None:
        arguments.check_activation(caller, activation, dtype)


def check_conv(
    spatial, input, packed, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
) -> checks.Plan | None:
    """Check a convolution with packed weights, as `checks.conv`.

    Raises:
        TypeError, ValueError: as :func:`check`; rank, r or groups beside packed weights, geometry.
    """
    caller = f"dcd_conv{spatial}d"
    arguments.check_tensors(caller, input=input, phi=phi, lam=lam, bias=bias, residual=residual)
    if input.dim() != spatial + 2:
        raise ValueError(
            f"{caller}: input must be batched, (batch, in_channels, *spatial) with {spatial + 2} dimensions, "
            f"got {geometry.show(input.shape)}"
        )
    if r is not None or groups != 1:
        raise ValueError(
            f"{caller}: r must be None and groups 1 beside a PackedWeight, a dense pointwise layer; got "
            f"{'no r' if r is None else f'r of type {type(r).__name__}'} and groups={groups!r}"
        )
    check(caller, input, packed, input.shape[:2], p, phi, q, lam, bias, activation)
    if input.numel() == 0:
        arguments.check_extent(caller, input, packed.data, 1)
    ones, zeros = (1,) * spatial, (0,) * spatial
    where = None
    if stride not in (1, ones) or padding not in (0, zeros) or dilation not in (1, ones):
        where = geometry.resolve(caller, input.shape[2:], ones, stride, padding, dilation)
    if residual is not None:
        size = input.shape[2:] if where is None else where.output
        wanted = (input.shape[0], packed.out_channels, *size)
        arguments.check_residual(caller, residual, wanted, input.dtype, input.device)
    return None if where is None else checks.Plan("pointwise", where)


def check_linear(input, packed, p, phi, q, lam, bias, residual, activation) -> None:
    """Check a linear call with packed weights.

    Raises:
        TypeError, ValueError: as :func:`check`; an unbatched input.
    """
    caller = "dcd_linear"
    arguments.check_tensors(caller, input=input, phi=phi, lam=lam, bias=bias, residual=residual)
    if input.dim() < 2:
        raise ValueError(
            f"{caller}: input must be batched, (batch, …, in_channels) with at least 2 dimensions, got "
            f"{geometry.show(input.shape)}"
        )
    check(caller, input, packed, (input.shape[0], input.shape[-1]), p, phi, q, lam, bias, activation)
    if residual is not None:
        wanted = (*input.shape[:-1], packed.out_channels)
        arguments.check_residual(caller, residual, wanted, input.dtype, input.device)
