# SPDX-License-Identifier: BSD-3-Clause
"""The op released_layer: a pointwise layer of the released form in one call on the CPU, for inference."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .branch import GATES, LAM_ACTIVATIONS
from .calls import call

_op = torch.ops.dcd_kernels.released_layer.default


def _fake(input: Tensor, weight: Tensor, *_) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0], *input.shape[2:]))


def register(library: torch.library.Library) -> None:
    """Registers the fake implementation; there is no gradient."""
    torch.library.register_fake("dcd_kernels::released_layer", _fake, lib=library)


# the fields of a Layer that are modules
MODULES = ("conv", "p", "q", "squeeze", "gate_layer", "lam_layer", "phi_layer", "norm1", "norm2")


class Layer(NamedTuple):
    """``λ⊙(W0 x + b) + P [norm₂(Φ z₁) (+ z₁)]`` with ``z₁ = norm₁(Qᵀx)``, λ and Φ from the branch of x.

    conv, q and p are 1×1 convolutions, the other layers linear; pool is 1, or 2 for images; a norm goes by
    its running statistics, or is None. gate and lam_activation are names of `GATES` and `LAM_ACTIVATIONS`.
    """

    conv: nn.Module
    p: nn.Module
    q: nn.Module
    squeeze: nn.Linear
    gate_layer: nn.Linear | None
    lam_layer: nn.Linear
    phi_layer: nn.Linear
    pool: int
    gate: str | None
    lam_activation: str | None
    norm1: nn.Module | None
    norm2: nn.Module | None
    latent_residual: bool

    def places(self) -> list[tuple[dict, str]]:
        """Where the op's tensors are, in its order: a dictionary and a key, which may be absent."""
        layers = (self.conv, self.p, self.q, self.squeeze, self.gate_layer, self.lam_layer, self.phi_layer)
        found = [
            ({} if layer is None else layer._parameters, name)
            for layer in layers
            for name in ("weight", "bias")
        ]
        for norm in (self.norm1, self.norm2):
            parameters, buffers = ({}, {}) if norm is None else (norm._parameters, norm._buffers)
            found += [(parameters, "weight"), (parameters, "bias")]
            found += [(buffers, "running_mean"), (buffers, "running_var")]
        return found

    def constants(self) -> tuple:
        """The op's other arguments, in its order."""
        codes = self.pool, GATES.index(self.gate), LAM_ACTIVATIONS.index(self.lam_activation)
        eps = [0.0 if norm is None else norm.eps for norm in (self.norm1, self.norm2)]
        return (*codes, *eps, self.latent_residual)


def released_layer(input: Tensor, tensors: list[Tensor | None], constants: tuple) -> Tensor:
    """A `Layer` of input (N, Ci, *spatial), on the CPU and not empty, none of which needs a gradient.

    tensors are what is in `Layer.places`, all of the dtype of input (running statistics of any); constants
    are `Layer.constants`. The branch is computed in float32 or better.

    Returns (N, Co, *spatial), channels-last where input is. Raises RuntimeError for what does not fit.
    """
    bins, gate, lam_activation, eps1, eps2, latent_residual = constants
    return call(
        _op,
        None,
        input,
        *tensors[:14],
        bins,
        gate,
        lam_activation,
        eps1,
        *tensors[14:18],
        eps2,
        *tensors[18:],
        latent_residual,
    )
