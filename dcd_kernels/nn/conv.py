# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions by dynamic decomposition: ``DCDConv1d``, ``DCDConv2d``, ``DCDConv3d``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcd_kernels import functional
from dcd_kernels.arguments import check_tensors
from dcd_kernels.geometry import per_dimension
from dcd_kernels.nn.branch import one_of
from dcd_kernels.nn.latent import LatentRule, latent_kernel_elements
from dcd_kernels.nn.layer import DCDLayer

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

_DOC = """{rank}-D convolution whose kernel is decomposed dynamically (drop-in for ``nn.Conv{rank}d``).

    For sample n, with λ and Φ computed from the input by :class:`DynamicBranch`::

        W_n = Λ_n W0 + P Φ_n Qᵀ            y_n = activation(W_n * x_n + bias + residual)

    The form follows from the arguments:

    ==========================================  ===========================================================
    ``kernel_size`` 1                           Eq. 6; block-diagonal with ``blocks > 1`` (Eq. 7)
    ``kernel_size`` k, odd                      channel fusion alone: the residual is a 1×1 at the centre tap
    ``joint=True``                              joint fusion of channels and kernel elements (Eq. 9)
    ``groups == in_channels > 1``               depthwise: P (Co, L_k), Φ (L_k, L_k), R (∏k, L_k) (Eq. 8)
    other ``groups > 1``                        block-diagonal (Eq. 7), ``blocks`` a multiple of ``groups``
    ``channel_attention=False``                 Λ = 1 (Eq. 5)
    ``channel_fusion=False``                    ΛW0 alone: any kernel size and groups
    ==========================================  ===========================================================

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as of ``nn.Conv{rank}d``. The bias is not scaled by λ.
        latent_channels: ``L`` (of one block), or the name of a rule: ``'halving'``, ``'printed'``,
            ``'released'``, or a function of (in_channels, out_channels); see :mod:`dcd_kernels.nn.latent`.
            A depthwise layer has none: a number raises.
        latent_kernel: ``L_k``; by default ``⌊∏k / 2⌋``. Only for depthwise and joint layers.
        blocks: ``B`` of Eq. 7; by default ``groups`` for a grouped layer with channel fusion that is not
            depthwise, else 1.
        joint: fuse kernel elements too. Not with groups or blocks.
        channel_attention, channel_fusion: whether there is a Λ, a Φ.
        reduction: ``r``; the branch squeezes to ``max(in_channels, out_channels) // r``, at least 4. The
            paper takes 16, and 8 for narrow networks.
        squeeze_channels: the squeeze itself; overrides ``reduction``.
        pool_size, gate, lam_activation: of :class:`DynamicBranch`.
        branch_dropout, branch_bias: ``dropout`` and ``bias`` of :class:`DynamicBranch`.
        condition_channels: channels of the tensor passed as ``condition``; by default ``in_channels``.
        activation: None, ``'relu'``, ``'relu6'``, ``'silu'`` or ``'hardswish'``, applied to the sum.

    Shapes:
        input (N, in_channels, *spatial); residual like the output, added before the activation; condition
        (N, condition_channels, ...), from which λ and Φ are computed in place of the input.

    Dtypes:
        float32, float64, float16, bfloat16; λ and Φ are float32 beside half input, under autocast too.

    Raises:
        TypeError: a size that is not an integer, an input that is no tensor or of another dtype.
        ValueError: arguments out of range or in a combination that has no form; input of the wrong shape.

    Source: paper, Sections 3.3, 3.4 and 4.
    """


class _DCDConv(DCDLayer):
    spatial: int
    static: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        latent_channels: int | str | LatentRule = "halving",
        latent_kernel: int | None = None,
        blocks: int | None = None,
        joint: bool = False,
        channel_attention: bool = True,
        channel_fusion: bool = True,
        reduction: int = 16,
        squeeze_channels: int | None = None,
        pool_size: int | Sequence[int] = 1,
        gate: str | None = "relu",
        lam_activation: str | None = "hardsigmoid2",
        branch_dropout: float = 0.0,
        branch_bias: bool = False,
        condition_channels: int | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self._set_sizes(in_channels, out_channels, 1 if blocks is None else blocks)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_dimension(name, "kernel_size", kernel_size, self.spatial, 1)
        self.stride = per_dimension(name, "stride", stride, self.spatial, 1)
        self.dilation = per_dimension(name, "dilation", dilation, self.spatial, 1)
        self._set_groups(groups)
        if blocks is None and channel_fusion and not joint and not self.depthwise:
            self.blocks = groups
        self.padding_mode = padding_mode
        one_of(f"{name}: padding_mode", padding_mode, PADDING_MODES)
        self._set_padding(padding)
        self._check_form(latent_channels, latent_kernel, joint, channel_fusion)

        if channel_fusion and (joint or self.depthwise) and latent_kernel is None:
            latent_kernel = latent_kernel_elements(self.kernel_size)
        self._build(
            in_channels,
            out_channels,
            (out_channels, in_channels // groups, *self.kernel_size),
            bias=bias,
            latent_rule=self._fusion_rule(latent_channels, channel_fusion and not self.depthwise),
            latent_kernel=latent_kernel,
            channel_attention=channel_attention,
            activation=activation,
            condition_channels=condition_channels,
            pool_size=1 if pool_size == 1 else per_dimension(name, "pool_size", pool_size, self.spatial, 1),
            reduction=reduction,
            squeeze=squeeze_channels,
            branch_options={
                "gate": gate,
                "lam_activation": lam_activation,
                "dropout": branch_dropout,
                "bias": branch_bias,
            },
            device=device,
            dtype=dtype,
        )

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has kernels of its own (Eq. 8)."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def _pointwise(self) -> bool:
        return self.groups == 1 and self.blocks == 1 and all(size == 1 for size in self.kernel_size)

    def _set_groups(self, groups: int) -> None:
        if (
            not isinstance(groups, int)
            or groups < 1
            or self.in_channels % groups
            or self.out_channels % groups
        ):
            raise ValueError(
                f"{type(self).__name__}: groups must be a positive integer that divides in_channels and "
                f"out_channels, got {groups!r} for {self.in_channels} and {self.out_channels}"
            )
        self.groups = groups

    def _set_padding(self, padding: int | Sequence[int] | str) -> None:
        name = type(self).__name__
        if isinstance(padding, str):
            one_of(f"{name}: padding", padding, ("same", "valid"))
            if padding == "same" and any(step != 1 for step in self.stride):
                raise ValueError(f"{name}: padding='same' needs stride 1, got {self.stride}")
            self.padding = padding
        else:
            self.padding = per_dimension(name, "padding", padding, self.spatial, 0)
        # Other modes than zeros pad the input beforehand; F.pad wants (before, behind) from the last axis on.
        self._margins: list[int] = []
        if self.padding_mode != "zeros":
            for axis in reversed(range(self.spatial)):
                if self.padding == "same":
                    total = self.dilation[axis] * (self.kernel_size[axis] - 1)
                    self._margins += [total // 2, total - total // 2]
                else:
                    amount = 0 if self.padding == "valid" else self.padding[axis]
                    self._margins += [amount, amount]

    def _check_form(
        self, latent: int | str | LatentRule, latent_kernel: int | None, joint: bool, channel_fusion: bool
    ) -> None:
        name, groups, blocks = type(self).__name__, self.groups, self.blocks
        if latent_kernel is not None:
            if not (channel_fusion and (joint or self.depthwise)):
                raise ValueError(
                    f"{name}: latent_kernel is for depthwise and joint fusion, got {latent_kernel!r}"
                )
            if not isinstance(latent_kernel, int) or latent_kernel < 1:
                raise ValueError(f"{name}: latent_kernel must be a positive integer, got {latent_kernel!r}")
        if not channel_fusion:
            if joint or blocks != 1:
                raise ValueError(
                    f"{name}: channel_fusion must be True for joint or blocks, "
                    f"got joint={joint}, blocks={blocks}"
                )
        elif joint:
            if groups != 1 or blocks != 1:
                raise ValueError(
                    f"{name}: joint needs groups and blocks of 1 (Eq. 9 has no sparse form), "
                    f"got groups={groups}, blocks={blocks}"
                )
            if math.prod(self.kernel_size) == 1:
                raise ValueError(
                    f"{name}: joint needs a kernel of more than one element, got {self.kernel_size}"
                )
        elif self.depthwise:
            if blocks != 1:
                raise ValueError(f"{name}: blocks must be 1 for a depthwise layer, got {blocks}")
            if isinstance(latent, int):
                raise ValueError(
                    f"{name}: latent_channels must not be a number for a depthwise layer, which fuses kernel "
                    f"elements (latent_kernel), got {latent}"
                )
        else:
            if blocks % groups:
                raise ValueError(
                    f"{name}: blocks must be a multiple of groups, got blocks={blocks}, groups={groups}; "
                    "a dense residual beside a grouped convolution is what dcd_apply computes"
                )
            if any(size % 2 == 0 for size in self.kernel_size):
                raise ValueError(
                    f"{name}: kernel_size must be odd for channel fusion, which acts at the centre tap, "
                    f"got {self.kernel_size}; joint=True has no such limit"
                )

    def coefficients(self, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """λ (N, out_channels) and Φ of the layer for ``input`` (or for what is passed as ``condition``)."""
        return self.branch(input)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """``activation(W_n * x_n + bias + residual)``: shapes, dtypes and errors are those of the class."""
        check_tensors(type(self).__name__, input=input)
        self._check_input(
            input,
            f"(N, {self.in_channels}, {', '.join('DHW'[3 - self.spatial :])})",
            input.dim() == self.spatial + 2 and input.shape[1] == self.in_channels,
        )
        lam, phi = self.coefficients(self._conditioned(input, condition))
        padding = self.padding
        if self._margins:
            input, padding = F.pad(input, self._margins, mode=self.padding_mode), 0
        convolve = (functional.dcd_conv1d, functional.dcd_conv2d, functional.dcd_conv3d)[self.spatial - 1]
        packed = self._packed(input)
        weights = (self.weight, self.p, self.q) if packed is None else (packed, None, None)
        return convolve(
            input,
            weights[0],
            weights[1],
            phi,
            weights[2],
            r=self.r,
            lam=lam,
            bias=self.bias,
            residual=residual,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
        )

    @classmethod
    def from_conv(cls, conv: nn.Module, **options) -> _DCDConv:
        """A layer that computes what ``conv`` computes, and can learn to be dynamic.

        W0 and the bias are the parameters of ``conv`` themselves, not copies: an optimiser that holds them,
        tied weights and ``requires_grad`` stay as they are. λ = 1 and Φ = 0 for every input; P, Q and R are
        random, so that Φ has a gradient at once, and P, Q, R and the first FC from the second step on. An
        optimiser made before does not have the new parameters: add those of the layer that are not its own
        already. They are trainable, also where those of ``conv`` are frozen.

        Args:
            conv: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` to match this class.
            **options: the keyword-only arguments of this class.

        Raises:
            TypeError: another module, a subclass, or one with hooks or recomputed weights.
            ValueError: options that the form of ``conv`` does not have, an even kernel with a centre tap, or
                a ``lam_activation`` that cannot start at 1.
        """
        if type(conv) is not cls.static:
            raise TypeError(
                f"{cls.__name__}.from_conv needs an nn.{cls.static.__name__}, got {type(conv).__name__}"
            )

        def make(**factory) -> _DCDConv:
            return cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                conv.bias is not None,
                conv.padding_mode,
                **factory,
                **options,
            )

        return cls._from_static(conv, make)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        if self.padding != (0,) * self.spatial:
            text += f", padding={self.padding!r}"
        if self.dilation != (1,) * self.spatial:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text + self._repr_options()


class DCDConv1d(_DCDConv):
    __doc__ = _DOC.format(rank=1)
    spatial = 1
    static = nn.Conv1d


class DCDConv2d(_DCDConv):
    __doc__ = _DOC.format(rank=2)
    spatial = 2
    static = nn.Conv2d


class DCDConv3d(_DCDConv):
    __doc__ = _DOC.format(rank=3)
    spatial = 3
    static = nn.Conv3d
