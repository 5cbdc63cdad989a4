# SPDX-License-Identifier: BSD-3-Clause
"""What the convolutional and the linear DCD layer have in common: parameters, their start, the branch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from dcd_kernels.arguments import ACTIVATIONS, check_sizes, check_tensors
from dcd_kernels.geometry import show
from dcd_kernels.nn.branch import DynamicBranch, one_of
from dcd_kernels.nn.latent import LatentRule, latent_channels, squeeze_channels
from dcd_kernels.nn.packed import packed_for
from dcd_kernels.packing import PackedWeight

# The classes that a DCD layer can be made from. Subclasses are left out on purpose: theirs may be another
# computation (standardised weights, "same" padding of TensorFlow, parametrisations).
STATIC_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class DCDLayer(nn.Module):
    """Base of the layers: W0, bias, P, Q, R and the branch that computes λ and Φ. Not a layer by itself."""

    # Absent ones are registered as None, as nn.Conv2d does with its bias.
    weight: nn.Parameter
    bias: nn.Parameter | None
    p: nn.Parameter | None
    q: nn.Parameter | None
    r: nn.Parameter | None
    latent_channels: int | None = None
    latent_kernel: int | None = None
    blocks: int = 1
    # Whether inference on the CPU with channels_last images keeps the weights of a pointwise layer in packed
    # form beside them, which doubles their memory. An edit that torch does not count (through `.data` or
    # NumPy, or by another process) is seen after the next eval() or train().
    keep_packed: bool = True
    _kept = None
    # What the option is called in this class; the branch's own names are other ones.
    condition_option = "condition_channels"
    channel_axis = 1

    def _set_sizes(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        names: tuple[str, str] = ("in_channels", "out_channels"),
    ) -> None:
        for argument, value in zip((*names, "blocks"), (in_channels, out_channels, blocks), strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"{type(self).__name__}: {argument} must be a positive integer, got {value!r}"
                )
        if in_channels % blocks or out_channels % blocks:
            raise ValueError(
                f"{type(self).__name__}: blocks must divide {names[0]} and {names[1]}, "
                f"got {blocks} for {in_channels} and {out_channels}"
            )
        self.blocks = blocks

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        weight_shape: Sequence[int],
        *,
        bias: bool,
        latent_rule: int | str | LatentRule | None,
        latent_kernel: int | None,
        channel_attention: bool,
        activation: str | None,
        condition_channels: int | None,
        pool_size: int | tuple[int, ...],
        reduction: int,
        squeeze: int | None,
        branch_options: dict,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the parameters and the branch.

        ``latent_rule`` None: no latent channels, so no Q (depthwise where ``latent_kernel`` is given,
        otherwise no Φ at all). ``latent_kernel`` None: no R.
        """
        name = type(self).__name__
        one_of(f"{name}: activation", activation, list(ACTIVATIONS))
        if not channel_attention and latent_rule is None and latent_kernel is None:
            raise ValueError(
                f"{name}: channel_attention and channel_fusion must not both be False: "
                f"that is the static nn.{name.removeprefix('DCD')}"
            )
        if condition_channels is None:
            condition_channels = in_channels
        else:
            check_sizes(name, **{self.condition_option: condition_channels})

        factory = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        self.activation = activation
        self.channel_attention = channel_attention
        self.weight = parameter(*weight_shape)
        self.register_parameter("bias", parameter(out_channels) if bias else None)
        for absent in ("p", "q", "r"):
            self.register_parameter(absent, None)

        phi_shape = None
        if latent_rule is not None:
            with self._own_errors():
                latent = latent_channels(
                    latent_rule,
                    in_channels,
                    out_channels,
                    blocks=self.blocks,
                    latent_kernel=latent_kernel or 1,
                )
            self.latent_channels = latent
            self.p, self.q = parameter(out_channels, latent), parameter(in_channels, latent)
            phi_shape = (latent, latent) if self.blocks == 1 else (self.blocks, latent, latent)
        if latent_kernel is not None:
            self.latent_kernel = latent_kernel
            self.r = parameter(math.prod(weight_shape[2:]), latent_kernel)
            if latent_rule is None:
                self.p = parameter(out_channels, latent_kernel)
                phi_shape = (latent_kernel, latent_kernel)
            else:
                phi_shape = (latent_kernel, *phi_shape)
        with self._own_errors():
            self.branch = DynamicBranch(
                condition_channels,
                out_channels if channel_attention else 0,
                phi_shape,
                squeeze_channels=squeeze_channels(in_channels, out_channels, reduction)
                if squeeze is None
                else squeeze,
                pool_size=pool_size,
                **branch_options,
                **factory,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W0 and bias as torch's static layer starts them; P, Q, R such that each product keeps the variance.

        With the branch's small Φ the layer starts close to ``W0 x + bias``; every parameter has a gradient.
        """
        fan_in = math.prod(self.weight.shape[1:])
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)
        if self.p is not None:
            nn.init.normal_(self.p, std=(self.p.shape[1] * (self.latent_kernel if self.joint else 1)) ** -0.5)
        if self.q is not None:
            nn.init.normal_(self.q, std=(self.q.shape[0] / self.blocks) ** -0.5)
        if self.r is not None:
            nn.init.normal_(self.r, std=self.r.shape[0] ** -0.5)
        self.branch.reset_parameters()

    def _packed(self, input: Tensor) -> PackedWeight | None:
        """The packed weights for a call with ``input``; None where the layer is to take its parameters."""
        return packed_for(self, input) if self._pointwise else None

    def _forget_packed(self) -> None:
        if self._kept is not None:
            self._kept = None

    def train(self, mode: bool = True) -> Self:
        self._forget_packed()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> Self:
        self._forget_packed()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        """What is pickled and copied: all but the packed weights, which follow from the parameters."""
        state = self.__dict__.copy()
        state.pop("_kept", None)
        return state

    @property
    def _pointwise(self) -> bool:
        """Whether the layer is one dense pointwise operator, the form that can be packed."""
        raise NotImplementedError

    @property
    def channel_fusion(self) -> bool:
        """Whether there is a Φ."""
        return self.p is not None

    @property
    def joint(self) -> bool:
        """Whether the residual fuses channels and kernel elements (Eq. 9)."""
        return self.q is not None and self.r is not None

    @classmethod
    def _from_static(cls, static: nn.Module, make: Callable[..., DCDLayer]) -> DCDLayer:
        """``make(device=, dtype=)``'s layer with the parameters of ``static`` and λ = 1, Φ = 0."""
        reason = cannot_convert(static)
        if reason is not None:
            raise TypeError(f"{cls.__name__}: cannot be made from this {type(static).__name__}: {reason}")
        layer = make(device=static.weight.device, dtype=static.weight.dtype)
        layer.branch.reset_to_static()
        layer.weight, layer.bias = static.weight, static.bias
        return layer.train(static.training)

    def _repr_options(self) -> str:
        text = ""
        for option in ("latent_channels", "latent_kernel"):
            if getattr(self, option) is not None:
                text += f", {option}={getattr(self, option)}"
        if self.blocks != 1:
            text += f", blocks={self.blocks}"
        if not self.channel_attention:
            text += ", channel_attention=False"
        if not self.channel_fusion:
            text += ", channel_fusion=False"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Errors of the branch and of the rules for sizes name this class and its options."""
        try:
            yield
        except (TypeError, ValueError) as error:
            message = str(error)
            if message.startswith("dropout "):
                message = f"branch_{message}"
            raise type(error)(f"{type(self).__name__}: {message}") from error

    def _conditioned(self, input: Tensor, condition: Tensor | None) -> Tensor:
        """What λ and Φ are computed from."""
        if condition is None:
            return input
        check_tensors(type(self).__name__, condition=condition)
        channels = self.branch.in_channels
        if (
            condition.dim() < 2
            or condition.shape[0] != input.shape[0]
            or condition.shape[self.channel_axis] != channels
        ):
            sizes = (channels, "...") if self.channel_axis == 1 else ("...", channels)
            raise ValueError(
                f"{type(self).__name__}: condition must have shape {show((input.shape[0], *sizes))}, the "
                f"batch size of input and {self.condition_option}, got {tuple(condition.shape)}"
            )
        return condition

    def _fusion_rule(self, rule: int | str | LatentRule, fuses: bool) -> int | str | LatentRule | None:
        """``latent_rule`` of :meth:`_build` for the option ``latent_channels``."""
        if fuses and rule is None:
            raise TypeError(
                f"{type(self).__name__}: latent_channels must be an integer, the name of a rule or a "
                "function, got None; channel_fusion=False leaves the residual out"
            )
        return rule if fuses else None

    def _check_input(self, input: Tensor, wanted: str, right: bool) -> None:
        if not right:
            raise ValueError(
                f"{type(self).__name__}: input must have shape {wanted}, got {tuple(input.shape)}"
            )


def cannot_convert(module: nn.Module) -> str | None:
    """Why no DCD layer can take over from ``module``, or None where one can."""
    if type(module) not in STATIC_LAYERS:
        names = ", ".join(f"nn.{kind.__name__}" for kind in STATIC_LAYERS)
        return f"it must be one of {names} itself (a subclass may compute something else)"
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is not a parameter (weight_norm and pruning recompute it at each call)"
    if not module.weight.is_floating_point():
        return f"its weight must be real and floating point, got {module.weight.dtype}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks, which would be lost: remove them first"
    return None
