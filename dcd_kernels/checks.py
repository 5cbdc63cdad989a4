# SPDX-License-Identifier: BSD-3-Clause
"""Argument checks: one function per public operator, each raising an error that names the argument.

A layer may take 50 µs, so the checks of a valid call are bare comparisons of shapes; every message is built
in a function of its own, reached only on failure. A message says which argument, what it got and what it
needs.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import geometry
from .geometry import show

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}  # the compiled operators' codes
_ACTIVATION_NAMES = tuple(ACTIVATIONS)
_HALF = (torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_DTYPES = (torch.float32, *_HALF, torch.float64, *_COMPLEX)
_STRIDED = torch.strided
_AUTOCAST = (torch.float32, *_HALF)  # what autocast converts; float64 it leaves alone
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
            _fail_rank(caller, spatial, input, weight)
        n, ci = x[0], x[1]
        co = w[0]
        dtype = input.dtype
        device = input.device
        if (
            dtype not in _DTYPES
            or weight.dtype is not dtype
            or weight.device != device
            or input.layout is not _STRIDED
            or weight.layout is not _STRIDED
        ):
            _kind(caller, "input", input, dtype, device)
            _kind(caller, "weight", weight, dtype, device)
        if input.numel() == 0 or weight.numel() == 0:
            _extent(caller, input, weight, 1)
        if groups != 1:
            _groups(caller, groups, ci, co)
        if w[1] * groups != ci:
            wanted = (co, ci // groups, *w[2:])
            _fail_shape(caller, "weight", weight, wanted, "(out_channels, in_channels / groups, *kernel)")
        pointwise = r is None and groups == 1 and weight.numel() == co * ci
        if p is not None and phi is not None and pointwise:
            _factors(caller, p, phi, q, n, co, ci, dtype, device)
        elif p is not None or phi is not None or q is not None or r is not None:
            _other_factors(caller, p, phi, q, r, n, co, ci, w[2:], groups, dtype, device)
        if lam is not None:
            _lam(caller, lam, n, co, dtype, device)
        if bias is not None:
            _bias(caller, bias, n, co, dtype, device)
        if activation is not None:
            _activation(caller, activation, dtype)
        if (
            pointwise
            and (stride == 1 or stride == _ONES[spatial])
            and (padding == 0 or padding == _ZEROS[spatial])
            and (dilation == 1 or dilation == _ONES[spatial])
        ):
            if residual is not None:
                _residual(caller, residual, (n, co, *x[2:]), dtype, device)
            return None
        where = geometry.resolve(caller, x[2:], w[2:], stride, padding, dilation)
        if residual is not None:
            _residual(caller, residual, (n, co, *where.output), dtype, device)
    except AttributeError:
        _tensors(caller, input=input, weight=weight, p=p, phi=phi, q=q, r=r, lam=lam, bias=bias)
        _tensors(caller, residual=residual)
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
            dtype not in _DTYPES
            or weight.dtype is not dtype
            or weight.device != device
            or input.layout is not _STRIDED
            or weight.layout is not _STRIDED
        ):
            _kind(caller, "input", input, dtype, device)
            _kind(caller, "weight", weight, dtype, device)
        if w[1] != ci:
            _fail_shape(caller, "weight", weight, (co, ci), "(out_channels, in_channels)")
        if input.numel() == 0 or weight.numel() == 0:
            _extent(caller, input, weight, len(x) - 1)
        if p is not None or phi is not None or q is not None:
            _factors(caller, p, phi, q, n, co, ci, dtype, device)
        if lam is not None:
            _lam(caller, lam, n, co, dtype, device)
        if bias is not None:
            _bias(caller, bias, n, co, dtype, device)
        if activation is not None:
            _activation(caller, activation, dtype)
        if residual is not None:
            _residual(caller, residual, (*x[:-1], co), dtype, device)
    except AttributeError:
        _tensors(caller, input=input, weight=weight, p=p, phi=phi, q=q, lam=lam, bias=bias, residual=residual)
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
            dtype not in _DTYPES
            or input.dtype is not dtype
            or input.device != device
            or static.layout is not _STRIDED
            or input.layout is not _STRIDED
        ):
            _kind(caller, "static", static, dtype, device)
            _kind(caller, "input", input, dtype, device)
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
            _lam(caller, lam, n, co, dtype, device)
        if bias is not None:
            _bias(caller, bias, n, co, dtype, device)
        if activation is not None:
            _activation(caller, activation, dtype)
        if residual is not None:
            _residual(caller, residual, y, dtype, device)
    except AttributeError:
        _tensors(caller, static=static, input=input, p=p, phi=phi, q=q, lam=lam, bias=bias, residual=residual)
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
    _tensors(caller, input=input)
    if not isinstance(q, Tensor):
        raise TypeError(f"{caller}: q must be a torch.Tensor, got {type(q).__name__}")
    if input.dim() < 3:
        raise ValueError(
            f"{caller}: input must be (batch, in_channels, *spatial) with at least 3 dimensions, got "
            f"{show(input.shape)}"
        )
    _kind(caller, "input", input, input.dtype, input.device)
    _kind(caller, "q", q, input.dtype, input.device)
    if input.is_complex():
        raise TypeError(f"{caller}: input must be real, got {input.dtype}")
    if q.dim() != 2 or q.shape[0] != input.shape[1] or q.shape[1] == 0:
        _fail_shape(caller, "q", q, (input.shape[1], "L"), "in_channels, latent_channels")
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
    _tensors(caller, weight=weight, p=p, phi=phi, q=q, r=r, lam=lam)
    if weight.dim() < 2:
        raise ValueError(f"{caller}: weight must have at least 2 dimensions, got shape {show(weight.shape)}")
    batched, argument = (phi, "phi") if phi is not None else (lam, "lam")
    if batched is None:
        raise ValueError(f"{caller}: phi or lam must be given, as they carry the batch size; both are None")
    if batched.dim() == 0:
        raise ValueError(f"{caller}: {argument} must start with the batch dimension, got a scalar")
    n = batched.shape[0]
    dtype, device = weight.dtype, weight.device
    _kind(caller, "weight", weight, dtype, device)
    _extent(caller, weight, weight, 1)
    co, ci = weight.shape[0], weight.shape[1] * groups
    _groups(caller, groups, ci, co)
    if p is not None or phi is not None or q is not None or r is not None:
        _other_factors(caller, p, phi, q, r, n, co, ci, weight.shape[2:], groups, dtype, device)
    if lam is not None:
        _lam(caller, lam, n, co, dtype, device)
    if phi is None:
        return "static"
    if r is None:
        return "channels"
    return "depthwise" if q is None else "joint"


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; also for types that torch has no autocast for ('meta')."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _factors(caller, p, phi, q, n, co, ci, dtype, device) -> None:
    """p, phi and q of a residual that fuses channels: dense (Eqs. 5, 6) or block-diagonal (Eq. 7)."""
    if p is None or phi is None or q is None:
        _fail_factors(caller, p, phi, q, None)
    if p.dtype is not dtype or p.device != device or p.layout is not _STRIDED:
        _kind(caller, "p", p, dtype, device)
    if q.dtype is not dtype or q.device != device or q.layout is not _STRIDED:
        _kind(caller, "q", q, dtype, device)
    if phi.dtype is not dtype or phi.device != device or phi.layout is not _STRIDED:
        _kind(caller, "phi", phi, dtype, device, True)
    f = phi.shape
    latent = f[-1] if f else 0
    if len(f) == 4:
        blocks = f[1]
        if f != (n, blocks, latent, latent) or latent == 0:
            _fail_shape(caller, "phi", phi, (n, blocks, latent, latent), "(batch, B, L, L), Eq. 7")
        if blocks < 1 or co % blocks or ci % blocks:
            raise ValueError(
                f"{caller}: phi {show(f)} has B = {show(blocks)} blocks; B must divide in_channels "
                f"{show(ci)} and out_channels {show(co)}"
            )
    elif f != (n, latent, latent) or latent == 0:
        _fail_phi(caller, p, phi, n)
    if p.shape != (co, latent):
        _fail_p(caller, p, (co, latent))
    if q.shape != (ci, latent):
        _fail_shape(caller, "q", q, (ci, latent), "(in_channels, L), L of phi")


def _other_factors(caller, p, phi, q, r, n, co, ci, kernel, groups, dtype, device) -> None:
    """The factors of every form that is not plainly pointwise."""
    if p is None or phi is None or (q is None and r is None):
        _fail_factors(caller, p, phi, q, r, groups, ci)
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
    _kind(caller, "p", p, dtype, device)
    _kind(caller, "r", r, dtype, device)
    _kind(caller, "phi", phi, dtype, device, True)
    taps = 1
    for k in kernel:
        taps *= k
    if r.dim() != 2 or r.shape[0] != taps or r.shape[1] == 0:
        _fail_shape(caller, "r", r, (taps, "L_k"), f"(kernel elements, L_k) of the kernel {show(kernel)}")
    latent_kernel = r.shape[1]
    if q is None:
        if groups != ci:
            raise ValueError(
                f"{caller}: groups must be in_channels = {show(ci)} with r and without q (depthwise, Eq. 8), "
                f"got {show(groups)}; with groups = 1 give q too (joint fusion, Eq. 9)"
            )
        if phi.shape != (n, latent_kernel, latent_kernel):
            wanted = (n, latent_kernel, latent_kernel)
            _fail_shape(caller, "phi", phi, wanted, "(batch, L_k, L_k), L_k of r")
        if p.shape != (co, latent_kernel):
            _fail_p(caller, p, (co, latent_kernel))
        return
    _kind(caller, "q", q, dtype, device)
    if groups != 1:
        raise ValueError(f"{caller}: groups must be 1 with q and r (joint fusion, Eq. 9), got {show(groups)}")
    latent = phi.shape[-1] if phi.shape else 0
    if phi.shape != (n, latent_kernel, latent, latent) or latent == 0:
        hint = "; blocks do not go with joint fusion" if phi.dim() == 5 else ""
        wanted = (n, latent_kernel, latent or "L", latent or "L")
        _fail_shape(caller, "phi", phi, wanted, f"(batch, L_k, L, L), Eq. 9, L_k of r{hint}")
    if p.shape != (co, latent):
        _fail_p(caller, p, (co, latent))
    if q.shape != (ci, latent):
        _fail_shape(caller, "q", q, (ci, latent), "(in_channels, L), L of phi")


def _latent_factors(caller, p, phi, n, co, ci, dtype, device) -> None:
    """p and a rectangular phi, for an input that is the latent itself."""
    _kind(caller, "p", p, dtype, device)
    _kind(caller, "phi", phi, dtype, device, True)
    latent = phi.shape[1] if phi.dim() == 3 and phi.shape[1] > 0 else "L"
    if phi.shape != (n, latent, ci):
        _fail_shape(
            caller, "phi", phi, (n, latent, ci), "(batch, L, in_channels): q is None, input is the latent"
        )
    if p.shape != (co, latent):
        _fail_p(caller, p, (co, latent))


def _lam(caller, lam, n, co, dtype, device) -> None:
    if lam.dtype is not dtype or lam.device != device or lam.layout is not _STRIDED:
        _kind(caller, "lam", lam, dtype, device, True)
    if lam.shape != (n, co):
        _fail_shape(caller, "lam", lam, (n, co), "(batch, out_channels)")


def _bias(caller, bias, n, co, dtype, device) -> None:
    if bias.dtype is not dtype or bias.device != device or bias.layout is not _STRIDED:
        _kind(caller, "bias", bias, dtype, device, True)
    # by rank first: a size that is a symbol is compared only with what it has to be
    if bias.shape != ((co,) if bias.dim() == 1 else (n, co)):
        _fail_shape(
            caller, "bias", bias, (co,), f"(out_channels,), or (batch, out_channels) = {show((n, co))}"
        )


def _residual(caller, residual, output, dtype, device) -> None:
    if residual.dtype is not dtype or residual.device != device or residual.layout is not _STRIDED:
        _kind(caller, "residual", residual, dtype, device)
    if residual.shape != output:
        _fail_shape(caller, "residual", residual, output, "the shape of the output")


def _activation(caller, activation, dtype) -> None:
    if activation not in _ACTIVATION_NAMES:
        raise ValueError(f"{caller}: activation must be one of {_ACTIVATION_NAMES}, got {activation!r}")
    if dtype in _COMPLEX:
        raise TypeError(f"{caller}: activation must be None for complex input ({dtype}), got {activation!r}")


def _groups(caller, groups, ci, co) -> None:
    if not isinstance(groups, int):
        raise TypeError(f"{caller}: groups must be an integer, got {show(groups)}")
    if groups < 1 or ci % groups or co % groups:
        raise ValueError(
            f"{caller}: groups must be positive and divide in_channels {show(ci)} and out_channels "
            f"{show(co)}, got {show(groups)}"
        )


def _kind(caller, argument, tensor, dtype, device, wide=False) -> None:
    """The full rule for one argument's layout, device and dtype; ``wide``: or float32 beside half."""
    _tensors(caller, **{argument: tensor})
    if tensor.layout is not _STRIDED:
        raise TypeError(
            f"{caller}: {argument} must be an ordinary tensor with strides (torch.strided), got the layout "
            f"{tensor.layout}; to_dense() makes one"
        )
    if tensor.dtype is dtype and tensor.device == device and dtype in _DTYPES:
        return
    if dtype not in _DTYPES:
        raise TypeError(f"{caller}: {argument} must be floating point or complex, got {dtype}")
    if tensor.device != device:
        raise ValueError(
            f"{caller}: {argument} must be on {device} like the first argument, got {tensor.device}"
        )
    if wide and dtype in _HALF and tensor.dtype is torch.float32:
        return
    # Under autocast the operator itself converts, so that a float32 parameter beside a half input is right.
    if tensor.dtype in _AUTOCAST and dtype in _AUTOCAST and autocast_enabled(device.type):
        return
    wanted = f"{dtype} or torch.float32" if wide and dtype in _HALF else str(dtype)
    raise TypeError(
        f"{caller}: {argument} must be {wanted} beside a first argument of {dtype}, got {tensor.dtype}"
    )


def _extent(caller, input, weight, channel) -> None:
    """Sizes of zero: right for the batch and for linear's rows, for nothing from ``channel`` on."""
    if 0 in weight.shape:
        raise ValueError(f"{caller}: weight must have no size of zero, got shape {show(weight.shape)}")
    if 0 in input.shape[channel:]:
        raise ValueError(f"{caller}: only the batch of input may be empty, got shape {show(input.shape)}")


def _tensors(caller, **arguments) -> None:
    for name, value in arguments.items():
        required = name in ("input", "weight", "static")
        if not isinstance(value, Tensor) and (required or value is not None):
            wanted = "a torch.Tensor" if required else "a torch.Tensor or None"
            raise TypeError(f"{caller}: {name} must be {wanted}, got {type(value).__name__}")


def _fail_rank(caller, spatial, input, weight) -> NoReturn:
    _tensors(caller, input=input, weight=weight)
    rank = spatial + 2
    if input.dim() != rank:
        hint = "; unsqueeze(0) makes a batch of one" if input.dim() == rank - 1 else ""
        raise ValueError(
            f"{caller}: input must be batched, (batch, in_channels, *spatial) with {rank} dimensions, got "
            f"{show(input.shape)}{hint}"
        )
    raise ValueError(
        f"{caller}: weight must be (out_channels, in_channels / groups, *kernel) with {rank} dimensions, got "
        f"{show(weight.shape)}"
    )


def _fail_shape(caller, argument, tensor, wanted, meaning) -> NoReturn:
    _tensors(caller, **{argument: tensor})
    raise ValueError(
        f"{caller}: {argument} must have shape {show(wanted)}, {meaning}; got {show(tensor.shape)}"
    )


def _fail_p(caller, p, wanted) -> NoReturn:
    hint = ": bias is keyword-only" if p.dim() == 1 else ""
    _fail_shape(caller, "p", p, wanted, f"(out_channels, L), L of phi{hint}")


def _fail_phi(caller, p, phi, n) -> NoReturn:
    if p.dim() != 2:
        _fail_p(caller, p, ("out_channels", "L"))
    wanted = (n, p.shape[1], p.shape[1])
    _fail_shape(caller, "phi", phi, wanted, f"(batch, L, L), L of p {show(p.shape)}, or 4-D (batch, B, L, L)")


def _fail_factors(caller, p, phi, q, r, groups=1, ci=0) -> NoReturn:
    _tensors(caller, p=p, phi=phi, q=q, r=r)
    if p is not None and p.dim() == 1:
        raise ValueError(f"{caller}: p must have 2 dimensions, got {show(p.shape)}: bias is keyword-only")
    missing = "p" if p is None else "phi" if phi is None else "r" if groups != 1 and groups == ci else "q"
    given = [name for name, value in (("p", p), ("phi", phi), ("q", q), ("r", r)) if value is not None]
    raise ValueError(
        f"{caller}: {missing} is missing, got {' and '.join(given)}; a dynamic residual needs p and phi with "
        f"q (channel fusion), with r (depthwise) or with both (joint fusion)"
    )
