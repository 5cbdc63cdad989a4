# SPDX-License-Identifier: BSD-3-Clause
"""A linear layer by dynamic decomposition: the paper's classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcd_kernels import functional
from dcd_kernels.arguments import check_tensors
from dcd_kernels.nn.latent import LatentRule
from dcd_kernels.nn.layer import DCDLayer


class DCDLinear(DCDLayer):
    """Linear layer whose weight is decomposed dynamically (drop-in for ``nn.Linear``).

    For sample n, with λ and Φ computed from the input by :class:`DynamicBranch`::

        W_n = Λ_n W0 + P Φ_n Qᵀ            y_n = activation(x_n W_nᵀ + bias + residual)

    A sample is one entry of the first dimension: all its rows share λ and Φ, computed from their mean.

    Args:
        in_features, out_features, bias, device, dtype: as of ``nn.Linear``. The bias is not scaled by λ.
        latent_channels, blocks, channel_attention, channel_fusion, reduction, squeeze_channels, gate,
            lam_activation, branch_dropout, branch_bias, activation: as of :class:`DCDConv2d`.
        condition_features: features of the tensor passed as ``condition``; by default ``in_features``.

    Shapes:
        input (N, ..., in_features) → (N, ..., out_features); residual like the output, added before the
        activation; condition (N, ..., condition_features), from which λ and Φ are computed in place of input.

    Dtypes:
        float32, float64, float16, bfloat16; λ and Φ are float32 beside half input, under autocast too.

    Raises:
        TypeError: a size that is not an integer, an input that is no tensor or of another dtype.
        ValueError: arguments out of range, input of the wrong shape.

    Source: paper, Section 5.2 ("a special case of pointwise convolution"), Eqs. 6 and 7.
    """

    condition_option = "condition_features"
    channel_axis = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        latent_channels: int | str | LatentRule = "halving",
        blocks: int = 1,
        channel_attention: bool = True,
        channel_fusion: bool = True,
        reduction: int = 16,
        squeeze_channels: int | None = None,
        gate: str | None = "relu",
        lam_activation: str | None = "hardsigmoid2",
        branch_dropout: float = 0.0,
        branch_bias: bool = False,
        condition_features: int | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(in_features, out_features, blocks, ("in_features", "out_features"))
        if not channel_fusion and blocks != 1:
            raise ValueError(f"DCDLinear: channel_fusion must be True for blocks, got blocks={blocks}")
        self.in_features = in_features
        self.out_features = out_features
        self._build(
            in_features,
            out_features,
            (out_features, in_features),
            bias=bias,
            latent_rule=self._fusion_rule(latent_channels, channel_fusion),
            latent_kernel=None,
            channel_attention=channel_attention,
            activation=activation,
            condition_channels=condition_features,
            pool_size=1,
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
    def _pointwise(self) -> bool:
        return self.blocks == 1

    def coefficients(self, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """λ (N, out_features) and Φ of the layer for ``input`` (or for what is passed as ``condition``)."""
        return self.branch(input.movedim(-1, 1) if input.dim() > 2 else input)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """``activation(x_n W_nᵀ + bias + residual)``: shapes, dtypes and errors are those of the class."""
        check_tensors("DCDLinear", input=input)
        self._check_input(
            input, f"(N, ..., {self.in_features})", input.dim() >= 2 and input.shape[-1] == self.in_features
        )
        lam, phi = self.coefficients(self._conditioned(input, condition))
        packed = self._packed(input)
        weights = (self.weight, self.p, self.q) if packed is None else (packed, None, None)
        return functional.dcd_linear(
            input,
            weights[0],
            weights[1],
            phi,
            weights[2],
            lam=lam,
            bias=self.bias,
            residual=residual,
            activation=self.activation,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> DCDLinear:
        """A layer that computes what ``linear`` computes, and can learn to be dynamic.

        As :meth:`DCDConv2d.from_conv`: W0 and the bias are the parameters of ``linear`` themselves, λ = 1 and
        Φ = 0 for every input, P and Q are random.

        An optimiser made before does not have the new parameters: add those of the layer that are not its own
        already. They are trainable, also where those of ``linear`` are frozen.

        Args:
            linear: an ``nn.Linear``.
            **options: the keyword-only arguments of this class.

        Raises:
            TypeError: another module, a subclass, or one with hooks or recomputed weights.
            ValueError: options out of range, or a ``lam_activation`` that cannot start at 1.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"{cls.__name__}.from_linear needs an nn.Linear, got {type(linear).__name__}")
        return cls._from_static(
            linear,
            lambda **factory: cls(
                linear.in_features, linear.out_features, linear.bias is not None, **factory, **options
            ),
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return text + self._repr_options()
