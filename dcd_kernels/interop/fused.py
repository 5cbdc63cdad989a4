# SPDX-License-Identifier: BSD-3-Clause
"""What a patched forward calls in place of the dynamic residual that it used to compute."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import extension, functional
from ..backends import branch as kernels
from ..backends import selection
from ..nn.branch import GATES, LAM_ACTIVATIONS, linear, pooled
from . import layers, norms

if extension.LOADED:
    from ..ops import branch as ops_branch
    from ..ops import layer as ops_layer
    from ..ops.autograd import is_traced, needs_graph

_CONVOLUTIONS = {3: functional.dcd_conv1d, 4: functional.dcd_conv2d, 5: functional.dcd_conv3d}


class LatentSize:
    """The size of z = Qᵀx and of views of it with ``rank`` dimensions, for code that asks a z not formed."""

    def __init__(self, input: Tensor, q: nn.Module, rank: int) -> None:
        stride = (1,) * (input.dim() - 2) if input.dim() == 2 else q.stride
        spatial = [(length - 1) // step + 1 for length, step in zip(input.shape[2:], stride, strict=True)]
        if rank - 2 < len(spatial):
            spatial = [math.prod(spatial)]
        sizes = input.shape[0], q.weight.shape[0], *spatial
        self.shape = torch.Size([*sizes, *[1] * (rank - len(sizes))])
        self.ndim = rank

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return math.prod(self.shape)


def layer(
    input: Tensor,
    squeeze: nn.Linear,
    gate_layer: nn.Linear | None,
    lam_layer: nn.Linear,
    phi_layer: nn.Linear,
    pool: int,
    gate: str | None,
    lam_activation: str | None,
    q: nn.Module,
    p: nn.Module,
    norm1: nn.Module | None,
    norm2: nn.Module | None,
    latent_residual: bool,
    static: Tensor | None,
    conv: nn.Module | None,
) -> Tensor:
    r"""`residual` with λ and Φ from the branch ``pool → squeeze → gate → (lam_layer, phi_layer)`` of input.

    The branch is computed in float32 or better, whatever the dtype of its layers.
    """
    parts = squeeze, gate_layer, lam_layer, phi_layer, pool, gate, lam_activation
    if extension.LOADED and conv is not None:
        whole = ops_layer.Layer(conv, p, q, *parts, norm1, norm2, latent_residual)
        if is_one_call(input, whole):
            tensors = [place.get(name) for place, name in whole.places()]
            return ops_layer.released_layer(input, tensors, whole.constants())
    lam, phi = _coefficients(input, *parts)
    # as wide as λ would be if its layers ran in their own dtype
    lam_dtype = lam_layer.weight.dtype
    if torch.is_autocast_enabled(input.device.type) and lam_dtype != torch.float64:
        lam_dtype = torch.get_autocast_dtype(input.device.type)
    return residual(
        input, lam, phi, q, p, norm1, norm2, latent_residual, False, static, conv, lam_dtype=lam_dtype
    )


def residual(
    input: Tensor,
    lam: Tensor | None,
    phi: Tensor,
    q: nn.Module,
    p: nn.Module,
    norm1: nn.Module | None,
    norm2: nn.Module | None,
    latent_residual: bool,
    transposed: bool,
    static: Tensor | None,
    conv: nn.Module | None,
    lam_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""``P [norm₂(Φ norm₁(Qᵀx)) (+ norm₁(Qᵀx))] + λ⊙static`` by the fused kernels.

    input (N, Ci, \*size), phi (N, L, L), lam any shape of N·Co numbers; ``q`` and ``p`` 1×1 convolutions or
    linear layers. The static output is ``static``, or ``conv(input)``, or nothing. ``lam_dtype`` is the dtype
    that torch would have had λ in, which decides about that of the sum, by default its own.
    """
    if input.dim() == 2:
        static = static if conv is None else conv(input)
        return _of_rows(
            input, lam, phi.mT if transposed else phi, q, p, norm1, norm2, latent_residual, static
        )
    batch, stride = input.shape[0], q.stride
    phi = phi.to(torch.promote_types(phi.dtype, torch.float32))
    # asked for once: what is parametrised may compute them, and differently each time
    q_weight, p_weight = q.weight.flatten(1).t(), p.weight.flatten(1)
    moments = None
    if norms.takes_moments(norm1) or norms.takes_moments(norm2):
        moments = functional.latent_moments(input, q_weight, stride=stride)
    size = tuple((length - 1) // step + 1 for length, step in zip(input.shape[2:], stride, strict=True))
    shape = (batch, q_weight.shape[1], *size)
    with _without_autocast(input.device.type):
        if transposed:
            phi = phi.mT
        phi, shift = norms.map_latent(phi, norm1, norm2, latent_residual, moments, q.bias, shape)
        bias = _expanded(shift, p_weight, p.bias)
    if lam is not None:
        lam_dtype = lam_dtype or lam.dtype
        lam = lam.reshape(batch, p_weight.shape[0])
    factors = p_weight, phi, q_weight
    if conv is not None:
        if _is_fusable(conv, input, stride):
            output = _convolve(input, conv, factors, lam, bias)
            return _as_summed(output, lam_dtype)
        static = conv(input)
    if static is None or (static.dtype != input.dtype and not _casts(static)):
        # what the residual is added to in another dtype is added as torch would
        zero = input.new_zeros(()).expand(batch, p_weight.shape[0], *size)
        output = functional.dcd_apply(zero, input, *factors, bias=bias, stride=stride)
        if static is not None:
            output = output + (static if lam is None else lam.reshape(*lam.shape, *[1] * len(size)) * static)
    else:
        if tuple(static.shape[2:]) != size:
            raise RuntimeError(
                f"the static output has spatial size {tuple(static.shape[2:])}, the dynamic residual {size}"
            )
        output = functional.dcd_apply(static, input, *factors, lam=lam, bias=bias, stride=stride)
        output = _as_summed(output, lam_dtype)
    return output


def _of_rows(
    input: Tensor,
    lam: Tensor | None,
    phi: Tensor,
    q: nn.Linear,
    p: nn.Linear,
    norm1: nn.Module | None,
    norm2: nn.Module | None,
    latent_residual: bool,
    static: Tensor | None,
) -> Tensor:
    """The residual of a linear layer, input (N, Ci): a row has no pixels to spare a pass over."""
    latent = q(input)
    normalised = latent if norm1 is None else norm1(latent)
    fused = (phi.to(normalised.dtype) @ normalised.unsqueeze(2)).squeeze(2)
    if norm2 is not None:
        fused = norm2(fused)
    output = p(fused + normalised if latent_residual else fused)
    if static is None:
        return output
    return output + (static if lam is None else lam.to(static.dtype).reshape(static.shape) * static)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )


def _casts(static: Tensor) -> bool:
    """Whether autocast brings ``static`` to the dtype of the other operands."""
    return torch.is_autocast_enabled(static.device.type) and static.dtype != torch.float64


def _expanded(shift: Tensor | None, p_weight: Tensor, p_bias: Tensor | None) -> Tensor | None:
    """The bias that a shift of the latent is behind P, and P's own."""
    if shift is None:
        return p_bias
    return F.linear(shift, p_weight.to(shift.dtype), None if p_bias is None else p_bias.to(shift.dtype))


def is_one_call(input: Tensor, layer: ops_layer.Layer) -> bool:
    """Whether all of a layer is one op: a pointwise one on the CPU of which nobody wants a gradient."""
    conv, p, q, squeeze, gate_layer, lam_layer, phi_layer, *_, norm1, norm2, _ = layer
    if (
        not input.is_cpu
        or input.dim() < 3
        or input.numel() == 0
        or is_traced()
        or torch.is_autocast_enabled("cpu")
        or norms.takes_moments(norm1)
        or norms.takes_moments(norm2)
        or any(step != 1 for step in q.stride)
        or not _is_fusable(conv, input, q.stride)
    ):
        return False
    modules = conv, p, q, squeeze, gate_layer, lam_layer, phi_layer, norm1, norm2
    present = [module for module in modules if module is not None]
    if any("weight" not in module._parameters for module in present):  # parametrised: computed at each access
        return False
    tensors = [tensor for module in present for tensor in module._parameters.values() if tensor is not None]
    if needs_graph(input, *tensors) or any(tensor.dtype is not input.dtype for tensor in tensors):
        return False
    if not kernels.can_run(input, squeeze.weight)[0]:
        return False
    return selection.select("pointwise", input, conv.weight) == "cpu"


def _is_fusable(conv: nn.Module, input: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether ``conv(input)`` is a product at every pixel that the residual reads, and nothing besides."""
    return (
        layers.is_projection(conv)
        and layers.rank(conv) == input.dim()
        and not layers.is_altered(conv)
        and tuple(conv.stride) == tuple(stride)
    )


def _convolve(input, conv: nn.Module, factors, lam: Tensor | None, bias: Tensor | None) -> Tensor:
    if conv.bias is not None:  # λ scales the static layer's bias with its output
        of_static = conv.bias if lam is None else lam * conv.bias
        bias = of_static if bias is None else bias + of_static
    convolution = _CONVOLUTIONS[input.dim()]
    return convolution(input, conv.weight, *factors, lam=lam, bias=bias, stride=conv.stride)


def _as_summed(output: Tensor, lam_dtype: torch.dtype | None) -> Tensor:
    """In the dtype that torch gives the sum, which a wider λ widens."""
    if lam_dtype is None or lam_dtype == output.dtype:
        return output
    return output.to(torch.promote_types(output.dtype, lam_dtype))


def _coefficients(
    input: Tensor,
    squeeze: nn.Linear,
    gate_layer: nn.Linear | None,
    lam_layer: nn.Linear,
    phi_layer: nn.Linear,
    pool: int,
    gate: str | None,
    lam_activation: str | None,
) -> tuple[Tensor, Tensor]:
    """λ (N, Co) and Φ (N, L, L) in float32 or better."""
    linears = [squeeze, gate_layer, lam_layer, phi_layer]
    if kernels.can_run(input, *(layer.weight for layer in linears if layer is not None))[0]:
        bins = (input.shape[2:].numel(),) if pool == 1 else [(size + 1) // 2 for size in input.shape[2:]]
        parameters = [(None, None) if layer is None else (layer.weight, layer.bias) for layer in linears]
        lam, phi = ops_branch.branch(
            ops_branch.channel_sums(input, pool),
            1.0 / math.prod(bins),
            *(tensor for pair in parameters for tensor in pair),
            lam_layer.weight.shape[0],
            ops_branch.GATES.index(gate),
            ops_branch.LAM_ACTIVATIONS.index(lam_activation),
        )
    else:
        with _without_autocast(input.device.type):
            hidden = linear(squeeze, pooled(input, None if pool == 1 else (pool, pool)))
            if gate_layer is None:
                hidden = GATES[gate](hidden)
            else:
                hidden = hidden * LAM_ACTIVATIONS["hardsigmoid2"][0](linear(gate_layer, hidden))
            lam = LAM_ACTIVATIONS[lam_activation][0](linear(lam_layer, hidden))
            phi = linear(phi_layer, hidden)
    latent = math.isqrt(phi.shape[1])
    return lam, phi.view(phi.shape[0], latent, latent)
