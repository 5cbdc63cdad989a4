# SPDX-License-Identifier: BSD-3-Clause
"""The dynamic branch: from a tensor to the coefficients λ and Φ (paper, Section 3.4, Figure 2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd_kernels import extension
from dcd_kernels.arguments import check_tensors
from dcd_kernels.backends import branch as kernels
from dcd_kernels.nn.latent import squeeze_channels as default_squeeze_channels

if extension.LOADED:
    from dcd_kernels.ops import branch as ops


def _hardsigmoid2(logits: Tensor) -> Tensor:
    # Not 2·F.hardsigmoid, nor F.hardswish below: torch has no second derivative of these.
    return F.relu6(logits + 3) / 3


# name -> (λ of the logits, whether λ(0) is 1 with a gradient)
LAM_ACTIVATIONS: dict[str | None, tuple[Callable[[Tensor], Tensor], bool]] = {
    "hardsigmoid2": (_hardsigmoid2, True),
    "sigmoid2": (lambda logits: 2 * torch.sigmoid(logits), True),
    "hardsigmoid": (lambda logits: F.relu6(logits + 3) / 6, False),
    "sigmoid": (torch.sigmoid, False),
    None: (lambda logits: 1 + logits, True),
}

GATES: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": lambda hidden: hidden * F.relu6(hidden + 3) / 6,
    None: lambda hidden: hidden,
}

ADAPTIVE_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

# what the compiled ops pool to, in the form of DynamicBranch.pool_size
_FUSED_POOLS = (None, (2, 2))

# Of the two coefficients' logits at the start, relative to what nn.Linear would give: small, so that a fresh
# layer is close to its static kernel, and not zero, so that P, Q and the first FC get a gradient at once.
INITIAL_SCALE = 0.1


def one_of(argument: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {list(choices)}, got {value!r}")


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _bins(length: int, count: int) -> list[tuple[int, int]]:
    """Bins of adaptive pooling, ``[⌊i·length/count⌋, ⌈(i+1)·length/count⌉)``: they overlap on odd sizes."""
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def _slice_means(input: Tensor, pool_size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Adaptive average pooling one axis after the other, as means of slices accumulated in ``dtype``."""
    for axis, count in enumerate(pool_size, start=2):
        bins = _bins(input.shape[axis], count)
        input = torch.stack([input.narrow(axis, a, b - a).mean(axis, dtype=dtype) for a, b in bins], axis)
    return input.flatten(1)


def pooled(input: Tensor, pool_size: tuple[int, ...] | None) -> Tensor:
    """Adaptive average pooling of ``(N, C, *spatial)`` to ``(N, C·∏pool_size)``, in fp32 or better."""
    dtype = _accumulator(input)
    if input.dim() == 2:
        return input.to(dtype)
    if pool_size is None:
        return input.mean(tuple(range(2, input.dim())), dtype=dtype)
    # torch's adaptive pooling is faster, but rounds its result to half, and its CUDA backward is not
    # deterministic.
    deterministic = input.is_cuda and torch.are_deterministic_algorithms_enabled()
    if input.dtype != dtype or deterministic:
        return _slice_means(input, pool_size, dtype)
    return ADAPTIVE_POOLS[input.dim() - 2](input, pool_size).flatten(1)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def linear(layer: nn.Linear, input: Tensor) -> Tensor:
    """``layer(input)`` in the dtype of ``input``, which may be wider than the parameters'."""
    if layer.weight.dtype == input.dtype:
        return layer(input)
    bias = None if layer.bias is None else layer.bias.to(input.dtype)
    return F.linear(input, layer.weight.to(input.dtype), bias)


def _registered(slots: dict, name: str, module: nn.Module):
    """``module.name`` at a tenth of its price where it is among the module's parameters or modules."""
    return slots[name] if name in slots else getattr(module, name)


def _is_plain(layer: nn.Linear | None) -> bool:
    """Whether the product with the weight is all that calling ``layer`` does."""
    return layer is None or (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and "forward" not in layer.__dict__
    )


def _weight(layer: nn.Linear) -> Tensor:
    return _registered(layer._parameters, "weight", layer)


def _bias(layer: nn.Linear) -> Tensor | None:
    return _registered(layer._parameters, "bias", layer)


def _is_phi_shape(shape: tuple) -> bool:
    return (
        len(shape) in (2, 3)
        and all(isinstance(size, int) and size >= 1 for size in shape)
        and shape[-1] == shape[-2]
    )


class DynamicBranch(nn.Module):
    """Pool → FC → activation or gate → FC into the logits of λ and Φ.

    With ``x̄`` the pooled input, flattened to ``I = in_channels·∏pool_size`` numbers a sample::

        h = gate(squeeze x̄)                       squeeze: (s, I)
        (logits of λ, Φ) = dropout(expand h)      expand: (lam_channels + ∏phi_shape, s)
        λ = lam_activation(logits)

    The whole branch is computed in fp32 where the input is fp16 or bf16, under autocast too, and so are the
    coefficients it returns; float64 stays float64. A fresh branch gives λ near 1 and Φ near 0. A branch that
    pools to 1 or (2, 2) is two compiled ops, on a GPU two kernels, and one where the input's producer summed
    it up (:meth:`runs_fused` says whether, and why not).

    Args:
        in_channels: channels of the tensor that the coefficients are computed from.
        lam_channels: length of λ, the layer's output channels; 0 for no λ.
        phi_shape: shape of Φ of one sample: ``(L, L)``; ``(B, L_b, L_b)`` block-diagonal, Eq. 7;
            ``(L_k, L_k)`` depthwise, Eq. 8; ``(L_k, L, L)`` joint, Eq. 9; None for no Φ.
        reduction: ``r``; ``s = max(in_channels, lam_channels) // r``, at least 4.
        squeeze_channels: ``s`` itself; overrides ``reduction``.
        pool_size: output size of the adaptive average pooling: 1, or one number per spatial dimension.
        gate: what stands between the two FCs: an activation ``'relu'`` (paper), ``'relu6'``, ``'silu'``,
            ``'hardswish'``; ``'se'``, the released form's gate ``h·relu6(fc(h) + 3)/3``, whose FC is (s, s);
            or None.
        lam_activation: ``'hardsigmoid2'`` = ``relu6(z + 3)/3`` (0 to 2, released form), ``'sigmoid2'`` =
            ``2σ(z)``, ``'hardsigmoid'`` and ``'sigmoid'`` (0 to 1; λ starts at 1/2), or None: ``1 + z``.
        dropout: probability of dropping a logit in training; a dropped one leaves λ = λ(0) and Φ = 0.
        bias: biases on the FCs. Off by default: the paper counts none, and λ(0) is 1 without.
        device, dtype: of the parameters.

    Shapes:
        input ``(N, in_channels, *spatial)`` of any rank ≥ 2 (a tuple as ``pool_size`` fixes the number of
        spatial dimensions) → ``(lam (N, lam_channels) or None, phi (N, *phi_shape) or None)``.
        sums, optional: what the producer of the input knows of it already, its sums over the pixels,
        ``(N, in_channels)``, or ``(N, T, in_channels)`` over T groups of pixels; fp32 (float64 for float64).
        The input is then not read. Only without ``pool_size``.

    Raises:
        ValueError: options out of range or unknown, a branch with nothing to compute, or input or sums of the
            wrong rank or channels, or sums where they cannot be used.
        TypeError: an input that is not a tensor, sums of another dtype.
    """

    def __init__(
        self,
        in_channels: int,
        lam_channels: int,
        phi_shape: Sequence[int] | None,
        *,
        reduction: int = 16,
        squeeze_channels: int | None = None,
        pool_size: int | Sequence[int] = 1,
        gate: str | None = "relu",
        lam_activation: str | None = "hardsigmoid2",
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        phi_shape = None if phi_shape is None else tuple(phi_shape)
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if lam_channels < 0:
            raise ValueError(f"lam_channels must be at least 0, got {lam_channels}")
        if phi_shape is not None and not _is_phi_shape(phi_shape):
            raise ValueError(
                f"phi_shape must be (L, L) or (B, L, L) with sizes of at least 1, got {phi_shape}"
            )
        if lam_channels == 0 and phi_shape is None:
            raise ValueError(
                "lam_channels must be at least 1 where phi_shape is None: there is nothing to compute"
            )
        if squeeze_channels is None:
            squeeze_channels = default_squeeze_channels(in_channels, lam_channels, reduction)
        elif squeeze_channels < 1:
            raise ValueError(f"squeeze_channels must be at least 1, got {squeeze_channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        one_of("gate", gate, [*GATES, "se"])
        one_of("lam_activation", lam_activation, list(LAM_ACTIVATIONS))
        sizes = (1,) if pool_size == 1 else pool_size
        if isinstance(sizes, int) or not 1 <= len(sizes) <= 3 or min(sizes) < 1:
            raise ValueError(
                f"pool_size must be 1 or a size for each of 1 to 3 spatial dimensions, got {pool_size!r}"
            )

        self.in_channels = in_channels
        self.lam_channels = lam_channels
        self.phi_shape = phi_shape
        self.squeeze_channels = squeeze_channels
        # Pooling to one number a channel fits every rank; any other size fixes the number of dimensions.
        self.pool_size = None if math.prod(sizes) == 1 else tuple(sizes)
        self.gate_name = gate
        self.lam_activation = lam_activation
        self.dropout = dropout

        options = {"bias": bias, "device": device, "dtype": dtype}
        coefficients = lam_channels + (0 if phi_shape is None else math.prod(phi_shape))
        self.squeeze = nn.Linear(in_channels * math.prod(sizes), squeeze_channels, **options)
        self.gate = nn.Linear(squeeze_channels, squeeze_channels, **options) if gate == "se" else None
        self.expand = nn.Linear(squeeze_channels, coefficients, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """λ near 1 and Φ near 0, with a gradient for every parameter.

        Behind a ReLU the rows of ``squeeze`` come in pairs ``w, −w``: of each pair exactly one is alive.
        Pooled features vary little from image to image, so a unit that is dead on one is dead on most, and in
        a narrow branch all of them could be: with independent rows a squeeze of 4 starts dead in one layer of
        sixteen.
        """
        with torch.no_grad():
            self.squeeze.reset_parameters()
            if self.gate_name in ("relu", "relu6"):
                pairs = self.squeeze_channels // 2
                self.squeeze.weight[1 : 2 * pairs : 2] = -self.squeeze.weight[0 : 2 * pairs : 2]
            if self.gate is not None:
                self.gate.reset_parameters()
            self.expand.reset_parameters()
            self.expand.weight.mul_(INITIAL_SCALE)
            for layer in (self.squeeze, self.gate, self.expand):
                if layer is not None and layer.bias is not None:
                    layer.bias.zero_()

    def reset_to_static(self) -> None:
        """λ = 1 and Φ = 0 exactly, for every input.

        The gradient then reaches ``expand`` at once, and ``squeeze``, ``gate``, P and Q from the second step.

        Raises:
            ValueError: a ``lam_activation`` that cannot give 1 with a gradient.
        """
        if self.lam_channels and not LAM_ACTIVATIONS[self.lam_activation][1]:
            usable = [name for name, (_, starts_at_one) in LAM_ACTIVATIONS.items() if starts_at_one]
            raise ValueError(
                f"lam_activation must be one of {usable} to begin as a given static layer: "
                f"{self.lam_activation!r} cannot give 1 with a gradient"
            )
        with torch.no_grad():
            self.expand.weight.zero_()
            if self.expand.bias is not None:
                self.expand.bias.zero_()

    def runs_fused(self, input: Tensor) -> tuple[bool, str]:
        """Whether ``forward(input)`` runs as the compiled ops of ``dcd_kernels.ops.branch``, and why not."""
        return self._can_fuse(input, self.squeeze, self.gate, self.expand)

    def _can_fuse(
        self, input: Tensor, squeeze: nn.Linear, gate: nn.Linear | None, expand: nn.Linear
    ) -> tuple[bool, str]:
        # The layers are arguments because a module takes its time to find one.
        if self.pool_size not in _FUSED_POOLS:
            return False, f"pool_size={self.pool_size}, these kernels pool to 1 or (2, 2)"
        if self.dropout and self.training:
            return False, "dropout in training"
        if not (_is_plain(squeeze) and _is_plain(gate) and _is_plain(expand)):
            return False, "an FC has hooks, a forward of its own or another class than nn.Linear"
        if gate is None:
            return kernels.can_run(input, _weight(squeeze), _weight(expand))
        return kernels.can_run(input, _weight(squeeze), _weight(expand), _weight(gate))

    def forward(self, input: Tensor, sums: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(λ, Φ) of ``input``: shapes and errors are those of the class."""
        check_tensors("DynamicBranch", input=input)
        shape = input.shape
        if len(shape) < 2 or shape[1] != self.in_channels:
            raise ValueError(
                f"input of the branch must have shape (N, {self.in_channels}, *spatial), got {tuple(shape)}"
            )
        if self.pool_size is not None and len(shape) != 2 + len(self.pool_size):
            raise ValueError(
                f"input of the branch must have {len(self.pool_size)} spatial dimensions for "
                f"pool_size={self.pool_size}, got shape {tuple(shape)}"
            )
        if sums is not None:
            sums = self._checked_sums(input, sums)
        modules = self._modules
        squeeze = _registered(modules, "squeeze", self)
        gate = _registered(modules, "gate", self)
        expand = _registered(modules, "expand", self)
        if self._can_fuse(input, squeeze, gate, expand)[0]:
            return self._fused(input, sums, squeeze, gate, expand)
        with _without_autocast(input.device.type):
            if sums is None:
                means = pooled(input, self.pool_size)
            else:
                means = sums.sum(1, dtype=_accumulator(input)) / input.shape[2:].numel()
            hidden = linear(squeeze, means)
            if gate is not None:
                hidden = hidden * _hardsigmoid2(linear(gate, hidden))
            else:
                hidden = GATES[self.gate_name](hidden)
            logits = linear(expand, hidden)
            if self.dropout:
                logits = F.dropout(logits, self.dropout, self.training)
            lam = phi = None
            if self.lam_channels:
                lam = LAM_ACTIVATIONS[self.lam_activation][0](logits[:, : self.lam_channels])
            if self.phi_shape is not None:
                phi = logits[:, self.lam_channels :].unflatten(1, self.phi_shape)
        return lam, phi

    def _checked_sums(self, input: Tensor, sums: Tensor) -> Tensor:
        """``sums`` as (N, T, C)."""
        batch = input.shape[0]
        if self.pool_size is not None or input.dim() < 3:
            raise ValueError(
                f"sums must not be given for pool_size={self.pool_size} and input of shape "
                f"{tuple(input.shape)}: they are sums over all pixels of a channel"
            )
        shape = tuple(sums.shape)
        if sums.dim() not in (2, 3) or (shape[0], shape[-1]) != (batch, self.in_channels):
            raise ValueError(
                f"sums must have shape (N, C) or (N, T, C), here ({batch}, {self.in_channels}) or "
                f"({batch}, T, {self.in_channels}), got {shape}"
            )
        if sums.dtype != _accumulator(input):
            raise TypeError(
                f"sums must be {_accumulator(input)} beside input of {input.dtype}, got {sums.dtype}"
            )
        return sums.unsqueeze(1) if sums.dim() == 2 else sums

    def _fused(
        self,
        input: Tensor,
        sums: Tensor | None,
        squeeze: nn.Linear,
        gate: nn.Linear | None,
        expand: nn.Linear,
    ) -> tuple[Tensor | None, Tensor | None]:
        _, _, *sizes = input.shape
        if not sizes:
            sums = input.to(_accumulator(input)).unsqueeze(1)
        elif self.pool_size is None:
            sums = ops.channel_sums(input) if sums is None else sums
        else:  # both bins of an axis are as long, for they share the middle of an odd size
            sizes = [(size + 1) // 2 for size in sizes]
            sums = ops.channel_sums(input, 2)
        lam, phi = ops.branch(
            sums,
            1.0 / math.prod(sizes),
            _weight(squeeze),
            _bias(squeeze),
            None if gate is None else _weight(gate),
            None if gate is None else _bias(gate),
            _weight(expand),
            _bias(expand),
            None,
            None,
            self.lam_channels,
            ops.GATES.index(self.gate_name),
            ops.LAM_ACTIVATIONS.index(self.lam_activation),
        )
        if self.phi_shape is None:
            return lam, None
        # a reshape in one call, where unflatten is a function in Python
        return lam if self.lam_channels else None, phi.view(phi.shape[0], *self.phi_shape)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, lam_channels={self.lam_channels}, phi_shape={self.phi_shape}"
        if self.pool_size is not None:
            text += f", pool_size={self.pool_size}"
        text += f", gate={self.gate_name!r}"
        if self.lam_channels:
            text += f", lam_activation={self.lam_activation!r}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")
