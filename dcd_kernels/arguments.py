# SPDX-License-Identifier: BSD-3-Clause
"""Checks of single arguments, which the operators share, and the messages of what can be wrong with several.

A message says which argument, what it got and what it needs.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from .geometry import show

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}  # the compiled operators' codes
_ACTIVATION_NAMES = tuple(ACTIVATIONS)
HALF = (torch.float16, torch.bfloat16)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
DTYPES = (torch.float32, *HALF, torch.float64, *COMPLEX)
STRIDED = torch.strided
_AUTOCAST = (torch.float32, *HALF)  # what autocast converts; float64 it leaves alone


def check_tensors(caller, **arguments) -> None:
    for name, value in arguments.items():
        required = name in ("input", "weight", "static")
        if not isinstance(value, Tensor) and (required or value is not None):
            wanted = "a torch.Tensor" if required else "a torch.Tensor or None"
            raise TypeError(f"{caller}: {name} must be {wanted}, got {type(value).__name__}")


def check_kind(caller, argument, tensor, dtype, device, wide=False, beside="first argument") -> None:
    """The full rule for one argument's layout, device and dtype; ``wide``: or float32 beside half.

    ``dtype`` and ``device`` are those of what it stands ``beside``.
    """
    check_tensors(caller, **{argument: tensor})
    if tensor.layout is not STRIDED:
        raise TypeError(
            f"{caller}: {argument} must be an ordinary tensor with strides (torch.strided), got the layout "
            f"{tensor.layout}; to_dense() makes one"
        )
    if tensor.dtype is dtype and tensor.device == device and dtype in DTYPES:
        return
    if dtype not in DTYPES:
        raise TypeError(f"{caller}: {argument} must be floating point or complex, got {dtype}")
    if tensor.device != device:
        raise ValueError(f"{caller}: {argument} must be on {device} like the {beside}, got {tensor.device}")
    if wide and dtype in HALF and tensor.dtype is torch.float32:
        return
    # Under autocast the operator itself converts, so that a float32 parameter beside a half input is right.
    if tensor.dtype in _AUTOCAST and dtype in _AUTOCAST and autocast_enabled(device.type):
        return
    wanted = f"{dtype} or torch.float32" if wide and dtype in HALF else str(dtype)
    raise TypeError(f"{caller}: {argument} must be {wanted} beside a {beside} of {dtype}, got {tensor.dtype}")


def check_extent(caller, input, weight, channel) -> None:
    """Sizes of zero: right for the batch and for linear's rows, for nothing from ``channel`` on."""
    if 0 in weight.shape:
        raise ValueError(f"{caller}: weight must have no size of zero, got shape {show(weight.shape)}")
    if 0 in input.shape[channel:]:
        raise ValueError(f"{caller}: only the batch of input may be empty, got shape {show(input.shape)}")


def check_lam(caller, lam, n, co, dtype, device) -> None:
    if lam.dtype is not dtype or lam.device != device or lam.layout is not STRIDED:
        check_kind(caller, "lam", lam, dtype, device, True)
    if lam.shape != (n, co):
        fail_shape(caller, "lam", lam, (n, co), "(batch, out_channels)")


def check_bias(caller, bias, n, co, dtype, device) -> None:
    if bias.dtype is not dtype or bias.device != device or bias.layout is not STRIDED:
        check_kind(caller, "bias", bias, dtype, device, True)
    # by rank first: a size that is a symbol is compared only with what it has to be
    if bias.shape != ((co,) if bias.dim() == 1 else (n, co)):
        fail_shape(
            caller, "bias", bias, (co,), f"(out_channels,), or (batch, out_channels) = {show((n, co))}"
        )


def check_residual(caller, residual, output, dtype, device) -> None:
    if residual.dtype is not dtype or residual.device != device or residual.layout is not STRIDED:
        check_kind(caller, "residual", residual, dtype, device)
    if residual.shape != output:
        fail_shape(caller, "residual", residual, output, "the shape of the output")


def check_activation(caller, activation, dtype) -> None:
    if activation not in _ACTIVATION_NAMES:
        raise ValueError(f"{caller}: activation must be one of {_ACTIVATION_NAMES}, got {activation!r}")
    if dtype in COMPLEX:
        raise TypeError(f"{caller}: activation must be None for complex input ({dtype}), got {activation!r}")


def check_groups(caller, groups, ci, co) -> None:
    if not isinstance(groups, int):
        raise TypeError(f"{caller}: groups must be an integer, got {show(groups)}")
    if groups < 1 or ci % groups or co % groups:
        raise ValueError(
            f"{caller}: groups must be positive and divide in_channels {show(ci)} and out_channels "
            f"{show(co)}, got {show(groups)}"
        )


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; also for types that torch has no autocast for ('meta')."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_module(caller: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")


def check_sizes(caller: str, **sizes: object) -> None:
    """Raise unless each is an integer of at least 1."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{caller}: {argument} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{caller}: {argument} must be at least 1, got {size}")


def fail_rank(caller, spatial, input, weight) -> NoReturn:
    check_tensors(caller, input=input, weight=weight)
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


def fail_shape(caller, argument, tensor, wanted, meaning) -> NoReturn:
    check_tensors(caller, **{argument: tensor})
    raise ValueError(
        f"{caller}: {argument} must have shape {show(wanted)}, {meaning}; got {show(tensor.shape)}"
    )


def fail_p(caller, p, wanted) -> NoReturn:
    hint = ": bias is keyword-only" if p.dim() == 1 else ""
    fail_shape(caller, "p", p, wanted, f"(out_channels, L), L of phi{hint}")


def fail_phi(caller, p, phi, n) -> NoReturn:
    if p.dim() != 2:
        fail_p(caller, p, ("out_channels", "L"))
    if p.shape[1] == 0:
        fail_shape(caller, "p", p, ("out_channels", "L"), "L at least 1")
    wanted = (n, p.shape[1], p.shape[1])
    fail_shape(caller, "phi", phi, wanted, f"(batch, L, L), L of p {show(p.shape)}, or 4-D (batch, B, L, L)")


def fail_factors(caller, p, phi, q, r, groups=1, ci=0) -> NoReturn:
    check_tensors(caller, p=p, phi=phi, q=q, r=r)
    if p is not None and p.dim() == 1:
        raise ValueError(f"{caller}: p must have 2 dimensions, got {show(p.shape)}: bias is keyword-only")
    missing = "p" if p is None else "phi" if phi is None else "r" if groups != 1 and groups == ci else "q"
    given = [name for name, value in (("p", p), ("phi", phi), ("q", q), ("r", r)) if value is not None]
    raise ValueError(
        f"{caller}: {missing} is missing, got {' and '.join(given)}; a dynamic residual needs p and phi with "
        f"q (channel fusion), with r (depthwise) or with both (joint fusion)"
    )
