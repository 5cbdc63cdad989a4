# SPDX-License-Identifier: BSD-3-Clause
"""Argument checks: one function per public operator, each raising an error that names the argument.

A layer may take 50 µs, so the checks of a valid call are bare comparisons of shapes; every message is built
in a function of its own, reached only on failure. A message says which argument, what it got and what it
needs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import geometry
from .arguments import (
    DTYPES,
    STRIDED,
    check_activation,
    check_bias,
    check_extent,
    check_groups,
    check_kind,
    check_lam,
    check_residual,
    check_tensors,
    fail_factors,
    fail_p,
    fail_phi,
    fail_rank,
    fail_shape,
)
from .geometry import show

_CALLERS = {1: "dcd_conv1d", 2: "dcd_conv2d", 3: "dcd_conv3d"}
_ONES = {1: (1,), 2: (1, 1), 3: (1, 1, 1)}
_ZEROS = {1: (0,), 2: (0, 0), 3: (0, 0, 0)}


class Plan(NamedTuple):
    """What a valid call needs besides its tensors: the form of the decomposition and the geometry.

    ``form``: 'pointwise' (Eqs. 5 to 7 on a 1×1 kernel), 'depthwise' (Eq. 8), 'joint' (Eq. 9), or 'centre' (a
    static k×k or grouped convolution with a 1×1 residual at its centre tap, Fig. 4b).
    """

    form: str
    geometry: geometry.Geometry


def conv(
    spatial, input, weight, p, phi, q, r, lam, bias, residual, stride, padding, dilation, groups, activation
) -> Plan | None:
    """Check a convolution; ``None`` is the commonest plan, pointwise with unit stride and no padding.

    Raises:
        TypeError: an argument that is not a strided tensor, a dtype that is unsupported or does not match.
        ValueError: rank, shape, device, groups, blocks, geometry, a missing or surplus factor, activation.
    """
    caller = _CALLERS[spatial]
    try:
        x = input.shape
        w = weight.shape
        if len(x) != spatial + 2 or len(w) != spatial + 2:
            fail_rank(caller, spatial, input, weight)
        n, ci = x[0], x[1]
        co = w[0]
        dtype = input.dtype
        device = input.device
        if (
            dtype not in DTYPES
            or weight.dtype is not dtype
            or weight.device != device
            or input.layout is not STRIDED
            or weight.layout is not STRIDED
        ):
            check_kind(caller, "input", input, dtype, device)
            check_kind(caller, "weight", weight, dtype, device)
        if input.numel() == 0 or weight.numel() == 0:
            check_extent(caller, input, weight, 1)
        if groups != 1:
            check_groups(caller, groups, ci, co)
        if w[1] * groups != ci:
            wanted = (co, ci // groups, *w[2:])
            fail_shape(caller, "weight", weight, wanted, "(out_channels, in_channels / groups, *kernel)")
        pointwise = r is None and groups == 1 and weight.numel() == co * ci
        if p is not None and phi is not None and pointwise:
            _factors(caller, p, phi, q, n, co, ci, dtype, device)
        elif p is not None or phi is not None or q is not None or r is not None:
            _other_factors(caller, p, phi, q, r, n, co, ci, w[2:], groups, dtype, device)
        if lam is not None:
            check_lam(caller, lam, n, co, dtype, device)
        if bias is not None:
            check_bias(caller, bias, n, co, dtype, device)
        if activation is not None:
            check_activation(caller, activation, dtype)
        if (
            pointwise
            and (stride == 1 or stride == _ONES[spatial])
            and (padding == 0 or padding == _ZEROS[spatial])
            and (dilation == 1 or dilation == _ONES[spatial])
        ):
            if residual is not None:
                check_residual(caller, residual, (n, co, *x[2:]), dtype, device)
            return None
        where = geometry.resolve(caller, x[2:], w[2:], stride, padding, dilation)
        if residual is not None:
            check_residual(caller, residual, (n, co, *where.output), dtype, device)
    except AttributeError:
        check_tensors(caller, input=input, weight=weight, p=p, phi=phi, q=q, r=r, lam=lam, bias=bias)
        check_tensors(caller, residual=residual)
        raise
    if pointwise:
        return Plan("pointwise", where)
    if r is not None:
        return Plan("depthwise" if q is None else "joint", where)
    return Plan("depthwise" if p is None and groups == ci else "centre", where)


def linear(caller, input, weight, p, phi, q, lam, bias, residual, activation) -> None:
    """Check a linear call: input (N, …, Ci), weight (Co, Ci).

    Raises:
        TypeError: an argument that is not a strided tensor, a dtype that is unsupported or does not match.
        ValueError: rank, shape, device, blocks, a missing factor, activation.
    """
    try:
        x = input.shape
        w = weight.shape
        if len(x) < 2:
            raise ValueError(
                f"{caller}: input must be batched, (batch, …, in_channels) with at least 2 dimensions, got "
                f"{show(x)}; unsqueeze(0) makes a batch of one"
            )
        if len(w) != 2:
            raise ValueError(f"{caller}: weight must be (out_channels, in_channels), got {show(w)}")
        n, ci, co = x[0], x[-1], w[0]
        dtype, device = input.dtype, input.device
        if (
            dtype not in DTYPES
            or weight.dtype is not dtype
            or weight.device != device
            or input.layout is not STRIDED
            or weight.layout is not STRIDED
        ):
            check_kind(caller, "input", input, dtype, device)
            check_kind(caller, "weight", weight, dtype, device)
        if w[1] != ci:
            fail_shape(caller, "weight", weight, (co, ci), "(out_channels, in_channels)")
        if input.numel() == 0 or weight.numel() == 0:
            check_extent(caller, input, weight, len(x) - 1)
        if p is not None or phi is not None or q is not None:
            _factors(caller, p, phi, q, n, co, ci, dtype, device)
        if lam is not None:
            check_lam(caller, lam, n, co, dtype, device)
        if bias is not None:
            check_bias(caller, bias, n, co, dtype, device)
        if activation is not None:
            check_activation(caller, activation, dtype)
        if residual is not None:
            check_residual(caller, residual, (*x[:-1], co), dtype, device)
    except AttributeError:
        check_tensors(
            caller, input=input, weight=weight, p=p, phi=phi, q=q, lam=lam, bias=bias, residual=residual
        )
        raise


def apply(caller, static, input, p, phi, q, lam, bias, residual, stride, offset, activation):
    """Check a call on a ready static output; -> (stride, offset), one entry per spatial dimension.

    Raises:
        TypeError: an argument that is not a strided tensor, a dtype that is unsupported or does not match.
        ValueError: rank, shape, device, blocks, a missing factor, stride or offset, activation.
    """
    try:
        y, x = static.shape, input.shape
        if len(y) < 3:
            raise ValueError(
                f"{caller}: static must be (batch, out_channels, *spatial) with at least 3 dimensions, got "
                f"{show(y)}"
            )
        if len(x) != len(y) or x[0] != y[0]:
            raise ValueError(
                f"{caller}: input must have the batch size and number of dimensions of static {show(y)}, "
                f"got {show(x)}"
            )
        n, co, ci = y[0], y[1], x[1]
        dtype, device = static.dtype, static.device
        if (
            dtype not in DTYPES
            or input.dtype is not dtype
            or input.device != device
            or static.layout is not STRIDED
            or input.layout is not STRIDED
        ):
            check_kind(caller, "static", static, dtype, device)
            check_kind(caller, "input", input, dtype, device)
        if static.numel() == 0 or input.numel() == 0:
            for argument, shape in (("static", y), ("input", x)):
                if 0 in shape[1:]:
                    raise ValueError(
                        f"{caller}: only the batch of {argument} may be empty, got {show(shape)}"
                    )
        if p is not None and phi is not None and q is None:
            _latent_factors(caller, p, phi, n, co, ci, dtype, device)
        elif p is not None or phi is not None or q is not None:
            _factors(caller, p, phi, q, n, co, ci, dtype, device)
        if lam is not None:
            check_lam(caller, lam, n, co, dtype, device)
        if bias is not None:
            check_bias(caller, bias, n, co, dtype, device)
        if activation is not None:
            check_activation(caller, activation, dtype)
        if residual is not None:
            check_residual(caller, residual, y, dtype, device)
    except AttributeError:
        check_tensors(
            caller, static=static, input=input, p=p, phi=phi, q=q, lam=lam, bias=bias, residual=residual
        )
        raise
    spatial = len(y) - 2
    return (
        geometry.per_dimension(caller, "stride", stride, spatial, 1),
        geometry.per_dimension(caller, "offset", offset, spatial, None),
    )


def moments(caller, input, q, stride, offset):
    """Check a call for the moments of Qᵀx; -> (stride, offset), one entry per spatial dimension.

    Raises:
        TypeError: an argument that is not a strided tensor, a dtype that is unsupported or does not match.
        ValueError: rank, shape, device, stride or offset.
    """
    check_tensors(caller, input=input)
    if not isinstance(q, Tensor):
        raise TypeError(f"{caller}: q must be a torch.Tensor, got {type(q).__name__}")
    if input.dim() < 3:
        raise ValueError(
            f"{caller}: input must be (batch, in_channels, *spatial) with at least 3 dimensions, got "
            f"{show(input.shape)}"
        )
    check_kind(caller, "input", input, input.dtype, input.device)
    check_kind(caller, "q", q, input.dtype, input.device)
    if input.is_complex():
        raise TypeError(f"{caller}: input must be real, got {input.dtype}")
    if q.dim() != 2 or q.shape[0] != input.shape[1] or q.shape[1] == 0:
        fail_shape(caller, "q", q, (input.shape[1], "L"), "in_channels, latent_channels")
    if 0 in input.shape[1:]:
        raise ValueError(f"{caller}: only the batch of input may be empty, got shape {show(input.shape)}")
    spatial = input.dim() - 2
    steps = geometry.per_dimension(caller, "stride", stride, spatial, 1)
    starts = geometry.per_dimension(caller, "offset", offset, spatial, 0)
    for start, size in zip(starts, input.shape[2:], strict=True):
        if start >= size:
            raise ValueError(f"{caller}: offset must be inside {show(input.shape[2:])}, got {show(offset)}")
    return steps, starts


def weight(caller, weight, p, phi, q, r, lam, groups) -> str:
    """Check a request for materialised weights; -> 'static', 'channels', 'depthwise' or 'joint'.

    Raises:
        TypeError: an argument that is not a tensor, or dtypes that do not match.
        ValueError: shape, device, groups, blocks, a missing factor, or neither phi nor lam (no batch size).
    """
    check_tensors(caller, weight=weight, p=p, phi=phi, q=q, r=r, lam=lam)
    if weight.dim() < 2:
        raise ValueError(f"{caller}: weight must have at least 2 dimensions, got shape {show(weight.shape)}")
    batched, argument = (phi, "phi") if phi is not None else (lam, "lam")
    if batched is None:
        raise ValueError(f"{caller}: phi or lam must be given, as they carry the batch size; both are None")
    if batched.dim() == 0:
        raise ValueError(f"{caller}: {argument} must start with the batch dimension, got a scalar")
    n = batched.shape[0]
    dtype, device = weight.dtype, weight.device
    check_kind(caller, "weight", weight, dtype, device)
    check_extent(caller, weight, weight, 1)
    co, ci = weight.shape[0], weight.shape[1] * groups
    check_groups(caller, groups, ci, co)
    if p is not None or phi is not None or q is not None or r is not None:
        _other_factors(caller, p, phi, q, r, n, co, ci, weight.shape[2:], groups, dtype, device)
    if lam is not None:
        check_lam(caller, lam, n, co, dtype, device)
    if phi is None:
        return "static"
    if r is None:
        return "channels"
    return "depthwise" if q is None else "joint"


def _factors(caller, p, phi, q, n, co, ci, dtype, device) -> None:
    """p, phi and q of a residual that fuses channels: dense (Eqs. 5, 6) or block-diagonal (Eq. 7)."""
    if p is None or phi is None or q is None:
        fail_factors(caller, p, phi, q, None)
    if p.dtype is not dtype or p.device != device or p.layout is not STRIDED:
        check_kind(caller, "p", p, dtype, device)
    if q.dtype is not dtype or q.device != device or q.layout is not STRIDED:
        check_kind(caller, "q", q, dtype, device)
    if phi.dtype is not dtype or phi.device != device or phi.layout is not STRIDED:
        check_kind(caller, "phi", phi, dtype, device, True)
    f = phi.shape
    latent = f[-1] if f else 0
    if len(f) == 4:
        blocks = f[1]
        if f != (n, blocks, latent, latent) or latent == 0:
            fail_shape(caller, "phi", phi, (n, blocks, latent, latent), "(batch, B, L, L), Eq. 7")
        if blocks < 1 or co % blocks or ci % blocks:
            raise ValueError(
                f"{caller}: phi {show(f)} has B = {show(blocks)} blocks; B must divide in_channels "
                f"{show(ci)} and out_channels {show(co)}"
            )
    elif f != (n, latent, latent) or latent == 0:
        fail_phi(caller, p, phi, n)
    if p.shape != (co, latent):
        fail_p(caller, p, (co, latent))
    if q.shape != (ci, latent):
        fail_shape(caller, "q", q, (ci, latent), "(in_channels, L), L of phi")


def _other_factors(caller, p, phi, q, r, n, co, ci, kernel, groups, dtype, device) -> None:
    """The factors of every form that is not plainly pointwise."""
    if p is None or phi is None or (q is None and r is None):
        fail_factors(caller, p, phi, q, r, groups, ci)
    if r is not None:
        _kernel_factors(caller, p, phi, q, r, n, co, ci, kernel, groups, dtype, device)
        return
    if groups != 1 and groups == ci:
        raise ValueError(
            f"{caller}: q must be None with a depthwise convolution (groups = in_channels = {show(groups)}), "
            f"whose residual takes r (Eq. 8); got q {show(q.shape)}. dcd_apply adds one that fuses channels"
        )
    _factors(caller, p, phi, q, n, co, ci, dtype, device)
    if groups != 1 and (phi.dim() != 4 or phi.shape[1] % groups):
        raise ValueError(
            f"{caller}: phi must be (batch, B, L, L), block-diagonal, B a multiple of groups = "
            f"{show(groups)}, got {show(phi.shape)}; for a dense residual beside a grouped convolution "
            f"call dcd_apply on its output"
        )
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(
            f"{caller}: weight must have odd kernel sizes for a residual at the centre tap (q, no r), got "
            f"the kernel {show(kernel)}; dcd_apply takes a static output and any offset"
        )


def _kernel_factors(caller, p, phi, q, r, n, co, ci, kernel, groups, dtype, device) -> None:
    """The factors of a residual that fuses kernel elements: depthwise (Eq. 8) or joint (Eq. 9)."""
    check_kind(caller, "p", p, dtype, device)
    check_kind(caller, "r", r, dtype, device)
    check_kind(caller, "phi", phi, dtype, device, True)
    taps = 1
    for k in kernel:
        taps *= k
    if r.dim() != 2 or r.shape[0] != taps or r.shape[1] == 0:
        fail_shape(caller, "r", r, (taps, "L_k"), f"(kernel elements, L_k) of the kernel {show(kernel)}")
    latent_kernel = r.shape[1]
    if q is None:
        if groups != ci:
            raise ValueError(
                f"{caller}: groups must be in_channels = {show(ci)} with r and without q (depthwise, Eq. 8), "
                f"got {show(groups)}; with groups = 1 give q too (joint fusion, Eq. 9)"
            )
        if phi.shape != (n, latent_kernel, latent_kernel):
            wanted = (n, latent_kernel, latent_kernel)
            fail_shape(caller, "phi", phi, wanted, "(batch, L_k, L_k), L_k of r")
        if p.shape != (co, latent_kernel):
            fail_p(caller, p, (co, latent_kernel))
        return
    check_kind(caller, "q", q, dtype, device)
    if groups != 1:
        raise ValueError(f"{caller}: groups must be 1 with q and r (joint fusion, Eq. 9), got {show(groups)}")
    latent = phi.shape[-1] if phi.shape else 0
    if phi.shape != (n, latent_kernel, latent, latent) or latent == 0:
        hint = "; blocks do not go with joint fusion" if phi.dim() == 5 else ""
        wanted = (n, latent_kernel, latent or "L", latent or "L")
        fail_shape(caller, "phi", phi, wanted, f"(batch, L_k, L, L), Eq. 9, L_k of r{hint}")
    if p.shape != (co, latent):
        fail_p(caller, p, (co, latent))
    if q.shape != (ci, latent):
        fail_shape(caller, "q", q, (ci, latent), "(in_channels, L), L of phi")


def _latent_factors(caller, p, phi, n, co, ci, dtype, device) -> None:
    """p and a rectangular phi, for an input that is the latent itself."""
    check_kind(caller, "p", p, dtype, device)
    check_kind(caller, "phi", phi, dtype, device, True)
    latent = phi.shape[1] if phi.dim() == 3 and phi.shape[1] > 0 else "L"
    if phi.shape != (n, latent, ci):
        fail_shape(
            caller, "phi", phi, (n, latent, ci), "(batch, L, in_channels): q is None, input is the latent"
        )
    if p.shape != (co, latent):
        fail_p(caller, p, (co, latent))
